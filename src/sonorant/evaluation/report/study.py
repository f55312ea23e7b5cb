"""A page of studies: what each asks, what was found on each claim, every arm's scores beside the paper's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from sonorant.evaluation.claims import Finding, Weighed
from sonorant.evaluation.measures import Measure, show_score
from sonorant.evaluation.report.page import escape, make_page

ARROWS = {"lower": " ↓", "higher": " ↑", "": ""}
HOW = (
    "A difference is the mean over seeds, of the same utterances; above 0 it is as the claim says. Small numbers are "
    "its interval of 95 %, in which the spread over seeds and the bootstrap over utterances are added. A claim is "
    "supported or contradicted where the interval is on one side of 0, by the score that is named first."
)


def render_studies(studies: Sequence[Weighed]) -> str:
    """The page of one study or of many."""
    title = studies[0].question if len(studies) == 1 else f"{len(studies)} studies"
    overview = "".join(
        f'<tr><th scope="row">{escape(study.question)}</th><td class="word">{escape(study.verdict)}</td></tr>'
        for study in studies
    )
    sections = [("Verdicts", f'<table class="verdicts"><tbody>{overview}</tbody></table>')] if len(studies) > 1 else []
    return make_page(title, [HOW], [*sections, *((f"{s.name}: {s.verdict}", section_of(s)) for s in studies)])


def section_of(study: Weighed) -> str:
    """One study."""
    paper = f" Claimed by: {escape(study.paper)}." if study.paper else ""
    told = f"<p>{escape(study.question)}{paper}</p>" + f'<p class="small">{escape(study.setting)}</p>'
    failed = "".join(f"<dt>{escape(run)}</dt><dd>{escape(why)}</dd>" for run, why in study.failed.items())
    lost = f"<p>Runs without scores:</p><dl>{failed}</dl>" if failed else ""
    return told + finding_table(study) + score_table(study) + lost


def finding_table(study: Weighed) -> str:
    """Each claim by each of its scores."""
    rows, told = [], ""
    for finding in study.findings:
        cells = (
            f"<td>{escape(finding.measure.name + ARROWS[finding.measure.better])}</td>"
            f"<td>{show_signed(finding, finding.value)}<br><small>{show_between(finding)}</small></td>"
            f"<td>{escape(show_seeds(finding))}</td>"
            f'<td class="word">{escape(finding.verdict)}</td>'
        )
        says = finding.says if finding.says != told else ""
        told = finding.says
        rows.append(f'<tr><th scope="row">{escape(says)}</th>{cells}</tr>')
    head = "".join(f'<th scope="col">{name}</th>' for name in ("claim", "by", "better by", "each seed", ""))
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="wide"><table class="claims">{body}</table></div>'


def show_signed(finding: Finding, value: float) -> str:
    """A difference as the table prints it."""
    return f"{value:+.{finding.measure.decimals}f}" if math.isfinite(value) else "–"


def show_between(finding: Finding) -> str:
    """The interval of 95 %, or why there is none."""
    if not finding.by_seed:
        return "no seed"
    if len(finding.by_seed) == 1:
        return "one seed"
    return f"{show_signed(finding, finding.low)} … {show_signed(finding, finding.high)}"


def show_seeds(finding: Finding) -> str:
    """Each seed's difference."""
    return ", ".join(show_signed(finding, value) for _, value in sorted(finding.by_seed.items()))


def score_table(study: Weighed) -> str:
    """Every arm's scores over the seeds, and the paper's."""
    labels = list(dict.fromkeys(label for row in study.published.values() for label in row))
    measures = [m for m in study.measures if any(m.key in scores for scores in study.scores.values())]
    names = [f"{escape(m.name)}{ARROWS[m.better]}" for m in measures]
    head = "".join(f'<th scope="col">{name}</th>' for name in (*names, *(f"paper: {escape(x)}" for x in labels)))
    rows = []
    for arm, title in study.titles.items():
        cells = [show_runs(m, study.scores.get(arm, {}).get(m.key, {})) for m in measures]
        cells += [f"{study.published[arm][x]:g}" if x in study.published.get(arm, {}) else "–" for x in labels]
        rows.append(f'<tr><th scope="row">{escape(title)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    return (
        f'<div class="wide"><table class="scores"><thead><tr><th scope="col"></th>{head}</tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table></div><p class="small">Mean over seeds ± standard deviation.</p>'
    )


def show_runs(measure: Measure, scores: Mapping[int, float]) -> str:
    """Mean ± standard deviation over seeds."""
    values = list(scores.values())
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.{measure.decimals}f}" if len(values) > 1 else ""
    return show_score(measure, statistics.mean(values)) + spread


def as_markdown(studies: Iterable[Weighed]) -> str:
    """The same as tables of text."""
    lines: list[str] = []
    for study in studies:
        lines += [f"## {study.name}: {study.verdict}", "", study.question, ""]
        lines += ["| claim | by | better by | 95 % | verdict |", "|---|---|---|---|---|"]
        for f in study.findings:
            value = show_signed(f, f.value)
            lines.append(f"| {f.says} | {f.measure.name} | {value} | {show_between(f)} | {f.verdict} |")
        measures = [m for m in study.measures if any(m.key in scores for scores in study.scores.values())]
        lines += ["", "| | " + " | ".join(m.name for m in measures) + " |", "|---" * (len(measures) + 1) + "|"]
        for arm, title in study.titles.items():
            cells = [show_runs(m, study.scores.get(arm, {}).get(m.key, {})) for m in measures]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
        lines += ["", *(f"{run}: {why}" for run, why in study.failed.items()), ""]
    return "\n".join(lines)


def as_text(study: Weighed) -> str:
    """What was found on each claim, in lines for a terminal."""
    lines = [f"{study.name}: {study.verdict}"]
    for f in study.findings:
        value = show_signed(f, f.value)
        lines.append(f"  {f.says}, by {f.measure.name}: {value} ({show_between(f)}): {f.verdict}")
    return "\n".join(lines)
