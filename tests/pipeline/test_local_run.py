"""The very graph that Kubeflow runs, run on this machine on a tiny corpus, and `dvc repro` beside it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sonorant.artifacts import digest_folder, read_record
from sonorant.params import read_params
from sonorant.steps import SHARED, STEPS
from tests.workflow import TINY, Made, workflow

ROOT = Path(__file__).resolve().parents[2]
OPERATIONS = {"resolve", "judge", "conclude"}
"""What a run without a store always does anew."""


def run_here(folder: Path, *words: str, overrides: list[str] = TINY) -> subprocess.CompletedProcess[str]:
    """`python -m pipelines run --local` with its artifacts and checkpoints in a folder."""
    command = [sys.executable, "-m", "pipelines", "run", "--local", "--root", str(folder / "root"), *words]
    command += [word for override in overrides for word in ("--set", override)]
    # Elsewhere a store may be named; a test must not write there.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "SONORANT_"))}
    environment["SONORANT_RUNS"] = str(folder / "runs")
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=280)


def runs_in(folder: Path) -> list[Path]:
    """The folders of all runs, the oldest first."""
    return sorted(path for path in (folder / "root").iterdir() if path.name.startswith("sonorant-train"))




def ended(answer: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What the exit handler says."""
    (line,) = [line for line in answer.stdout.splitlines() if line.strip().startswith('{"pipeline"')]
    told: dict[str, Any] = json.loads(line)
    return told


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("local")


@pytest.fixture(scope="module")
def ran(folder: Path) -> Iterator[subprocess.CompletedProcess[str]]:
    """A run in two shares, its results kept for the next."""
    answer = run_here(folder, "--shares", "2", "--cache")
    assert answer.returncode == 0, answer.stdout[-3000:] + answer.stderr[-3000:]
    return answer


@pytest.fixture(scope="module")
def first(ran: subprocess.CompletedProcess[str], folder: Path) -> Path:
    """The folder of that run."""
    assert ran.returncode == 0
    return runs_in(folder)[0]


def check_lineage(run: Path, num_rounds: int) -> dict[str, str]:
    """Every artifact's metadata tells of what it was made; the digests of what the steps made, by task and name."""
    digests: dict[Made, str] = {}
    for task in workflow(num_rounds):
        step, place = STEPS[task.step], run / (task.step if task.round == 1 else f"{task.step}-{task.round}")
        logged = json.loads((place / "executor_output.json").read_text())["artifacts"]
        assert logged["metrics"]["artifacts"][0]["metadata"]
        for artifact in step.outputs:
            record = read_record(place / artifact, artifact)
            digest = digests[Made(task.step, task.round, artifact)] = digest_folder(place / artifact)
            metadata = logged[artifact]["artifacts"][0]["metadata"]
            assert metadata["digest"] == record["digest"] == digest
            found = {name: made for name, made in metadata["inputs"].items() if step.artifacts[name] == "in"}
            assert found == {name: digests[made] for name, made in task.reads.items()}
            assert metadata["step"] == task.step
    return {f"{made.step}-{made.round}/{made.artifact}": digest for made, digest in digests.items()}


def test_every_step_runs_and_its_lineage_is_recorded(
    ran: subprocess.CompletedProcess[str], first: Path, folder: Path
) -> None:
    check_lineage(first, 1)
    shares = sorted(first.glob("for-loop-*/convert/share"))
    assert len(shares) == 2
    corpus = json.loads((first / "prepare" / "executor_output.json").read_text())["artifacts"]["corpus"]["artifacts"][0]
    assert sorted(corpus["metadata"]["inputs"]["shares"]) == sorted(digest_folder(share) for share in shares)
    # Kubeflow's page shows the report as it is.
    page = first / "evaluate" / "page"
    assert page.read_bytes() == (first / "evaluate" / "report" / "report.html").read_bytes()
    # Every step finished, so nothing is kept for a retry.
    assert list((folder / "runs").glob("*")) == []
    told = ended(ran)
    assert (told["state"], told["error"]) == ("SUCCEEDED", None)
    # Nothing is in service where there is no store: the model passes, and nothing is released.
    assert "gate: pass: nothing in service" in ran.stdout
    assert not list(first.glob("**/release"))


