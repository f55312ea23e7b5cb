"""The drawings of a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, product
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from sonorant.data.frames import FRAME_SECONDS, SAMPLE_RATE, frame_centres
from sonorant.evaluation.abx.items import SILENCE
from sonorant.evaluation.measures import System
from sonorant.evaluation.report.page import escape, in_scroller
from sonorant.evaluation.report.parts import Example, Search, Shown
from sonorant.evaluation.units import Joint, collapse, confuse

INK, MUTED, RULE, ACCENT = "#1f2328", "#636c76", "#d8dee4", "#2563a8"
NUM_CONFUSIONS = 5
CONFUSED_FRAMES = 50
"""Frames, a second, of a phone whose confusions are named: of fewer a share says little."""
LAST_CURVES = ("learning_rate", "gradient_norm")
LINES = (ACCENT, "#c2571a", "#3c8c5a", "#7a4fa3", "#8a6d1d", "#4a8a99")
STYLES = ("-", "--", ":", "-.")
DRAWING = {
    "svg.hashsalt": "sonorant",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eef1f4",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


def training_panels(journal: Sequence[Mapping[str, Any]]) -> str:
    """A curve by update for each name in the journal; names that differ before a slash share a panel."""
    curves = training_curves(journal)
    if not curves:
        return '<p class="small">The model came without a training journal.</p>'
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for name, points in curves.items():
        series, _, panel = name.rpartition("/")
        panels.setdefault(panel, {})[series] = points
    images = []
    for panel, series_of in sorted(panels.items(), key=lambda item: item[0] in LAST_CURVES):
        title = panel.replace("_", " ")
        if len(series_of) == 1:
            title += "".join(f", {series}" for series in series_of if series)
        columns = 3 if len(series_of) < 10 else 2
        rows = -(-len(series_of) // columns) if len(series_of) > 1 else 0
        figure = _figure(3.8, 2.3 + 0.17 * rows)
        axes = figure.add_subplot()
        for (series, (updates, values)), (style, colour) in zip(
            series_of.items(), cycle(product(STYLES, LINES)), strict=False
        ):
            axes.plot(updates, values, color=colour, linestyle=style, linewidth=1.6, label=series or "total")
        axes.set(xlabel="update", title=title)
        axes.margins(x=0.02)
        if rows:
            figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=7)
        images.append(_image(figure, f"Training curve: {title} by update"))
    return f'<div class="panels">{"".join(images)}</div>'


def training_curves(journal: Iterable[Mapping[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    """(updates, values) of every number in the journal, by name."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for entry in journal:
        for name, value in entry.items():
            if name != "update" and isinstance(value, int | float):
                updates, values = curves.setdefault(name, ([], []))
                updates.append(float(entry["update"]))
                values.append(float(value))
    return curves


def layer_panels(systems: Sequence[System]) -> str:
    """How much each probe reads of each layer, of the systems that have several; nothing where none was probed."""
    several = [system for system in systems if any(len(shares) > 1 for shares in system.shares.values())]
    images = []
    for probe in dict.fromkeys(name for system in several for name in system.shares):
        figure = _figure(3.8, 2.5)
        axes = figure.add_subplot()
        own = [system for system in several if probe in system.shares]
        for system, colour, style in zip(own, cycle(LINES), cycle(STYLES), strict=False):
            shares = system.shares[probe]
            axes.plot(range(len(shares)), shares, style, marker="o", markersize=3, color=colour, label=system.name)
        axes.set(xlabel="layer", title=f"{probe}: share of the weighted sum")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(bottom=0)
        if len(own) > 1:
            figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=7)
        images.append(_image(figure, f"Weight of each layer in the probe of {probe}"))
    return f'<div class="panels">{"".join(images)}</div>' if images else ""


def heat_map(joint: Joint | None) -> str:
    """Which phones each unit stands for."""
    if joint is None or not joint.num_frames:
        return '<p class="small">The evaluated utterances have no phones.</p>'
    shares, phones, _ = sort_by_phone(joint)
    figure, axes = _draw_shares(shares, phones, "share of the unit's frames")
    axes.set_xticks([])
    axes.set_xlabel(f"{shares.shape[1]} units that occur, by their most frequent phone")
    caption = (
        "Each column is a unit: which phones its frames belong to. A unit that stands for one phone has one dark "
        "cell; a phone spread over many units has a long dark step. Phones are ordered by frequency."
    )
    return in_scroller(_image(figure, "Heat map of units against phones"), caption)


