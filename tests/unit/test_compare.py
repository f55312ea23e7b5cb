"""Models side by side, from what was written of each."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sonorant.artifacts import write_record
from sonorant.cli import make_app
from sonorant.evaluation.estimates import FILE, write_estimates
from sonorant.evaluation.intervals import ratio_of_sums
from sonorant.evaluation.measures import System
from sonorant.steps.comparing import compare_reports, read_system

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A report of a model of which ABX errors and PNMI are known, the first by utterance."""

    def report(name: str, errors: list[float], first: int = 0) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        estimate = ratio_of_sums({f"u{first + row:02}": (value, 1.0) for row, value in enumerate(errors)})
        scores = {"abx_across_any": estimate.value, "pnmi": 0.5}
        (folder / "metrics.json").write_text(json.dumps({"model": scores, "mfcc": {"pnmi": 0.1}}))
        write_estimates(folder, [System("model", "this model", "", scores, {"abx_across_any": estimate})])
        write_record(folder, {"config": {"split": "test", "source": "digits"}})
        return folder

    return report


HARD = np.random.default_rng(0).uniform(0.1, 0.4, 30)


def test_what_is_written_is_read(write: Write) -> None:
    folder = write("a", HARD.tolist())
    system = read_system(folder)
    assert system.scores == {"abx_across_any": pytest.approx(HARD.mean()), "pnmi": 0.5}
    assert system.detail == "split test of digits"
    influence = system.estimates["abx_across_any"].influence
    assert list(influence.values()) == pytest.approx((HARD - HARD.mean()) / 30)
    again = write("b", HARD.tolist())
    assert (again / FILE).read_bytes() == (folder / FILE).read_bytes()  # no time in it


def test_a_paired_difference_is_seen_where_intervals_overlap(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = [write("plain", HARD.tolist()), write("better", (HARD - 0.01).tolist())]
    page = tmp_path / "pages" / "comparison.html"
    compare_reports(reports, page)
    text = page.read_text()
    assert "2 models compared" in text
    assert re.search(r'<td class="best">-0\.010<br><small>-0\.010 … -0\.010</small></td>', text)
    mean = (HARD - 0.01).mean()
    assert re.search(rf'<td class="best">{mean:.3f}<br><small>', text)
    assert "http" not in text  # readable without a network
    said = capsys.readouterr().out
    assert f"page: {page}" in said
    assert "ABX error of features" in said


def test_equal_models_have_no_best(write: Write, tmp_path: Path) -> None:
    noise = np.random.default_rng(1).normal(0, 0.05, 30)
    compare_reports(
        [write("a", HARD.tolist()), write("b", (HARD + noise - noise.mean() + 0.002).tolist())], tmp_path / "page.html"
    )
    assert 'class="best"' not in (tmp_path / "page.html").read_text()


def test_models_of_other_utterances_are_refused(write: Write, tmp_path: Path) -> None:
    reports = [write("a", HARD.tolist()), write("b", HARD.tolist(), first=1)]
    with pytest.raises(
        ValueError, match=r"found abx_across_any of .*b on other utterances .*\(2 are of one only\)"
    ) as error:
        compare_reports(reports, tmp_path / "page.html")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "page.html").exists()


def damage_scores(folder: Path) -> None:
    (folder / "metrics.json").write_text("[]")


def damage_estimates(folder: Path) -> None:
    (folder / FILE).write_bytes(b"PK and nothing")


def lose_estimates(folder: Path) -> None:
    (folder / FILE).unlink()


def lose_record(folder: Path) -> None:
    (folder / "artifact.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_scores, "metrics.json: found no scores of a model"),
        (damage_estimates, "estimates.npz: found no estimates"),
        (lose_estimates, "estimates.npz: found no estimates"),
        (lose_record, "found a folder without artifact.json, wanted an artifact"),
    ],
)
def test_a_broken_report_is_one_line(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], message: str
) -> None:
    reports = [write("a", HARD.tolist()), write("b", HARD.tolist())]
    damage(reports[1])
    with pytest.raises(SystemExit) as ended:
        make_app()(["compare", *map(str, reports), "--page", str(tmp_path / "page.html")])
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("compare: ")
    assert message in said


def test_one_report_is_nothing_to_compare(write: Write, tmp_path: Path) -> None:
    folder = write("a", HARD.tolist())
    with pytest.raises(ValueError, match="found 1 report, wanted two at least"):
        compare_reports([folder, folder], tmp_path / "page.html")