def test_its_artifacts_are_those_of_dvc_repro(first: Path, tmp_path: Path) -> None:
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    shutil.copytree(ROOT / "optional", tmp_path / "optional")
    params = read_params([ROOT / "params.yaml"], TINY)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    tools = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"}
    environment["SONORANT_RUNS"] = str(tmp_path / "runs")
    for command in (["dvc", "init", "--quiet", "--no-scm"], ["dvc", "repro"]):
        answer = subprocess.run(
            [tools / command[0], *command[1:]],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=280,
        )
        assert answer.returncode == 0, answer.stdout[-3000:] + answer.stderr[-3000:]
    files = [yaml.safe_load((ROOT / place / "dvc.yaml").read_text())["stages"] for place in ("optional", ".")]
    stages = files[0] | files[1]
    for task in workflow(1):
        (out,) = stages[task.step]["outs"]
        out = out.replace("${rounds}", "1")
        (artifact,) = STEPS[task.step].outputs
        theirs, ours = tmp_path / out, first / task.step / artifact
        assert digest_folder(theirs) == digest_folder(ours), task.step
        assert read_record(theirs, artifact)["metrics"] == read_record(ours, artifact)["metrics"]


def test_a_second_run_is_cached(first: Path, folder: Path) -> None:
    again = run_here(folder, "--shares", "2", "--cache")
    assert again.returncode == 0, again.stdout[-3000:]
    run = runs_in(folder)[-1]
    assert run != first
    # No step has run: what the operations did was done anew, for the world may have changed.
    done = {path.parent.name for path in run.rglob("executor_output.json")}
    assert done == OPERATIONS
    assert ended(again)["state"] == "SUCCEEDED"
    # A changed section runs its step and what comes after it.
    changed = run_here(folder, "--shares", "2", "--cache", overrides=[*TINY, "publish.seed=5"])
    assert changed.returncode == 0, changed.stdout[-3000:]
    done = {path.parent.name for path in runs_in(folder)[-1].rglob("executor_output.json")}
    assert done == OPERATIONS | {"publish", "evaluate"}


def test_an_existing_corpus_is_imported(first: Path, tmp_path: Path) -> None:
    answer = run_here(tmp_path, "--corpus", str(first / "prepare" / "corpus"))
    assert answer.returncode == 0, answer.stdout[-3000:] + answer.stderr[-3000:]
    (run,) = runs_in(tmp_path)
    assert not list(run.glob("**/prepare"))
    for task in workflow(1)[1:]:
        (artifact,) = STEPS[task.step].outputs
        assert digest_folder(run / task.step / artifact) == digest_folder(first / task.step / artifact)


def test_a_failing_step_is_tried_again_and_then_told_by_the_exit_handler(tmp_path: Path) -> None:
    source = f"prepare.sources=[{{kind: folder, name: absent, path: {tmp_path / 'absent'}}}]"
    answer = run_here(tmp_path, overrides=[source])
    assert answer.returncode == 1
    last = answer.stderr.splitlines()[-1]
    assert last.startswith("run: Pipeline 'sonorant-train' finished with status FAILURE")
    assert "'convert'" in last
    # The first try and pipelines/train.py's two retries, each ending in the step's own line.
    assert answer.stdout.count(f"ValueError: source absent: found nothing at {tmp_path / 'absent'}") == 3
    told = ended(answer)
    assert told["state"] == "FAILED"
    assert told["error"]
    # What could run did; what needs the corpus did not.
    assert not set(STEPS) & {path.name for path in runs_in(tmp_path)[0].iterdir()}


@pytest.mark.slow
def test_two_rounds_run_and_their_lineage_is_recorded(tmp_path: Path) -> None:
    answer = run_here(tmp_path, overrides=[*TINY, "rounds=2"])
    assert answer.returncode == 0, answer.stdout[-3000:] + answer.stderr[-3000:]
    (run,) = runs_in(tmp_path)
    digests = check_lineage(run, 2)
    assert digests["cluster-1/units"] != digests["cluster-2/units"]
    assert len(list(run.glob("for-loop-*/convert"))) == len(SHARED)