def confusion_map(joint: Joint | None) -> str:
    """Which phones the units take for which, and in words where they do so most; nothing where there are no phones."""
    if joint is None or not joint.num_frames:
        return ""
    confusion = confuse(joint)
    phones = confusion.phones
    figure, axes = _draw_shares(confusion.shares, phones, "share of the phone's frames")
    # A column is 9 inches over their number wide, a character of a label about 0.08.
    turned = 90 if 0.08 * max(map(len, phones)) > 9 / len(phones) else 0
    axes.set_xticks(range(len(phones)), phones, fontsize=8, color=INK, rotation=turned)
    axes.set(xlabel="heard", ylabel="said")
    caption = (
        "Each row is a phone: which phones it is heard as where every unit is heard as its most frequent phone. What "
        "is heard right lies on the diagonal; an empty column is a phone that no unit stands for."
    )
    worst = confusion.largest(NUM_CONFUSIONS, CONFUSED_FRAMES)
    listed = "; ".join(f"{said} heard as {heard}: {share:.0%}".replace("%", " %") for said, heard, share in worst)
    told = f'<p class="small">Confused most, of phones of a second or more: {escape(listed)}.</p>' if worst else ""
    return in_scroller(_image(figure, "Heat map of phones said against phones heard"), caption) + told


