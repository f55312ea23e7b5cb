"""One self-contained page about a model: it loads nothing, and equal inputs give equal bytes."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, product
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from sonorant.data.frames import FRAME_SECONDS, SAMPLE_RATE, frame_centres
from sonorant.evaluation.abx.items import SILENCE, Segment
from sonorant.evaluation.intervals import Estimate, bootstrap, difference
from sonorant.evaluation.retrieval import TOPS
from sonorant.evaluation.units import Joint, collapse


@dataclass(frozen=True)
class Measure:
    """A row of the table: the key of a score, what it is called and which direction is better."""

    key: str
    name: str
    better: Literal["lower", "higher", ""] = ""
    decimals: int = 3


ABX_SLICINGS = {"": "", "_librilight": ", libri-light's slicing"}
MEASURES: Mapping[str, Sequence[Measure]] = {
    "ABX error of features": [
        Measure(f"abx_{speaker}_{context}{slicing}", f"{speaker} speakers, {context_name}{slicing_name}", "lower")
        for slicing, slicing_name in ABX_SLICINGS.items()
        for context, context_name in {"any": "any context", "in": "in context"}.items()
        for speaker in ("across", "within")
    ],
    "Units and phones": [
        Measure("unit_abx_across_any", "ABX error of units, across speakers, any context", "lower"),
        Measure("pnmi", "PNMI", "higher"),
        Measure("phone_purity", "phone purity", "higher"),
        Measure("cluster_purity", "cluster purity", "higher"),
        Measure("pnmi_speech", "PNMI without silence", "higher"),
        Measure("phone_purity_speech", "phone purity without silence", "higher"),
        Measure("cluster_purity_speech", "cluster purity without silence", "higher"),
    ],
    "Units that change where what is said does not": [
        Measure("unit_edits_speed", "spoken a tenth faster", "lower"),
        Measure("unit_edits_pitch", "two semitones higher or lower", "lower"),
        Measure("unit_edits_noise", "in white noise at 10 dB", "lower"),
        Measure("unit_edits_room", "in a room that rings for 0.4 s", "lower"),
    ],
    "Units alone": [
        Measure("num_units", "units in the codebook", decimals=0),
        Measure("active_units", "units that occur", decimals=0),
        Measure("perplexity", "perplexity", decimals=1),
        Measure("repetition_rate", "share of frames that repeat the one before", decimals=3),
        Measure("bitrate", "bits a second, every frame", decimals=1),
        Measure("bitrate_dedup", "bits a second without repeats", decimals=1),
        Measure("bitrate_dedup_durations", "bits a second without repeats, with durations", decimals=1),
    ],
}
RETRIEVAL: Mapping[str, Sequence[Measure]] = {
    f"{way_name}, {kind_name}": [
        *(Measure(f"{way}_recall_at_{top}{kind}", f"recall at {top}", "higher") for top in TOPS),
        Measure(f"{way}_median_rank{kind}", "median rank", "lower", 1),
    ]
    for way, way_name in {"speech_to_image": "Speech to image", "image_to_speech": "Image to speech"}.items()
    for kind, kind_name in {"": "its own", "_by_class": "any with the same words"}.items()
}
HEADLINES = {
    "abx_across_any": "ABX error, across speakers, any context",
    "abx_within_any": "ABX error, within speakers, any context",
    "pnmi": "PNMI",
    "bitrate_dedup": "bits a second without repeats",
    "speech_to_image_recall_at_1_by_class": "speech to image of the same words, recall at 1",
}
STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class System:
    """What was measured: the model or a baseline. Scores it has not are left out."""

    key: str
    name: str
    detail: str
    scores: Mapping[str, float]
    estimates: Mapping[str, Estimate] = field(default_factory=dict)
    """Of the scores whose share by utterance is known."""


@dataclass(frozen=True)
class Example:
    """An utterance to draw: wave (S,) at 16 kHz, units (T,)."""

    id: str
    wave: NDArray[np.float32]
    units: NDArray[np.int64]
    phones: Sequence[Segment] | None = None
    text: str | None = None


@dataclass(frozen=True)
class Shown:
    """An image that was searched, and its place from 1 on; picture: PNG, None where there is nothing to see."""

    name: str
    text: str | None
    picture: bytes | None
    place: int
    score: float
    mark: Literal["right", "same words", ""]


@dataclass(frozen=True)
class Search:
    """An utterance, the images that it found first, and its own image, which may be none of these."""

    id: str
    text: str | None
    wave: NDArray[np.float32]
    found: Sequence[Shown]
    own: Shown
    num_images: int


@dataclass(frozen=True)
class Report:
    """All that the page shows. The first system is the model."""

    title: str
    systems: Sequence[System]
    notes: Sequence[str] = ()
    journal: Sequence[Mapping[str, Any]] = ()
    joint: Joint | None = None
    examples: Sequence[Example] = ()
    searches: Sequence[Search] = ()
    corpus: Sequence[Mapping[str, str | int | float]] = ()
    """Rows of the corpus table, all with the same keys."""
    refused: Mapping[str, int] = field(default_factory=dict)
    """Rows that were left out of the corpus, by reason."""
    durations: Sequence[float] = ()
    """Seconds of each evaluated utterance."""
    provenance: Mapping[str, Any] = field(default_factory=dict)


def render(report: Report) -> str:
    """The page as HTML."""
    with matplotlib.rc_context(DRAWING):
        sections = [
            ("Scores", _headlines(report.systems) + _score_tables(MEASURES, report.systems) + PURITIES),
            ("Retrieval", _retrieval(report)),
            ("Training", _training(report.journal)),
            ("Units and phones", _heat_map(report.joint)),
            ("Utterances", _examples(report.examples)),
            ("Corpus", _corpus(report)),
            ("Provenance", _provenance(report.provenance)),
        ]
    notes = "".join(f'<p class="note">{_escape(note)}</p>' for note in report.notes)
    return _page(report.title, notes, sections)


def render_comparison(systems: Sequence[System]) -> str:
    """A page of models side by side, and of how each differs from the first one."""
    tables = _score_tables({**MEASURES, **RETRIEVAL}, systems) + PURITIES
    sections = [("Scores", tables), (f"Differences from {systems[0].name}", _differences(systems))]
    return _page(f"{len(systems)} models compared", "", sections)


def _page(title: str, notes: str, sections: Sequence[tuple[str, str]]) -> str:
    body = "".join(f"<section><h2>{_escape(name)}</h2>{content}</section>" for name, content in sections if content)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main><h1>{_escape(title)}</h1>{notes}{body}</main></body></html>\n"
    )


# ---------------------------------------------------------------------------------------------------- tables


def show_score(measure: Measure, value: float | None) -> str:
    """A score as the table prints it."""
    return "–" if value is None else f"{value:.{measure.decimals}f}"


def show_interval(measure: Measure, system: System) -> str:
    """Where the score lies in 95 of 100 draws of utterances; nothing where that is not known or all draws are alike."""
    if measure.key not in system.estimates:
        return ""
    interval = bootstrap(system.estimates[measure.key])
    if not interval.error > 0:
        return ""
    return f"{interval.low:.{measure.decimals}f} … {interval.high:.{measure.decimals}f}"


def best_systems(measure: Measure, systems: Sequence[System]) -> set[str]:
    """Keys of the systems whose printed score is the best of at least two; none where there is no better, or where
    another system's, of the same utterances, may be as good: the interval of the difference holds zero.

    Where intervals are known of some scores, the others have no best.
    """
    printed = {s.key: show_score(measure, s.scores[measure.key]) for s in systems if measure.key in s.scores}
    estimates = {s.key: s.estimates[measure.key] for s in systems if measure.key in s.estimates}
    is_known = estimates or not any(s.estimates for s in systems)
    if not measure.better or len(set(printed.values())) < 2 or not is_known:
        return set()
    choose = min if measure.better == "lower" else max
    best = choose(printed.values(), key=float)
    first = {key for key, value in printed.items() if value == best}
    for leader, other in product(first & estimates.keys(), estimates.keys() - first):
        if not bootstrap(difference(estimates[leader], estimates[other])).excludes_zero:
            return set()
    return first


def measured(
    groups: Mapping[str, Sequence[Measure]], systems: Sequence[System]
) -> tuple[dict[str, list[Measure]], list[System]]:
    """The groups and measures of which there is a score, and the systems that have one."""
    keys = {key for system in systems for key in system.scores}
    present = {group: [m for m in measures if m.key in keys] for group, measures in groups.items()}
    present = {group: measures for group, measures in present.items() if measures}
    rows = {measure.key for measures in present.values() for measure in measures}
    return present, [system for system in systems if rows & set(system.scores)]


def _headlines(systems: Sequence[System]) -> str:
    ours, baselines = systems[0], systems[1:]
    measures = {m.key: m for groups in (MEASURES, RETRIEVAL) for group in groups.values() for m in group}
    tiles = []
    for key, title in HEADLINES.items():
        if key not in ours.scores:
            continue
        others = ", ".join(
            f"{_escape(s.name)} {show_score(measures[key], s.scores[key])}" for s in baselines if key in s.scores
        )
        tiles.append(
            f'<div class="tile"><div class="what">{_escape(title)}</div>'
            f'<div class="value">{show_score(measures[key], ours.scores[key])}</div>'
            f'<div class="others">{others}</div></div>'
        )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _score_tables(groups: Mapping[str, Sequence[Measure]], systems: Sequence[System]) -> str:
    present, systems = measured(groups, systems)
    head = "".join(f'<th scope="col">{_escape(s.name)}</th>' for s in systems)
    rows = [f'<thead><tr><th scope="col"></th>{head}</tr></thead>']
    for group, measures in present.items():
        rows.append(f'<tbody><tr class="group"><th colspan="{len(systems) + 1}">{_escape(group)}</th></tr>')
        for measure in measures:
            best = best_systems(measure, systems)
            arrow = {"lower": " ↓", "higher": " ↑", "": ""}[measure.better]
            cells = "".join(_score_cell(measure, system, system.key in best) for system in systems)
            rows.append(f'<tr><th scope="row">{_escape(measure.name)}{arrow}</th>{cells}</tr>')
        rows.append("</tbody>")
    legend = "".join(f"<dt>{_escape(s.name)}</dt><dd>{_escape(s.detail)}</dd>" for s in systems)
    return (
        f'<div class="wide"><table class="scores">{"".join(rows)}</table></div>'
        '<p class="small">↓ lower is better, ↑ higher is better; the best of a row is bold. Small numbers are the '
        "interval of 95 % over draws of the utterances; where there are such, a row has a best only if the interval of "
        "its difference to every other holds no zero.</p>"
        f"<dl>{legend}</dl>"
    )


def _differences(systems: Sequence[System]) -> str:
    """What each system's scores are above the first one's, with intervals over draws of the utterances of both."""
    first, others = systems[0], systems[1:]
    rows = []
    for measures in (*MEASURES.values(), *RETRIEVAL.values()):
        for measure in measures:
            if measure.key not in first.estimates:
                continue
            cells = "".join(_difference_cell(measure, first, other) for other in others)
            arrow = {"lower": " ↓", "higher": " ↑", "": ""}[measure.better]
            rows.append(f'<tr><th scope="row">{_escape(measure.name)}{arrow}</th>{cells}</tr>')
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{_escape(other.name)}</th>' for other in others)
    return (
        f'<div class="wide"><table class="scores"><thead><tr><th scope="col"></th>{head}</tr></thead><tbody>'
        f'{"".join(rows)}</tbody></table></div><p class="small">Bold: the interval of 95 % holds no zero. Utterances '
        "are drawn for both models alike. One in twenty comparisons of equal models holds no zero by chance.</p>"
    )


def _difference_cell(measure: Measure, first: System, other: System) -> str:
    if measure.key not in other.estimates:
        return "<td>–</td>"
    apart = difference(other.estimates[measure.key], first.estimates[measure.key])
    interval = bootstrap(apart)
    low, high = (f"{value:+.{measure.decimals}f}" for value in (interval.low, interval.high))
    mark = ' class="best"' if interval.excludes_zero else ""
    return f"<td{mark}>{apart.value:+.{measure.decimals}f}<br><small>{low} … {high}</small></td>"


def _score_cell(measure: Measure, system: System, is_best: bool) -> str:
    interval = show_interval(measure, system)
    text = show_score(measure, system.scores.get(measure.key)) + (f"<br><small>{interval}</small>" if interval else "")
    return f'<td class="best">{text}</td>' if is_best else f"<td>{text}</td>"


PURITIES = '<p class="small">Purities rise with the number of units: compare them at equal numbers only.</p>'


def _retrieval(report: Report) -> str:
    """The table of recalls and what some utterances find; nothing where it was not measured."""
    if not measured(RETRIEVAL, report.systems)[0]:
        return ""
    told = (
        '<p class="small">An image or an utterance is right where the two belong together, or where the same words '
        "are said of both. Of equal scores the wrong one goes first, so a model to which all is the same finds "
        "nothing.</p>"
    )
    return _score_tables(RETRIEVAL, report.systems) + told + "".join(map(_draw_search, report.searches))


def _draw_search(search: Search) -> str:
    """A caption and the images that it finds, side by side; its own, where it comes later, stands apart."""
    is_found = any(shown.mark == "right" for shown in search.found)
    said = f"“{search.text}”" if search.text else "no text"
    place = f"its own image is number {search.own.place} of {search.num_images}"
    images = [_draw_shown(shown) for shown in (*search.found, *(() if is_found else (search.own,)))]
    if not is_found:
        images.insert(-1, '<li class="gap" aria-hidden="true">…</li>')
    wave = _image(_draw_wave(search.wave), f"Waveform of {search.id}")
    return (
        f'<figure class="search"><figcaption><strong>{_escape(said)}</strong> {_escape(search.id)}: {place}'
        f'</figcaption><div class="wave">{wave}</div><ol>{"".join(images)}</ol></figure>'
    )


def _draw_shown(shown: Shown) -> str:
    said = f" of “{shown.text}”" if shown.text else ""
    if shown.picture is None:
        picture = f'<div class="unseen">{_escape(shown.name)}</div>'
    else:
        data = base64.b64encode(shown.picture).decode()
        picture = f'<img alt="Image{_escape(said)}, {_escape(shown.name)}" src="data:image/png;base64,{data}">'
    kind = {"right": "right", "same words": "same", "": "other"}[shown.mark]
    return (
        f'<li class="{kind}">{picture}<div><b>{shown.place}</b> <span class="small">{shown.score:.2f}</span></div>'
        f'<div class="mark">{shown.mark or "–"}</div></li>'
    )


def _draw_wave(wave: NDArray[np.float32]) -> Figure:
    figure = _figure(3, 0.5)
    axes = figure.add_subplot()
    _fill_wave(axes, wave, 400)
    axes.margins(x=0)
    axes.set_axis_off()
    return figure


def _corpus(report: Report) -> str:
    if not report.corpus:
        return '<p class="small">No statistics were given.</p>'
    head = "".join(f'<th scope="col">{_escape(key)}</th>' for key in report.corpus[0])
    rows = "".join(
        "<tr>"
        + "".join(f"<td>{_escape(f'{v:.2f}' if isinstance(v, float) else v)}</td>" for v in row.values())
        + "</tr>"
        for row in report.corpus
    )
    table = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    reasons = "; ".join(f"{reason}: {count}" for reason, count in report.refused.items())
    table += f'<p class="small">Rows refused: {_escape(reasons or "none")}.</p>'
    if not report.durations:
        return table
    figure = _figure(3.8, 2.1)
    axes = figure.add_subplot()
    axes.hist(report.durations, bins=20, color=ACCENT)
    axes.set(xlabel="seconds", ylabel="evaluated utterances")
    image = _image(figure, "Histogram of the durations of the evaluated utterances")
    return f'{table}<div class="panels">{image}</div>'


def _provenance(provenance: Mapping[str, Any]) -> str:
    plain = {k: v for k, v in provenance.items() if not isinstance(v, Mapping | list | tuple)}
    rows = "".join(f"<dt>{_escape(key)}</dt><dd>{_escape(value)}</dd>" for key, value in plain.items())
    whole = _escape(json.dumps(provenance, indent=1, sort_keys=True, default=str))
    summary = "<summary>Everything the model says of itself</summary>"
    return f"<dl>{rows}</dl><details>{summary}<pre>{whole}</pre></details>"


# --------------------------------------------------------------------------------------------------- figures

INK, MUTED, RULE, ACCENT = "#1f2328", "#636c76", "#d8dee4", "#2563a8"
LAST_CURVES = ("learning_rate", "gradient_norm")
LINES = (ACCENT, "#c2571a", "#3c8c5a", "#7a4fa3", "#8a6d1d", "#4a8a99")
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


def _training(journal: Sequence[Mapping[str, Any]]) -> str:
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


def _heat_map(joint: Joint | None) -> str:
    if joint is None or not joint.num_frames:
        return '<p class="small">The evaluated utterances have no phones.</p>'
    shares, phones, _ = sort_by_phone(joint)
    figure = _figure(10, 0.9 + 0.165 * len(phones))
    axes = figure.add_subplot()
    axes.grid(False)
    image = axes.imshow(shares, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set_yticks(range(len(phones)), phones, fontsize=8, color=INK)
    axes.set_xticks([])
    axes.set_xlabel(f"{shares.shape[1]} units that occur, by their most frequent phone")
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.02, pad=0.01, label="share of the unit's frames")
    bar.outline.set_visible(False)
    caption = (
        "Each column is a unit: which phones its frames belong to. A unit that stands for one phone has one dark "
        "cell; a phone spread over many units has a long dark step. Phones are ordered by frequency."
    )
    return _scrolled(_image(figure, "Heat map of units against phones"), caption)


def sort_by_phone(joint: Joint) -> tuple[NDArray[np.float64], list[str], NDArray[np.int64]]:
    """p(phone | unit) (Y, K'), phones by frequency, and the units that occur by their best phone (K',)."""
    rows = np.argsort(-joint.counts.sum(axis=1), kind="stable")
    units = np.flatnonzero(joint.counts.sum(axis=0))
    shares = joint.counts[rows][:, units] / joint.counts.sum(axis=0)[units]
    order = np.lexsort((-shares.max(axis=0), shares.argmax(axis=0)))
    return shares[:, order], [joint.phones[row] for row in rows], units[order]


def _examples(examples: Sequence[Example]) -> str:
    if not examples:
        return '<p class="small">None was drawn.</p>'
    drawn = [
        _scrolled(
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
    return f'<img alt="{_escape(alternative)}" src="data:image/svg+xml;base64,{data}">'


def _scrolled(image: str, caption: str) -> str:
    """An image too wide for a phone, in a frame that scrolls sideways."""
    return f'<figure><div class="wide drawing">{image}</div><figcaption>{_escape(caption)}</figcaption></figure>'


def _escape(value: object) -> str:
    return html.escape(str(value))


STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body {
  margin: 0; background: #fff; color: #1f2328;
  font: 16px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif;
}
main { max-width: 1040px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 12px; }
h2 { font-size: 1.15rem; margin: 40px 0 12px; padding-top: 12px; border-top: 1px solid #d8dee4; }
.note { margin: 0 0 8px; padding: 8px 12px; background: #f3f6f9; border-left: 3px solid #2563a8; }
.small, figcaption, .others, .what, dd { color: #57606a; font-size: .875rem; }
td small { color: #57606a; font-size: .75rem; font-weight: 400; white-space: nowrap; }
.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 12px; margin-bottom: 20px;
}
.tile { border: 1px solid #d8dee4; border-radius: 6px; padding: 12px 14px; }
.value { font-size: 1.75rem; font-weight: 600; line-height: 1.3; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 14px 5px 0; text-align: left; border-bottom: 1px solid #eef1f4; font-weight: 400; }
thead th { font-weight: 600; vertical-align: bottom; }
.scores { width: 100%; }
.scores td, .scores thead th { text-align: right; padding: 5px 0 5px 14px; white-space: nowrap; }
.scores th[scope=row] { min-width: 9.5rem; }
.scores .group th { padding-top: 16px; font-weight: 600; }
.best { font-weight: 700; }
.panels {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 16px;
}
.panels img { width: 100%; max-width: 480px; height: auto; }
.drawing img { width: 100%; min-width: 800px; height: auto; display: block; }
figure { margin: 0 0 20px; }
.search ol { display: flex; flex-wrap: wrap; gap: 10px; margin: 6px 0 0; padding: 0; list-style: none; }
.search li { width: 104px; padding: 3px; border: 1px solid #d8dee4; border-radius: 6px; text-align: center; }
.search li div { line-height: 1.35; }
.search .right { border: 3px solid #2563a8; padding: 1px; }
.search .same { border: 2px dashed #2563a8; padding: 2px; }
.search .gap { width: auto; border: 0; align-self: center; }
.search li img, .unseen { width: 96px; height: 96px; max-width: 100%; }
.search li img { object-fit: contain; background: #f3f6f9; display: block; margin: auto; }
.unseen { margin: auto; overflow: hidden; overflow-wrap: anywhere; font-size: .7rem; color: #57606a; }
.mark { font-size: .875rem; color: #57606a; }
.right .mark, .same .mark { color: #1f4f8a; font-weight: 600; }
.wave img { width: 100%; max-width: 300px; height: auto; display: block; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 12px 0; font-size: .875rem; }
dd { margin: 0; overflow-wrap: anywhere; }
pre { overflow-x: auto; background: #f6f8fa; padding: 12px; font-size: .8rem; }
summary { cursor: pointer; }
@media (max-width: 560px) {
  main { padding: 16px 14px 48px; }
  h1 { font-size: 1.35rem; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 8px; }
  .tile { padding: 8px 10px; }
  .value { font-size: 1.4rem; }
  .search .gap { display: none; }
  table { font-size: .8rem; }
  .scores td, .scores thead th { padding-left: 8px; }
  .scores th[scope=row] { min-width: 7.5rem; padding-right: 0; }
  dl { grid-template-columns: 1fr; }
  dd { margin-bottom: 6px; }
}
"""
