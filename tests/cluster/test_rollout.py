"""Releases and rollouts for real: the store, two embedding servers that follow it, and the graph between them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from components import operations
from sonorant.artifacts import digest_folder, is_absent, read_record, write_record
from sonorant.release.canary import promote, stage, withdraw
from sonorant.release.service import find_incumbent, release, resolve
from sonorant.store import Store
from tests.serving.conftest import RunningServer
from tests.tiny import write_model, write_tone_corpus
from tests.workflow import TINY

ROOT = Path(__file__).resolve().parents[2]
SERVER = {"SONORANT_SERVE_NUM_WORKERS": "1", "SONORANT_SERVE_WATCH_SECONDS": "0.2"}
NOBODY = "http://127.0.0.1:1"


def digest_of(model: Path) -> str:
    return str(read_record(model, "model")["digest"])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model in production, a good candidate, and one whose weights are cut off."""
    folder = tmp_path_factory.mktemp("models")
    models = {name: write_model(folder / name / "model", seed) for seed, name in enumerate(("old", "new", "broken"))}
    weights = models["broken"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    record = read_record(models["broken"], "model")
    write_record(models["broken"], {**record, "digest": digest_folder(models["broken"])})
    return models


@pytest.fixture
def store(bucket: str) -> str:
    """A store of the test's own."""
    return f"s3://{bucket}"


def write_report(folder: Path, model: Path, previous: Path | None = None) -> Path:
    """The artifact report on a model, measured beside another."""
    folder.mkdir(parents=True)
    scores = {"pnmi": 0.4, "abx_across_any": 0.2, "abx_within_any": 0.1}
    systems = {"model": scores, **({} if previous is None else {"previous": scores})}
    (folder / "metrics.json").write_text(json.dumps(systems))
    inputs = {"model": digest_of(model), **({} if previous is None else {"previous": digest_of(previous)})}
    write_record(folder, {"step": "evaluate", "artifact": "report", "inputs": inputs, "digest": digest_folder(folder)})
    return folder


# ------------------------------------------------------------------------------------------------------ releases


def test_a_release_puts_model_and_report_into_service(
    store: str, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert find_incumbent(store, "model@production", tmp_path / "none") == ""
    assert is_absent(tmp_path / "none")
    first = write_report(tmp_path / "first" / "report", models["old"])
    assert release(store, "production", models["old"], first) == digest_of(models["old"])
    assert find_incumbent(store, "model@production", tmp_path / "model") == digest_of(models["old"])
    assert digest_folder(tmp_path / "model") == digest_of(models["old"])
    assert Store.from_environment(store).resolve("report@production") == read_record(first, "report")["digest"]
    second = write_report(tmp_path / "second" / "report", models["new"], models["old"])
    release(store, "production", models["new"], second)
    assert resolve(store, "model@production") == digest_of(models["new"])
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"is model@sha256:{digest_of(models['new'])}")
    # By its digest too, so that Kubeflow may reuse what was fetched while the same model is in service.
    assert find_incumbent(store, digest_of(models["old"]), tmp_path / "again") == digest_of(models["old"])
    assert find_incumbent(store, "", tmp_path / "nothing") == ""


def test_a_report_of_another_model_releases_nothing(store: str, models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found it made of the model .* evaluate this model"):
        release(store, "production", models["new"], write_report(tmp_path / "report", models["old"]))
    assert resolve(store, "model@production") == ""


def test_a_comparison_with_what_is_no_longer_in_service_releases_nothing(
    store: str, models: dict[str, Path], tmp_path: Path
) -> None:
    """Two runs at once: each compares with the model before, and the later one could put a worse one into service."""
    late = write_report(tmp_path / "late" / "report", models["broken"])
    release(store, "production", models["old"], write_report(tmp_path / "report", models["old"]))
    with pytest.raises(ValueError, match=r"wanted nothing, with which .* another was released meanwhile; run again"):
        release(store, "production", models["broken"], late)
    assert resolve(store, "model@production") == digest_of(models["old"])
    # The same release again, as a retried pod does it, is none.
    release(store, "production", models["old"], tmp_path / "report")


def test_the_components_hand_everything_over(store: str, models: dict[str, Path], tmp_path: Path) -> None:
    from kfp import dsl

    report = dsl.Artifact(uri=str(write_report(tmp_path / "report", models["old"])))
    digest = digest_of(models["old"])
    model = dsl.Model(uri=str(models["old"]))
    assert operations.release.python_func(store=store, alias="production", model=model, report=report) == digest
    assert operations.resolve.python_func(store=store, reference="model@production") == digest
    found = dsl.Model(uri=str(tmp_path / "found"))
    operations.incumbent.python_func(store=store, reference="model@production", model=found)
    assert found.metadata == {"digest": digest}
    assert digest_folder(tmp_path / "found") == digest


@pytest.mark.slow
def test_training_puts_into_service_what_is_not_worse(store: str, tmp_path: Path) -> None:
    """Units tell of phones what they can: two of them less than eight."""
    found = []
    for num_units, told in ((8, "nothing in service"), (8, "pass: pnmi"), (2, "fail: pnmi")):
        changes = [f"publish.num_units={num_units}", "gate.max_pnmi_loss=0"]
        words = ["run", "--local", "--cache", "--root", str(tmp_path / "root"), "--store", store]
        words += [w for override in [*TINY, *changes] for w in ("--set", override)]
        environment = {**os.environ, "SONORANT_RUNS": str(tmp_path / "runs")}
        command = [sys.executable, "-m", "pipelines", *words]
        answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
        assert answer.returncode == 0, answer.stdout[-4000:] + answer.stderr[-4000:]
        assert told in answer.stdout
        assert '"state": "SUCCEEDED"' in answer.stdout
        found.append(resolve(store, "model@production"))
    assert found == [found[0]] * 3
    shelf = Store.from_environment(store)
    report = shelf.record("report@production")
    assert report["inputs"]["model"] == report["inputs"]["previous"] == found[0]
    # The model that failed the gate is nowhere, and no move was made for the one that was there already.
    assert [artifact.digest for artifact in shelf.artifacts("model")] == [found[0]]
    assert len(shelf.history("model@production")) == 1


# ------------------------------------------------------------------------------------------------------ rollouts


@pytest.mark.parametrize(
    ("candidate", "wanted"),
    [
        ("model@sha256:BROKEN", "found a model that does not work .*, wanted one that serves"),
        (f"model@sha256:{'0' * 64}", "wanted it there"),
        ("model@nightly", "found the aliases model@canary, model@production"),
        ("report@production", r"candidate: found 'report@production', wanted model@sha256:DIGEST"),
    ],
)
def test_what_does_not_work_never_reaches_the_canary(
    store: str, models: dict[str, Path], tmp_path: Path, candidate: str, wanted: str
) -> None:
    shelf = Store.from_environment(store)
    shelf.push(models["old"], alias="production")
    shelf.move("model@production", "canary")
    shelf.push(models["broken"])
    with pytest.raises(ValueError, match=wanted) as caught:
        stage(store, candidate.replace("BROKEN", digest_of(models["broken"])), tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert resolve(store, "model@canary") == digest_of(models["old"])


def test_production_goes_back_where_it_does_not_follow(store: str, models: dict[str, Path]) -> None:
    shelf = Store.from_environment(store)
    shelf.push(models["old"], alias="production")
    shelf.push(models["new"], alias="canary")
    with pytest.raises(ValueError, match=rf"model@production is model@sha256:{digest_of(models['old'])} again"):
        promote({"wait_seconds": 0.5}, store, digest_of(models["new"]), NOBODY)
    assert resolve(store, "model@production") == digest_of(models["old"])
    with pytest.raises(ValueError, match="found no move before the present one"):
        shelf.rollback("model@production")
    withdraw(store)
    assert resolve(store, "model@canary") == digest_of(models["old"])


@contextmanager
def following(reference: str, folder: Path, store: str) -> Iterator[RunningServer]:
    """A server and, beside it, what keeps its model that of the alias: a pod of the service."""
    folder.mkdir()
    model = folder / "model"
    words = [sys.executable, "-m", "sonorant", "store", "follow", reference, str(model), "--every", "0.3"]
    with (folder / "follow.log").open("w") as log, ExitStack() as stack:
        sidecar = subprocess.Popen([*words, "--store", store], stdout=log, stderr=log)
        stack.callback(sidecar.wait)
        stack.callback(sidecar.send_signal, signal.SIGTERM)
        deadline = time.monotonic() + 60
        while not (model / "artifact.json").is_file():
            assert sidecar.poll() is None, (folder / "follow.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        server = RunningServer(model, folder, SERVER)
        stack.callback(server.process.wait)
        stack.callback(server.process.kill)
        yield server


@contextmanager
def services(store: str, folder: Path) -> Iterator[Mapping[str, RunningServer]]:
    """Production and canary."""
    with ExitStack() as stack:
        servers = {
            alias: stack.enter_context(following(f"model@{alias}", folder / alias, store))
            for alias in ("production", "canary")
        }
        for server in servers.values():
            server.wait()
        yield servers


def roll_out(store: str, candidate: Path, urls: Mapping[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """The rollout's graph, run by this machine's processes on a folder of recordings."""
    if not (folder / "speech").is_dir():
        write_tone_corpus(folder / "speech")
    limits = {"num_requests": 8, "num_reports": 2, "wait_seconds": 30, "max_slowdown": 1e6}
    words = ["canary", "run", "--local", "--root", str(folder / "root")]
    words += ["--candidate", f"model@sha256:{digest_of(candidate)}", "--store", store]
    words += ["--speech", str(folder / "speech" / "raw")]
    words += ["--canary-url", urls["canary"], "--production-url", urls["production"]]
    words += [word for name, value in limits.items() for word in ("--set", f"canary.{name}={value}")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(
        [sys.executable, "-m", "pipelines", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.slow
def test_a_good_candidate_goes_into_production(store: str, models: dict[str, Path], tmp_path: Path) -> None:
    shelf = Store.from_environment(store)
    shelf.push(models["old"], alias="production")
    shelf.move("model@production", "canary")
    shelf.push(models["new"])
    with services(store, tmp_path) as servers:
        answer = roll_out(store, models["new"], {alias: server.url for alias, server in servers.items()}, tmp_path)
    assert answer.returncode == 0, answer.stdout[-4000:] + answer.stderr[-4000:]
    assert "equal_units 1, canary_p95_ms" in answer.stdout
    assert '"state": "SUCCEEDED"' in answer.stdout
    for alias in ("production", "canary"):
        assert resolve(store, f"model@{alias}") == digest_of(models["new"])


@pytest.mark.slow
def test_a_candidate_whose_units_differ_changes_nothing_in_production(
    store: str, models: dict[str, Path], tmp_path: Path
) -> None:
    """The canary's disk holds another codebook than the model's record says; it was so from the start."""
    shelf = Store.from_environment(store)
    shelf.push(models["old"], alias="production")
    shelf.push(models["new"], alias="canary")
    twisted = tmp_path / "twisted" / "model"
    shutil.copytree(models["new"], twisted)
    shutil.copy(models["old"] / "codebook.safetensors", twisted)
    with ExitStack() as stack:
        production = stack.enter_context(following("model@production", tmp_path / "production", store))
        canary = RunningServer(twisted, tmp_path / "twisted", SERVER)
        stack.callback(canary.process.wait)
        stack.callback(canary.process.kill)
        production.wait()
        canary.wait()
        answer = roll_out(store, models["new"], {"production": production.url, "canary": canary.url}, tmp_path)
        assert answer.returncode == 1
        assert "of its units equal to the model's own, wanted at least 99.90%" in answer.stdout
        assert answer.stderr.splitlines()[-1].startswith("run: Pipeline 'sonorant-serve-canary' finished")
        assert '"state": "FAILED"' in answer.stdout
        for alias in ("production", "canary"):
            assert resolve(store, f"model@{alias}") == digest_of(models["old"])
