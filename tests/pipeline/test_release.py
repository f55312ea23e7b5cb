"""From a measured model to one in service: the gate, the release, and who is told."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kfp import dsl, local

from components import operations
from sonorant.artifacts import digest_folder, is_absent, write_record
from sonorant.evaluation.estimates import FILE, write_estimates
from sonorant.evaluation.intervals import Estimate
from sonorant.evaluation.measures import System
from sonorant.release.announcement import WEBHOOK, conclude
from sonorant.release.gate import judge
from sonorant.release.service import find_incumbent, resolve

GOOD = {"pnmi": 0.40, "abx_across_any": 0.20, "abx_within_any": 0.15}


def write_report(
    folder: Path, scores: Mapping[str, Mapping[str, float]], estimates: Sequence[System] = (), **inputs: str
) -> Path:
    """The artifact report, with scores by system and what is known of them by utterance."""
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(scores))
    if estimates:
        write_estimates(folder, estimates)
    given = {
        "corpus": "c" * 64,
        "model": "a" * 64,
        **({"previous": "b" * 64} if "previous" in scores else {}),
        **inputs,
    }
    write_record(folder, {"step": "evaluate", "artifact": "report", "inputs": given, "digest": digest_folder(folder)})
    return folder


# ------------------------------------------------------------------------------------------------------ the gate


@pytest.mark.parametrize("evidence", [{}, {"evidence": "value"}])
@pytest.mark.parametrize(
    ("change", "limits", "word"),
    [
        ({}, {}, "pass"),
        ({"pnmi": 0.5, "abx_across_any": 0.1, "abx_within_any": 0.1}, {}, "pass"),
        ({"pnmi": 0.39}, {}, "pass"),
        ({"pnmi": 0.3899}, {}, "fail"),
        ({"abx_across_any": 0.21}, {}, "pass"),
        ({"abx_across_any": 0.2101}, {}, "fail"),
        ({"abx_within_any": 0.1601, "pnmi": 0.9}, {}, "fail"),
        ({"pnmi": 0.3899}, {"max_pnmi_loss": 0.02}, "pass"),
        ({"pnmi": 0.3999}, {"max_pnmi_loss": 0}, "fail"),
        ({"abx_within_any": 0.18}, {"max_abx_rise": 0.03}, "pass"),
        ({"pnmi": math.nan}, {}, "fail"),
        ({"pnmi": None}, {}, "fail"),
    ],
)
def test_a_model_passes_that_is_not_worse(
    tmp_path: Path,
    change: dict[str, Any],
    limits: dict[str, float],
    word: str,
    evidence: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A report without estimates, as they once were, is judged by its values whatever counts as evidence."""
    ours = {name: value for name, value in {**GOOD, **change}.items() if value is not None}
    report = write_report(tmp_path / "report", {"model": ours, "mfcc": {"pnmi": 0.9}, "previous": GOOD})
    verdict = judge({**limits, **evidence}, report)
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"gate: {verdict.word}: {verdict.reason}"
    assert verdict.word == word
    assert verdict.scores["pnmi_in_service"] == 0.40
    assert all(math.isfinite(score) for score in verdict.scores.values())
    assert ("worse or not measured" in verdict.reason) == (word == "fail")
    assert ("by the score alone" in verdict.reason) == (evidence == {})


HALVES = {f"u{number:02}": 1.0 if number % 2 else -1.0 for number in range(50)}
"""Influences that pull one way and the other: in sum 0, and √50 their standard error by hand."""


def system(key: str, spread: float, **scores: float) -> System:
    """A system whose scores have the standard error `spread`."""
    influence = {name: pull * spread / math.sqrt(50) for name, pull in HALVES.items()}
    scores = {**GOOD, **scores}
    return System(key, key, "", scores, {name: Estimate(value, influence) for name, value in scores.items()})


def judge_pair(folder: Path, limits: Mapping[str, Any], ours: System, former: System) -> tuple[str, str]:
    """The gate's word and reason."""
    scores = {"model": ours.scores, "previous": former.scores}
    verdict = judge(limits, write_report(folder / "report", scores, [ours, former]))
    return verdict.word, verdict.reason


@pytest.mark.parametrize(
    ("scores", "spread", "limits", "word"),
    [
        # 0.02 worse, a slack of 0.01, and an interval of ±1.96 times the error: it must be below 0.0051 to show that.
        ({"pnmi": 0.38}, 0.0040, {}, "fail"),
        ({"pnmi": 0.38}, 0.0065, {}, "pass"),
        ({"pnmi": 0.38}, 0.0065, {"evidence": "value"}, "fail"),
        ({"pnmi": 0.38}, 0.0065, {"max_pnmi_loss": 0}, "fail"),
        ({"pnmi": 0.38}, 0.0130, {"max_pnmi_loss": 0}, "pass"),
        ({"abx_across_any": 0.22}, 0.0040, {}, "fail"),
        ({"abx_across_any": 0.22}, 0.0065, {}, "pass"),
        # What is within the slack passes however sure it is; so does what is better.
        ({"pnmi": 0.39, "abx_within_any": 0.16}, 0.0, {}, "pass"),
        ({"pnmi": 0.50, "abx_within_any": 0.05}, 0.0040, {}, "pass"),
        # One score that is shown to be worse is enough.
        ({"pnmi": 0.38, "abx_within_any": 0.20}, 0.0065, {}, "fail"),
        ({"pnmi": math.nan}, 1.0, {}, "fail"),
    ],
)
def test_a_model_fails_where_all_of_the_interval_is_worse(
    tmp_path: Path, scores: dict[str, float], spread: float, limits: dict[str, Any], word: str
) -> None:
    found, reason = judge_pair(tmp_path, limits, system("model", spread, **scores), system("previous", 0.0))
    assert found == word, reason
    assert ("worse or not measured" in reason) == (word == "fail")