def _draw_shares(shares: NDArray[np.float64], phones: Sequence[str], what: str) -> tuple[Figure, Axes]:
    """Shares (Y, ·) as shades of blue, a row for each phone."""
    figure = _figure(10, 0.9 + 0.165 * len(phones))
    axes = figure.add_subplot()
    axes.grid(False)
    image = axes.imshow(shares, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set_yticks(range(len(phones)), phones, fontsize=8, color=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.02, pad=0.01, label=what)
    bar.outline.set_visible(False)
    return figure, axes


def sort_by_phone(joint: Joint) -> tuple[NDArray[np.float64], list[str], NDArray[np.int64]]:
    """p(phone | unit) (Y, K'), phones by frequency, and the units that occur by their best phone (K',)."""
    rows = np.argsort(-joint.counts.sum(axis=1), kind="stable")
    units = np.flatnonzero(joint.counts.sum(axis=0))
    shares = joint.counts[rows][:, units] / joint.counts.sum(axis=0)[units]
    order = np.lexsort((-shares.max(axis=0), shares.argmax(axis=0)))
    return shares[:, order], [joint.phones[row] for row in rows], units[order]


def utterance_strips(examples: Sequence[Example]) -> str:
    """Each example's waveform over its phones and units."""
    if not examples:
        return '<p class="small">None was drawn.</p>'
    drawn = [
        in_scroller(
            _image(_draw_example(example), f"Waveform, phones and units of {example.id}"),
            f"{example.id}: {example.text or 'no text'}",
        )
        for example in examples
    ]
    return "".join(drawn) + (
        '<p class="small">Waveform, phones where the corpus has them, and runs of equal units with '
        "their numbers; a unit has the same colour everywhere.</p>"
    )


def _draw_example(example: Example) -> Figure:
    seconds = len(example.wave) / SAMPLE_RATE
    has_phones = example.phones is not None
    figure = _figure(10, 2.2)
    axes = figure.subplots(3 if has_phones else 2, 1, sharex=True, height_ratios=[3, 1, 1][: 3 if has_phones else 2])
    _fill_wave(axes[0], example.wave, 1200)
    strips = [("units", _unit_strip(example.units))]
    if example.phones is not None:
        shades = {True: "#ffffff", False: "#e6edf5"}
        phones = [(label, start, end, shades[label == SILENCE]) for label, start, end in example.phones]
        strips.insert(0, ("phones", phones))
    for strip, (name, spans) in zip(axes[1:], strips, strict=True):
        for label, start, end, colour in spans:
            strip.barh(0, end - start, left=start, height=1, color=colour, edgecolor="white", linewidth=0.8)
            # A character at this size is about 0.06 inch wide; the axis is about 9.2 inches long.
            if label != SILENCE and (end - start) / seconds * 9.2 > 0.07 * len(label) + 0.02:
                strip.text((start + end) / 2, 0, label, ha="center", va="center", fontsize=7)
        strip.set_ylim(-0.5, 0.5)
        strip.set_yticks([0], [name])
    for axis in axes:
        axis.grid(False)
        for spine in axis.spines.values():
            spine.set_visible(False)
    axes[0].set_yticks([])
    axes[-1].set_xlabel("seconds")
    axes[-1].set_xlim(0, seconds)
    return figure


def show_search(search: Search) -> str:
    """A caption and the images that it finds, side by side; its own, where it comes later, stands apart."""
    is_found = any(shown.mark == "right" for shown in search.found)
    said = f"“{search.text}”" if search.text else "no text"
    place = f"its own image is number {search.own.place} of {search.num_images}"
    images = [_show_image(shown) for shown in (*search.found, *(() if is_found else (search.own,)))]
    if not is_found:
        images.insert(-1, '<li class="gap" aria-hidden="true">…</li>')
    wave = _image(_draw_wave(search.wave), f"Waveform of {search.id}")
    return (
        f'<figure class="search"><figcaption><strong>{escape(said)}</strong> {escape(search.id)}: {place}'
        f'</figcaption><div class="wave">{wave}</div><ol>{"".join(images)}</ol></figure>'
    )


def _show_image(shown: Shown) -> str:
    said = f" of “{shown.text}”" if shown.text else ""
    if shown.picture is None:
        picture = f'<div class="unseen">{escape(shown.name)}</div>'
    else:
        data = base64.b64encode(shown.picture).decode()
        picture = f'<img alt="Image{escape(said)}, {escape(shown.name)}" src="data:image/png;base64,{data}">'
    kind = {"right": "right", "same words": "same", "": "other"}[shown.mark]
    return (
        f'<li class="{kind}">{picture}<div><b>{shown.place}</b> <span class="small">{shown.score:.2f}</span></div>'
        f'<div class="mark">{shown.mark or "–"}</div></li>'
    )


def draw_durations(seconds: Sequence[float]) -> str:
    """How long utterances are, as a histogram."""
    figure = _figure(3.8, 2.1)
    axes = figure.add_subplot()
    axes.hist(seconds, bins=20, color=ACCENT)
    axes.set(xlabel="seconds", ylabel="evaluated utterances")
    return _image(figure, "Histogram of the durations of the evaluated utterances")


def _draw_wave(wave: NDArray[np.float32]) -> Figure:
    figure = _figure(3, 0.5)
    axes = figure.add_subplot()
    _fill_wave(axes, wave, 400)
    axes.margins(x=0)
    axes.set_axis_off()
    return figure


def _fill_wave(axes: Axes, wave: NDArray[np.float32], num_bins: int) -> None:
    """The waveform's extent over the seconds."""
    bins = np.array_split(wave, min(len(wave), num_bins))
    times = (np.arange(len(bins)) + 0.5) * len(wave) / SAMPLE_RATE / len(bins)
    axes.fill_between(times, [part.min() for part in bins], [part.max() for part in bins], color=MUTED, linewidth=0)


def _unit_strip(units: NDArray[np.int64]) -> list[tuple[str, float, float, str]]:
    """(label, start, end, colour) of each run, a frame drawn as one step of the grid around its centre."""
    from matplotlib.colors import hsv_to_rgb, to_hex

    kept, durations = collapse(units)
    edges = frame_centres(len(units) + 1)[np.cumsum([0, *durations])] - FRAME_SECONDS / 2
    golden = 0.618034  # successive multiples are spread evenly over the hues
    return [
        (str(unit), start, end, to_hex(hsv_to_rgb((unit * golden % 1, 0.2 + 0.1 * (unit % 3), 0.94))))
        for unit, start, end in zip(kept.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    ]


def _figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    return Figure(figsize=(width, height), layout="constrained")


def _image(figure: Figure, alternative: str) -> str:
    """The figure as an image that the page carries inside."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(alternative)}" src="data:image/svg+xml;base64,{data}">'
