"""`sonorant study` as a process: from nothing to its page, again for nothing, stopped, killed, with arms that fail."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from sonorant.steps.weigh import read_findings
from tests.tiny import pretrain_values, with_changes

# Fourteen steps, a process each: on a busy machine the imports alone take minutes.
pytestmark = pytest.mark.timeout(900)
PROBE = {"num_updates": 10, "learning_rate": 0.01, "batch_seconds": 20.0, "hidden_dim": 32, "evaluate_every": 10}
PARAMS: dict[str, Any] = {
    "prepare": {
        "sources": [
            {
                "kind": "synthetic",
                "num_utterances": 24,
                "num_speakers": 6,
                "voice": "tones",
                "dev_share": 0.2,
                "test_share": 0.3,
            }
        ],
        "num_workers": 1,
    },
    "cluster": {"num_units": 6, "num_restarts": 1, "num_workers": 1},
    "pretrain": pretrain_values(),
    "publish": {"num_units": 6, "num_restarts": 1, "layer": 2},
    "evaluate": {
        "baselines": [],
        "num_examples": 0,
        "max_changed": 0,
        "abx_max_items": 2,
        "abx_max_speakers": 1,
        "num_workers": 1,
        "probes": {"phones": PROBE},
    },
}
UNITS_ALONE = {"pretrain": {"phases": [{"weights": {"units": 1.0}}]}}
STUDY: dict[str, Any] = {
    "question": "Does a teacher help?",
    "seeds": [0, 1],
    "arms": {"units": {"title": "units alone", "params": UNITS_ALONE}, "both": {"title": "units and teacher"}},
    "measures": ["probe_per", "pnmi", "abx_across_any"],
    "claims": [{"says": "A teacher helps", "better": "both", "than": "units", "by": ["probe_per", "pnmi"]}],
}
WORDS = ("it.yaml", "--config", "params.yaml", "--folder", "out")
DIVERGING = {"pretrain": {"optim": {"learning_rate": 1e30}}}
ENDLESS = {"pretrain": {"num_updates": 1_000_000}}
Complete = subprocess.CompletedProcess[str]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "sonorant", "study", *words]


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("SONORANT_TRACEBACK", "SONORANT_RUNS")}
    return {**kept, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"}


def run(folder: Path, *words: str) -> Complete:
    """The command in a folder, to its end."""
    return subprocess.run(
        command(*words), cwd=folder, env=environment(), capture_output=True, text=True, check=False, timeout=800
    )


@contextmanager
def begun(folder: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """The command in a folder, as a process that leads a group, as a terminal starts it."""
    process = subprocess.Popen(
        command(*words), cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(folder: Path, pattern: str, process: subprocess.Popen[str], count: int = 1) -> None:
    """Until such a path lies in so many folders below this one."""
    deadline = time.monotonic() + 300
    while len({path.parent for path in folder.glob(pattern)}) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def at_work_in(folder: Path) -> list[int]:
    """Processes that were started in a folder and are there still."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (path / "cwd").resolve() == folder and "State:\tZ" not in (path / "status").read_text():
                found.append(int(path.name))
        except OSError:
            continue
    return found


def write(folder: Path, **changes: Any) -> None:
    """The study's file and its parameters."""
    (folder / "it.yaml").write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))
    (folder / "params.yaml").write_text(yaml.safe_dump(PARAMS, sort_keys=False))


def contents(folder: Path) -> dict[str, bytes]:
    """What a study has made and says: the artifacts' records, which hold their digests, and its findings."""
    paths = [*folder.glob("out/work/*/artifact.json"), *folder.glob("out/findings/*/*"), *folder.glob("out/study.*")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Complete]:
    """A study that nobody disturbed, and what it said."""
    folder = tmp_path_factory.mktemp("whole")
    write(folder)
    answer = run(folder, *WORDS, "--jobs", "2")
    assert answer.returncode == 0, answer.stderr
    return folder, answer


@pytest.fixture
def copy(whole: tuple[Path, Complete], tmp_path: Path) -> Path:
    """A folder like it, to change."""
    folder = tmp_path / "copy"
    shutil.copytree(whole[0], folder)
    return folder