def test_the_interval_is_of_the_difference_utterance_by_utterance(tmp_path: Path) -> None:
    """However much the utterances differ among themselves, what differs alike on all of them is shown by any two."""
    word, reason = judge_pair(tmp_path, {}, system("model", 0.1, pnmi=0.38), system("previous", 0.1))
    assert word == "fail"
    assert reason.startswith(
        "pnmi 0.3800, wanted at least 0.3900, differs by -0.0200 (95 %: -0.0200 … -0.0200) (worse or not measured); "
    )


def test_the_reason_says_what_the_utterances_show(tmp_path: Path) -> None:
    word, reason = judge_pair(tmp_path, {}, system("model", 0.0065, pnmi=0.38), system("previous", 0.0))
    told = reason.split("; ")[0]
    assert word == "pass"
    found = re.fullmatch(
        r"pnmi 0\.3800, wanted at least 0\.3900, differs by -0\.0200 \(95 %: (\S+) … (\S+)\), "
        "which is not shown to be worse",
        told,
    )
    assert found
    # 2,000 draws leave a percentile a sixteenth of the error to vary.
    wanted = np.array([-0.02 - 1.96 * 0.0065, -0.02 + 1.96 * 0.0065])
    assert np.allclose([float(end) for end in found.groups()], wanted, atol=0.001)


def test_a_score_of_which_nothing_is_known_by_utterance_is_judged_by_its_value(tmp_path: Path) -> None:
    ours, former = system("model", 0.0065, pnmi=0.38, abx_across_any=0.22), system("previous", 0.0)
    estimates = {name: one for name, one in ours.estimates.items() if name != "pnmi"}
    word, reason = judge_pair(tmp_path, {}, dataclasses.replace(ours, estimates=estimates), former)
    pnmi, across, within = reason.split("; ")
    assert word == "fail"
    alone = "by the score alone, for the report has no interval of it"
    assert pnmi == f"pnmi 0.3800, wanted at least 0.3900, {alone} (worse or not measured)"
    assert across.endswith("which is not shown to be worse")
    assert re.fullmatch(r"abx_within_any .*, differs by \+0\.0000 \(95 %: \S+ … \S+\)", within)
    # Nor does one utterance show anything.
    one = System("model", "", "", GOOD, {"pnmi": Estimate(0.4, {"u": 0.0})})
    reason = judge_pair(tmp_path / "one", {}, one, dataclasses.replace(one, key="previous"))[1]
    assert reason.count(alone) == 3


def test_estimates_that_cannot_be_read_are_an_error(tmp_path: Path) -> None:
    report = write_report(tmp_path / "report", {"model": GOOD, "previous": GOOD})
    (report / FILE).write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"estimates\.npz: found no estimates .* evaluate the model again"):
        judge({}, report)
    assert judge({"evidence": "value"}, report).word == "pass"
    with pytest.raises(ValueError, match=r"gate\.evidence: found 'luck', wanted 'interval' or 'value'"):
        judge({"evidence": "luck"}, report)


def test_what_the_one_in_service_was_not_measured_on_cannot_pass(tmp_path: Path) -> None:
    former = {"pnmi": 0.40, "abx_across_any": 0.20}
    verdict = judge({}, write_report(tmp_path / "report", {"model": GOOD, "previous": former}))
    assert verdict.word == "fail"
    assert "abx_within_any 0.1500, wanted the one in service's measured" in verdict.reason


def test_the_first_model_passes(tmp_path: Path) -> None:
    verdict = judge({}, write_report(tmp_path / "report", {"model": {"pnmi": 0.01}, "mfcc": GOOD}))
    assert (verdict.word, verdict.reason, verdict.scores) == ("pass", "nothing in service", {})


def test_a_report_that_does_not_hold_what_it_was_made_of_is_refused(tmp_path: Path) -> None:
    """The gate must not take a former model whose scores are missing for one that never was."""
    report = write_report(tmp_path / "report", {"model": GOOD}, previous="b" * 64)
    with pytest.raises(ValueError, match=r"found scores of \['model'\], wanted .* run `evaluate` again"):
        judge({}, report)
    (report / "metrics.json").write_text("[]")
    with pytest.raises(ValueError, match=r"metrics\.json: found no scores by system"):
        judge({}, report)
    with pytest.raises(ValueError, match=r"gate\.max_pnmi_los: found an unknown key"):
        judge({"max_pnmi_los": 0.1}, report)


