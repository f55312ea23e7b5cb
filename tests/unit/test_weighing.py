"""From reports to findings: who is who, which score counts, what is written and read, and the page that shows it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sonorant.artifacts import write_record
from sonorant.config.study import StudyConfig
from sonorant.evaluation.claims import Weighed
from sonorant.evaluation.estimates import write_estimates
from sonorant.evaluation.intervals import ratio_of_sums
from sonorant.evaluation.measures import System
from sonorant.evaluation.report.study import as_markdown, as_text, render_studies
from sonorant.steps.weigh import FILE, read_findings, weighed_of, write_findings

Write = Callable[..., Path]
STUDY: dict[str, Any] = {
    "question": "Is <a> better & cheaper?",
    "paper": "Somebody (2020)",
    "arms": {"a": {"title": "the <a> arm"}, "b": {}},
    "measures": ["probe_per", "pnmi", "training_perplexity"],
    "claims": [
        {"says": "a reads | more", "better": "a", "than": "b", "by": ["probe_per", "pnmi"]},
        {"says": "b is told by more", "better": "b", "than": "a", "by": ["pnmi"]},
    ],
    "published": {"a": {"PER": 3.5}},
}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A report of a run: its phone error rate, known by utterance, and other scores."""

    def report(label: str, errors: list[float] | None = None, perplexity: float | None = None, **others: float) -> Path:
        folder = tmp_path / f"report-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        estimates = {}
        if errors is not None:
            estimates = {"probe_per": ratio_of_sums({f"u{row}": (value, 1.0) for row, value in enumerate(errors)})}
        scores = {**{name: one.value for name, one in estimates.items()}, **others}
        (folder / "metrics.json").write_text(json.dumps({"model": scores}))
        write_estimates(folder, [System("model", "this model", "", scores, estimates)])
        last = "" if perplexity is None else str(perplexity)
        (folder / "training.csv").write_text(f"update,codebooks/perplexity\n25,99.0\n50,{last}\n")
        lineage = {
            "1": {"step": "pretrain", "config": {"num_updates": 50}}, "2": {"step": "prepare", "config": {}},
        }  # fmt: skip
        write_record(folder, {"config": {"label": label, "split": "test"}, "lineage": lineage})
        return folder

    return report


def weighed(reports: list[Path], failed: dict[str, str] | None = None, **changes: Any) -> Weighed:
    return weighed_of(StudyConfig.model_validate({**STUDY, **changes}), "it", reports, failed or {})


def both_arms(write: Write) -> list[Path]:
    """Three seeds of each: `a` makes a tenth fewer errors, and has the higher PNMI."""
    reports = []
    for seed in range(3):
        reports.append(write(f"a/{seed}", [0.2, 0.4 + 0.01 * seed], pnmi=0.5 + 0.01 * seed))
        reports.append(write(f"b/{seed}", [0.3, 0.5], perplexity=7.0 + seed, pnmi=0.3))
    return reports


def test_reports_are_told_apart_by_their_labels(write: Write) -> None:
    found = weighed(list(reversed(both_arms(write))))
    assert found.scores["a"]["probe_per"] == pytest.approx({0: 0.3, 1: 0.305, 2: 0.31})
    assert found.scores["b"] == {
        "probe_per": pytest.approx({0: 0.4, 1: 0.4, 2: 0.4}),
        "pnmi": {0: 0.3, 1: 0.3, 2: 0.3},
        "training_perplexity": {0: 7.0, 1: 8.0, 2: 9.0},
    }
    assert "training_perplexity" not in found.scores["a"], "the last row alone counts, and says nothing"
    assert list(found.titles.values()) == ["the <a> arm", "b"]
    assert found.setting == "pretrain: 50 updates"
    assert [(f.better, f.measure.key, f.verdict) for f in found.findings] == [
        ("a", "probe_per", "supports"),
        ("a", "pnmi", "supports"),
        ("b", "pnmi", "contradicts"),
    ]
    assert found.verdict == "cannot tell", "one claim each way"


def test_the_first_score_of_a_claim_decides(write: Write) -> None:
    claim = STUDY["claims"][0]
    reports = both_arms(write)
    by_errors = weighed(reports, claims=[{**claim, "by": ["probe_per", "training_perplexity"]}])
    assert [f.verdict for f in by_errors.findings] == ["supports", "cannot tell"]
    assert by_errors.verdict == "supports"
    by_codes = weighed(reports, claims=[{**claim, "by": ["training_perplexity", "probe_per"]}])
    assert by_codes.verdict == "cannot tell"
    # Twice the same words, each decided by a score of its own.
    twice = [{**claim, "by": ["probe_per"]}, {**claim, "by": ["training_perplexity"]}]
    assert weighed(reports, claims=twice).verdict == "cannot tell"