@pytest.fixture
def begin(copy: Path) -> Path:
    """A folder where speech and units lie and nothing else is made yet."""
    for path in copy.glob("out/work/*"):
        if not path.name.startswith(("prepare-", "cluster-")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(copy / "out" / "findings")
    for path in copy.glob("out/study.*"):
        path.unlink()
    return copy


def test_a_study_comes_to_its_page_and_is_not_run_again(whole: tuple[Path, Complete]) -> None:
    folder, answer = whole
    out = folder / "out"
    assert "study: 14 pieces of work, 0 of them done before" in answer.stderr
    done = re.findall(r"^study: \[(\d+)/14, about \d+ min left\] [a-z]+-[0-9a-f]{12}: \d+ s$", answer.stderr, re.M)
    assert list(map(int, done)) == list(range(1, 15))
    assert re.search(r"^it: (supports|contradicts|cannot tell)$", answer.stdout, re.M)
    assert answer.stdout.endswith("page: out/study.html\n")
    assert list(out.glob("runs/*")) == [], "finished work needs no checkpoints"

    weighed = read_findings(out / "findings" / "it")
    assert [(f.better, f.than, f.measure.key) for f in weighed.findings] == [
        ("both", "units", "probe_per"),
        ("both", "units", "pnmi"),
    ]
    assert weighed.setting == "pretrain: 6 updates"
    assert weighed.failed == {}
    records = {path: json.loads((path / "artifact.json").read_text()) for path in out.glob("work/evaluate-*/")}
    reports = {record["config"]["label"]: path for path, record in records.items()}
    assert set(reports) == {"units/0", "units/1", "both/0", "both/1"}
    for label, report in reports.items():
        arm, seed = label.split("/")
        scores = json.loads((report / "metrics.json").read_text())["model"]
        assert {k: weighed.scores[arm][k][int(seed)] for k in STUDY["measures"]} == {
            k: scores[k] for k in STUDY["measures"]
        }
    for finding in weighed.findings:
        sign = -1 if finding.measure.key == "probe_per" else 1
        ours, theirs = (weighed.scores[arm][finding.measure.key] for arm in ("both", "units"))
        assert finding.by_seed == pytest.approx({s: sign * (ours[s] - theirs[s]) for s in (0, 1)})
        assert finding.low < finding.value < finding.high
    seeds = {label: json.loads((path / "metrics.json").read_text()) for label, path in reports.items()}
    assert len({json.dumps(scores) for scores in seeds.values()}) == 4, "arms and seeds are different models"

    page, text = (out / "study.html").read_text(), (out / "study.md").read_text()
    for said in ("Does a teacher help?", "units and teacher", "A teacher helps", weighed.verdict):
        assert said in page
        assert said in text

    before = {path: path.stat().st_mtime_ns for path in out.glob("work/**/*")}
    was = contents(folder)
    again = run(folder, *WORDS)
    assert again.returncode == 0
    assert again.stderr == "study: 14 pieces of work, 14 of them done before\n"
    assert again.stdout == answer.stdout
    assert {path: path.stat().st_mtime_ns for path in out.glob("work/**/*")} == before
    assert contents(folder) == was


def test_an_arm_that_fails_is_named_and_the_others_are_weighed(copy: Path, whole: tuple[Path, Complete]) -> None:
    arms = {**STUDY["arms"], "fast": {"title": "too fast", "params": DIVERGING}}
    claims = [*STUDY["claims"], {"says": "Haste helps", "better": "fast", "than": "both", "by": ["pnmi"]}]
    write(copy, arms=arms, claims=claims)
    answer = run(copy, *WORDS, "--seed", "1")
    assert answer.returncode == 0, answer.stderr
    # What would be made of an encoder that cannot be trained is not tried.
    first, second = answer.stderr.splitlines()
    assert first == "study: 11 pieces of work, 8 of them done before"
    assert re.fullmatch(r"study: \[1/3, about 0 min left\] pretrain-\w+: \d+ s, failed: pretrain: found .*", second)
    before, after = (read_findings(folder / "out" / "findings" / "it") for folder in (whole[0], copy))
    assert after.scores == {
        **{arm: {key: {1: runs[1]} for key, runs in own.items()} for arm, own in before.scores.items()}, "fast": {},
    }  # fmt: skip
    assert [finding.by_seed for finding in after.findings] == [
        *({1: finding.by_seed[1]} for finding in before.findings), {},
    ]  # fmt: skip
    assert {finding.verdict for finding in after.findings} == {"cannot tell"}
    why = after.failed["fast/1"]
    assert after.failed == {"fast/1": second.partition("failed: ")[2]}
    assert f"<dt>fast/1</dt><dd>{html.escape(why)}</dd>" in (copy / "out" / "study.html").read_text()
    assert f"fast/1: {why}" in (copy / "out" / "study.md").read_text()


def test_where_every_run_fails_it_is_said_on_one_line(begin: Path) -> None:
    write(begin, arms={"units": {"params": DIVERGING}, "both": {"params": DIVERGING}})
    answer = run(begin, *WORDS, "--seed", "0")
    assert (answer.returncode, answer.stdout) == (1, "")
    *progress, last = answer.stderr.splitlines()
    assert len(progress) == 2, "equal arms are one piece of work"
    assert re.fullmatch(
        r"study: found no run that came through of it \(pretrain: found .*\): mend that", last
    ), answer.stderr
    assert not (begin / "out" / "study.html").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "study: found no study nothing, wanted a file or one of []: check it, or go to the checkout"),
        (["it.yaml", "--set", "prepare.seeds=1"], "study: arm units: prepare.seeds: found an unknown key"),
        (["it.yaml", "sub/it.yaml"], "study: found two studies of the name it, wanted"),
        (["bad.yaml"], "study: bad.yaml: measures: found the score beauty, wanted one of abx_across_any, "),
    ],
)
def test_what_is_wrong_is_said_on_one_line_before_anything_is_run(
    tmp_path: Path, words: list[str], message: str
) -> None:
    write(tmp_path, measures=["beauty"])
    (tmp_path / "it.yaml").rename(tmp_path / "bad.yaml")
    write(tmp_path)
    (tmp_path / "sub").mkdir()
    shutil.copy(tmp_path / "it.yaml", tmp_path / "sub")
    answer = run(tmp_path, *words, *WORDS[1:])
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr.startswith(message)
    assert answer.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_is_told_to_stop_leaves_no_step_behind(begin: Path, number: signal.Signals) -> None:
    arms = {name: {"params": with_changes(arm.get("params", {}), ENDLESS)} for name, arm in STUDY["arms"].items()}
    write(begin, arms=arms)
    with begun(begin, *WORDS, "--jobs", "2", "--seed", "0") as process:
        wait_for(begin, "out/runs/*/*/checkpoint-*", process, count=2)
        assert len(at_work_in(begin)) >= 3
        os.killpg(process.pid, number)
        said, told = process.communicate(timeout=100)
    assert process.returncode == 130
    assert at_work_in(begin) == []
    assert said == ""
    assert told.splitlines()[1:] == [
        "study: interrupted; finished runs are kept in its --folder; run the same command again to go on"
    ]
    logs = [path.read_text() for path in begin.glob("out/logs/pretrain-*.log")]
    assert sum("stopped at update" in log for log in logs) == 2, "both have written where they were"


@pytest.mark.slow
def test_a_killed_study_goes_on_and_finds_the_same(begin: Path, whole: tuple[Path, Complete]) -> None:
    moments = [
        "out/runs/pretrain-*/*/checkpoint-*",
        "out/work/.publish-*.partial",
        "out/work/.evaluate-*.partial",
        "out/work/evaluate-*/artifact.json",
    ]
    for moment in moments:
        with begun(begin, *WORDS, "--jobs", "1") as process:
            wait_for(begin, moment, process)
            process.send_signal(signal.SIGKILL)
            process.wait()
    answer = run(begin, *WORDS, "--jobs", "2")
    assert answer.returncode == 0, answer.stderr
    assert contents(begin) == contents(whole[0])
    assert at_work_in(begin) == []