def test_the_component_says_pass_and_logs_the_scores(tmp_path: Path) -> None:
    report = write_report(tmp_path / "report", {"model": GOOD, "previous": GOOD})
    metrics = dsl.Metrics(uri=str(tmp_path / "metrics"))
    given = dsl.Artifact(uri=str(report))
    assert operations.judge.python_func(limits={"max_pnmi_loss": 0.0}, report=given, metrics=metrics) == "pass"
    assert metrics.metadata["pnmi"] == metrics.metadata["pnmi_in_service"] == 0.40
    json.dumps(metrics.metadata, allow_nan=False)


# -------------------------------------------------------------------------------------------- nothing in service


@pytest.mark.parametrize("reference", ["", "model@production"])
def test_without_a_store_nothing_is_in_service(tmp_path: Path, reference: str) -> None:
    assert resolve("", reference) == ""
    assert find_incumbent("", reference, tmp_path / "model") == ""
    assert is_absent(tmp_path / "model")


# ------------------------------------------------------------------------------------------------- who is told


class Hook(BaseHTTPRequestHandler):
    """Notes what is posted, and answers as it is told to."""

    def do_POST(self) -> None:
        self.server.posted.append(self.rfile.read(int(self.headers["Content-Length"])))  # type: ignore[attr-defined]
        self.send_response(self.server.answer)  # type: ignore[attr-defined]
        self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/elsewhere")  # type: ignore[attr-defined]
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A server that listens to how runs end."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    server.posted, server.answer = [], 200  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv(WEBHOOK, f"http://127.0.0.1:{server.server_port}/secret-path")
    yield server
    server.shutdown()
    server.server_close()


def final(state: str = "FAILED", message: str | None = "child 'cluster' failed") -> dsl.PipelineTaskFinalStatus:
    """What Kubeflow hands to an exit handler."""
    return dsl.PipelineTaskFinalStatus(
        state=state,
        pipeline_job_resource_name="run",
        pipeline_task_name="exit-handler-1",
        error_code=None if message is None else 1,
        error_message=message,
    )


def test_the_end_is_said_and_posted(hook: Any, capsys: pytest.CaptureFixture[str]) -> None:
    conclude(final(), "sonorant-train", "run-7")
    wanted = {
        "pipeline": "sonorant-train",
        "run": "run-7",
        "state": "FAILED",
        "task": "exit-handler-1",
        "error": "child 'cluster' failed",
    }
    captured = capsys.readouterr()
    assert json.loads(captured.out) == wanted
    assert captured.err == ""
    text = "sonorant-train, run run-7: FAILED in exit-handler-1: child 'cluster' failed"
    assert [json.loads(body) for body in hook.posted] == [{"text": text, **wanted}]


def test_a_run_that_succeeded_has_no_fault(hook: Any, capsys: pytest.CaptureFixture[str]) -> None:
    conclude(final("SUCCEEDED", None), "sonorant-train", "run-7")
    said = json.loads(capsys.readouterr().out)
    assert (said["state"], said["task"], said["error"]) == ("SUCCEEDED", None, None)
    assert json.loads(hook.posted[0])["text"] == "sonorant-train, run run-7: SUCCEEDED"


@pytest.mark.parametrize("answer", [302, 404, 500])
def test_that_nobody_could_be_told_is_said_and_no_failure(
    hook: Any, answer: int, capsys: pytest.CaptureFixture[str]
) -> None:
    hook.answer = answer
    conclude(final(), "sonorant-train", "run-7")
    (line,) = capsys.readouterr().err.splitlines()
    assert f"HTTP {answer}" in line
    assert "secret-path" not in line
    assert len(hook.posted) == 1  # a redirection is not followed


@pytest.mark.parametrize("address", ["http://127.0.0.1:{port}/secret-path", "file:///etc/secret-path", "secret-path"])
def test_a_hook_that_is_not_there_is_said(
    address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv(WEBHOOK, address.format(port=closed.getsockname()[1]))
        conclude(final(), "sonorant-train", "run-7")
    captured = capsys.readouterr()
    assert json.loads(captured.out)["state"] == "FAILED"
    (line,) = captured.err.splitlines()
    assert line.startswith(f"${WEBHOOK}: found ")
    assert "secret-path" not in line


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # kfp: the image has no effect here
def test_the_exit_handler_runs_after_a_failure(hook: Any, tmp_path: Path) -> None:
    """In a graph run on this machine, where Kubeflow names no more than the group that failed."""

    @dsl.component(base_image="python:3.11", install_kfp_package=False)
    def fail():
        raise ValueError("on purpose")

    @dsl.pipeline(name="ending")
    def ending():
        with dsl.ExitHandler(operations.conclude(pipeline="ending", run=dsl.PIPELINE_JOB_ID_PLACEHOLDER)):
            fail()

    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path))
    with pytest.raises(RuntimeError):
        ending()
    (said,) = map(json.loads, hook.posted)
    assert (said["pipeline"], said["state"], said["task"]) == ("ending", "FAILED", "exit-handler-1")
    assert "{{" not in said["run"]
