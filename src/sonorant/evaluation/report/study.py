"""A page of studies: what each asks, what was found on each claim, every arm's scores beside the paper's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from sonorant.evaluation.claims import Finding, Verdict, Weighed
from sonorant.evaluation.measures import Measure, show_score
from sonorant.evaluation.report.page import escape, make_page

ARROWS = {"lower": "\N{NO-BREAK SPACE}↓", "higher": "\N{NO-BREAK SPACE}↑", "": ""}
HOW = (
    "A difference is the mean over seeds, of the same utterances; above 0 it is as the claim says. Small numbers are "
    "its interval of 95 %, in which the spread over seeds and the bootstrap over utterances are added. A claim is "
    "supported or contradicted where the interval is on one side of 0, by the score that is named first."
)


def render_studies(studies: Sequence[Weighed]) -> str:
    """The page of one study or of many."""
    title = studies[0].question if len(studies) == 1 else f"{len(studies)} studies"
    overview = "".join(
        f'<tr><th scope="row"><a href="#{escape(study.name)}">{escape(study.question)}</a></th>'
        f"<td>{show_verdict(study.verdict)}</td></tr>"
        for study in studies
    )
    sections = [("Verdicts", f'<table class="verdicts"><tbody>{overview}</tbody></table>')] if len(studies) > 1 else []
    return make_page(title, [HOW], [*sections, *((f"{s.name}: {s.verdict}", section_of(s)) for s in studies)])


def section_of(study: Weighed) -> str:
    """One study."""
    paper = f" Claimed by: {escape(study.paper)}." if study.paper else ""
    told = f'<p id="{escape(study.name)}">{escape(study.question)}{paper}</p>'
    told += f'<p class="small">{escape(study.setting)}</p>'
    failed = "".join(f"<dt>{escape(run)}</dt><dd>{escape(why)}</dd>" for run, why in study.failed.items())
    lost = f"<p>Runs without scores:</p><dl>{failed}</dl>" if failed else ""
    return told + finding_table(study) + score_table(study) + lost


def finding_table(study: Weighed) -> str:
    """Each claim by each of its scores."""
    body = ""
    for (says, *_), claims in groupby(study.findings, key=lambda finding: (finding.says, finding.better, finding.than)):
        rows = [
            f'<tr><th scope="row">{escape(finding.measure.name + ARROWS[finding.measure.better])}</th>'
            f"<td>{show_verdict(finding.verdict)}</td>"
            f"<td>{show_signed(finding, finding.value)}<br><small>{show_between(finding)}</small></td>"
            f"<td>{escape(show_seeds(finding))}</td></tr>"
            for finding in claims
        ]
        told = f'<tr class="group"><th scope="rowgroup" colspan="4">{escape(says)}</th></tr>'
        body += f"<tbody>{told}{''.join(rows)}</tbody>"
    head = "".join(f'<th scope="col">{name}</th>' for name in ("claim, by score", "shown", "better by", "each seed"))
    body = f"<thead><tr>{head}</tr></thead>{body}"
    return f'<div class="wide"><table class="claims">{body}</table></div>'


def show_verdict(verdict: Verdict) -> str:
    """The word, in a colour of its own."""
    return f'<span class="word {verdict.replace(" ", "-")}">{verdict}</span>'


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
        f'<div class="wide"><table class="scores arms"><thead><tr><th scope="col"></th>{head}</tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table></div><p class="small">Mean over seeds ± standard deviation.</p>'
    )


def show_runs(measure: Measure, scores: Mapping[int, float]) -> str:
    """Mean ± standard deviation over seeds; nothing where one is not a number."""
    values = list(scores.values())
    if not values or not all(map(math.isfinite, values)):
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
            lines.append(row_of([f.says, f.measure.name, show_signed(f, f.value), show_between(f), f.verdict]))
        measures = [m for m in study.measures if any(m.key in scores for scores in study.scores.values())]
        lines += ["", row_of(["", *(m.name for m in measures)]), "|---" * (len(measures) + 1) + "|"]
        for arm, title in study.titles.items():
            cells = [show_runs(m, study.scores.get(arm, {}).get(m.key, {})) for m in measures]
            lines.append(row_of([title, *cells]))
        lines += ["", *(f"{run}: {why}" for run, why in study.failed.items()), ""]
    return "\n".join(lines)


def row_of(cells: Sequence[str]) -> str:
    """A row of a table of Markdown."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def as_text(study: Weighed) -> str:
    """What was found on each claim, in lines for a terminal."""
    lines = [f"{study.name}: {study.verdict}"]
    for f in study.findings:
        value = show_signed(f, f.value)
        lines.append(f"  {f.says}, by {f.measure.name}: {value} ({show_between(f)}): {f.verdict}")
    return "\n".join(lines)