def test_of_two_reports_of_a_run_the_first_has_the_say(write: Write) -> None:
    here = [write(f"{arm}/{seed}", pnmi=value) for seed in range(2) for arm, value in (("a", 0.5), ("b", 0.4))]
    there = [
        write(f"{arm}/{seed}", [value, value], pnmi=0.0)
        for seed in range(2)
        for arm, value in (("a", 0.2 + 0.01 * seed), ("b", 0.6))
    ]
    found = weighed([*here, *there])
    assert found.scores["a"] == {"probe_per": pytest.approx({0: 0.2, 1: 0.21}), "pnmi": {0: 0.5, 1: 0.5}}
    assert {f.measure.key for f in found.findings if f.by_seed} == {"probe_per", "pnmi"}
    assert weighed([*there, *here]).scores["a"]["pnmi"] == {0: 0.0, 1: 0.0}


@pytest.mark.parametrize("label", ["c/0", "a", "", "a/b", "a/-1"])
def test_a_report_of_somebody_else_is_refused(write: Write, label: str) -> None:
    with pytest.raises(ValueError, match=r"found the label .*, wanted arm/seed with an arm of \['a', 'b'\]") as caught:
        weighed([*both_arms(write), write(label, [0.1, 0.2])])
    assert "\n" not in str(caught.value)


def test_what_is_written_is_read(write: Write, tmp_path: Path) -> None:
    reports = [*both_arms(write)[:3], write("b/1", [0.1, 0.1], pnmi=math.nan)]
    found = weighed(reports, {"a/2": "pretrain: found a loss that is not finite"})
    assert math.isnan(found.findings[1].value)
    write_findings(tmp_path, found)
    text = (tmp_path / FILE).read_text()

    def no_number(name: str) -> float:
        raise AssertionError(f"{name} is no JSON")

    assert json.loads(text, parse_constant=no_number)["verdict"] == "cannot tell"
    again = read_findings(tmp_path)
    # nan is unequal to itself, but is shown alike.
    assert repr(again) == repr(replace(found, measures=list(found.measures), failed=dict(found.failed)))
    write_findings(tmp_path, again)
    assert (tmp_path / FILE).read_text() == text
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [FILE]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"measures": [{}]}', '{"measures":[],"findings":[],"scores":{}}'])
def test_findings_of_something_else_are_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ValueError, match=r"found no findings .*, wanted those of this version: run") as caught:
        read_findings(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_page_says_all_of_it(write: Write) -> None:
    found = weighed(both_arms(write), {"b/7": "pretrain: found <nothing>"})
    page = render_studies([found])
    assert "<h1>Is &lt;a&gt; better &amp; cheaper?</h1>" in page
    for text in ("Somebody (2020)", "pretrain: 50 updates", "the &lt;a&gt; arm", "paper: PER", ">3.5<", "found &lt;n"):
        assert text in page, text
    assert re.search(
        r'colspan="4">a reads \| more</th></tr><tr><th scope="row">phone error rate, linear CTC\s↓</th>'
        r'<td><span class="word supports">supports</span></td><td>\+0\.095<br><small>\+0\.\d+ … ',
        page,
    )
    assert "0.305 ± 0.005" in page
    assert page.count('class="word supports"') == 2
    assert page.count('class="word contradicts"') == 1
    assert "http" not in page, "readable without a network"
    assert 'class="verdicts"' not in page, "of one study there is no overview"
    both = render_studies([found, replace(found, name="other", question="And this?")])
    assert "<h1>2 studies</h1>" in both
    assert re.search(r'class="verdicts".*?Is &lt;a.*?And this\?', both)


def test_what_is_not_known_is_not_a_number_on_the_page(write: Write) -> None:
    reports = [write("a/0", [0.1, 0.2], pnmi=math.nan), write("b/0", [0.3, 0.4], pnmi=0.2)]
    found = weighed(reports)
    for shown in (render_studies([found]), as_markdown([found]), as_text(found)):
        assert "one seed" in shown
        assert not re.search(r"\b(nan|inf)\b", shown)
        assert "+0.200" in shown
    none = weighed([write("a/0", [0.1, 0.2])])
    for shown in (render_studies([none]), as_markdown([none]), as_text(none)):
        assert "no seed" in shown
        assert not re.search(r"\b(nan|inf)\b", shown)


def test_markdown_has_its_columns(write: Write) -> None:
    lines = as_markdown([weighed(both_arms(write))]).splitlines()
    tables = [line for line in lines if line.startswith("|")]
    claims = [line for line in tables if "reads" in line or "told" in line]
    assert len(claims) == 3
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 6 for line in claims)
    assert "## it: cannot tell" in lines
