"""The tables of a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sonorant.evaluation.intervals import bootstrap, difference
from sonorant.evaluation.measures import (
    EVERY_MEASURE,
    HEADLINES,
    MEASURES,
    RETRIEVAL,
    Measure,
    System,
    best_systems,
    measured,
    show_interval,
    show_score,
)
from sonorant.evaluation.report.drawings import draw_durations, show_search
from sonorant.evaluation.report.page import escape
from sonorant.evaluation.report.parts import Report

PURITIES = '<p class="small">Purities rise with the number of units: compare them at equal numbers only.</p>'


def headline_tiles(systems: Sequence[System]) -> str:
    """The first system's most telling scores, large, with the others' beneath."""
    ours, baselines = systems[0], systems[1:]
    tiles = []
    for key, title in HEADLINES.items():
        if key not in ours.scores:
            continue
        others = ", ".join(
            f"{escape(s.name)} {show_score(EVERY_MEASURE[key], s.scores[key])}" for s in baselines if key in s.scores
        )
        tiles.append(
            f'<div class="tile"><div class="what">{escape(title)}</div>'
            f'<div class="value">{show_score(EVERY_MEASURE[key], ours.scores[key])}</div>'
            f'<div class="others">{others}</div></div>'
        )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def score_tables(groups: Mapping[str, Sequence[Measure]], systems: Sequence[System]) -> str:
    """The systems' scores side by side, those that nobody has left out, and a legend of the systems."""
    present, systems = measured(groups, systems)
    head = "".join(f'<th scope="col">{escape(s.name)}</th>' for s in systems)
    rows = [f'<thead><tr><th scope="col"></th>{head}</tr></thead>']
    for group, measures in present.items():
        rows.append(f'<tbody><tr class="group"><th colspan="{len(systems) + 1}">{escape(group)}</th></tr>')
        for measure in measures:
            best = best_systems(measure, systems)
            arrow = {"lower": " ↓", "higher": " ↑", "": ""}[measure.better]
            cells = "".join(_score_cell(measure, system, system.key in best) for system in systems)
            rows.append(f'<tr><th scope="row">{escape(measure.name)}{arrow}</th>{cells}</tr>')
        rows.append("</tbody>")
    legend = "".join(f"<dt>{escape(s.name)}</dt><dd>{escape(s.detail)}</dd>" for s in systems)
    return (
        f'<div class="wide"><table class="scores">{"".join(rows)}</table></div>'
        '<p class="small">↓ lower is better, ↑ higher is better; the best of a row is bold. Small numbers are the '
        "interval of 95 % over draws of the utterances; where there are such, a row has a best only if the interval of "
        "its difference to every other holds no zero.</p>"
        f"<dl>{legend}</dl>"
    )


def _score_cell(measure: Measure, system: System, is_best: bool) -> str:
    interval = show_interval(measure, system)
    text = show_score(measure, system.scores.get(measure.key)) + (f"<br><small>{interval}</small>" if interval else "")
    return f'<td class="best">{text}</td>' if is_best else f"<td>{text}</td>"


def difference_table(systems: Sequence[System]) -> str:
    """What each system's scores are above the first one's, with intervals over draws of the utterances of both."""
    first, others = systems[0], systems[1:]
    rows = []
    for measures in (*MEASURES.values(), *RETRIEVAL.values()):
        for measure in measures:
            if measure.key not in first.estimates:
                continue
            cells = "".join(_difference_cell(measure, first, other) for other in others)
            arrow = {"lower": " ↓", "higher": " ↑", "": ""}[measure.better]
            rows.append(f'<tr><th scope="row">{escape(measure.name)}{arrow}</th>{cells}</tr>')
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{escape(other.name)}</th>' for other in others)
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


def retrieval_table(report: Report) -> str:
    """The table of recalls and what some utterances find; nothing where it was not measured."""
    if not measured(RETRIEVAL, report.systems)[0]:
        return ""
    told = (
        '<p class="small">An image or an utterance is right where the two belong together, or where the same words '
        "are said of both. Of equal scores the wrong one goes first, so a model to which all is the same finds "
        "nothing.</p>"
    )
    return score_tables(RETRIEVAL, report.systems) + told + "".join(map(show_search, report.searches))


def corpus_table(report: Report) -> str:
    """How much speech of each source and split there is, what was refused, and how long the evaluated is."""
    if not report.corpus:
        return '<p class="small">No statistics were given.</p>'
    head = "".join(f'<th scope="col">{escape(key)}</th>' for key in report.corpus[0])
    rows = "".join(
        "<tr>"
        + "".join(f"<td>{escape(f'{v:.2f}' if isinstance(v, float) else v)}</td>" for v in row.values())
        + "</tr>"
        for row in report.corpus
    )
    table = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    reasons = "; ".join(f"{reason}: {count}" for reason, count in report.refused.items())
    table += f'<p class="small">Rows refused: {escape(reasons or "none")}.</p>'
    if not report.durations:
        return table
    return f'{table}<div class="panels">{draw_durations(report.durations)}</div>'


def provenance_list(provenance: Mapping[str, Any]) -> str:
    """What the model says of itself: plain values at once, everything on a click."""
    plain = {k: v for k, v in provenance.items() if not isinstance(v, Mapping | list | tuple)}
    rows = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in plain.items())
    whole = escape(json.dumps(provenance, indent=1, sort_keys=True, default=str))
    summary = "<summary>Everything the model says of itself</summary>"
    return f"<dl>{rows}</dl><details>{summary}<pre>{whole}</pre></details>"
