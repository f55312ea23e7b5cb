"""The pretraining component as a Kubeflow TrainJob: what is submitted, how it is watched, what is left behind.

The real SDK and Kubernetes client speak to a server that answers as the API server does (tests/trainer.py).
"""

from __future__ import annotations

import copy
import os
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import dsl

import components
from sonorant.artifacts import digest_folder, read_record
from sonorant.config import LaunchConfig
from sonorant.launch import Work, trainjob
from sonorant.launch.trainjob import Job, share
from sonorant.steps import pretrain
from tests.running import journal_of
from tests.tiny import pretrain_values, write_tone_corpus
from tests.trainer import Trainer, TrainJob, assert_is_trainjob, run_nodes, trainer

__all__ = ["trainer"]
GOLDEN = Path(__file__).with_name("trainjob.golden.yaml")
LAUNCH = {"launcher": "trainjob", "num_gpus": 0.0, "cpu": "1", "memory": "1Gi", "hours": 0.05}


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The volume, and little patience."""
    folder = tmp_path / "runs"
    monkeypatch.setenv("SONORANT_RUNS", str(folder))
    monkeypatch.setattr(trainjob, "POLL", 0.1)
    return folder


@pytest.fixture(scope="module")
def tone_corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    corpus, units = write_tone_corpus(tmp_path_factory.mktemp("tones"))
    return {"corpus": corpus, "units": units}


@pytest.fixture(scope="module")
def made(tone_corpus: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of it."""
    encoder = tmp_path_factory.mktemp("made") / "encoder"
    pretrain(pretrain_values(), **tone_corpus, encoder=encoder, scratch=encoder.parent / "scratch")
    return encoder


def run_component(folder: Path, tone_corpus: dict[str, Path], **launch: Any) -> dict[str, Any]:
    """The component's metrics; its encoder is in `folder`."""
    encoder = dsl.Model(name="encoder", uri=str(folder / "encoder"))
    metrics = dsl.Metrics(name="metrics", uri=str(folder / "metrics"))
    inputs = {name: dsl.Dataset(name=name, uri=str(path)) for name, path in tone_corpus.items()}
    values = pretrain_values(launch={**LAUNCH, **launch})
    components.pretrain.python_func(values, **inputs, encoder=encoder, metrics=metrics)
    assert encoder.metadata["digest"] == digest_folder(folder / "encoder")
    return dict(metrics.metadata)


def delivering(made: Path, then: Callable[[], object] = lambda: None) -> Callable[[TrainJob], None]:
    """A job whose pods make at once what one process has made."""

    def play(job: TrainJob) -> None:
        job.start()
        job.pods[0].say("rank 0: pretrain: 6/6", "", "rank 0: done")
        then()
        shutil.copytree(made, job.path_of("--encoder"))
        for pod in job.pods:
            pod.finish(0)
        job.conclude()

    return play


def hanging(job: TrainJob) -> None:
    """A job that never ends."""
    job.start()
    job.pods[0].say("rank 0: pretrain: 1/6")
    job.deleted.wait(100)


# ------------------------------------------------------------------------------------------------ the object


def some_work(folder: Path) -> Work:
    paths = {name: folder / "jobs" / "pretrain-0123456789abcdef" / name for name in ("corpus", "units", "encoder")}
    outputs = {"encoder": paths.pop("encoder")}
    outputs["encoder"].parent.mkdir(parents=True)
    return Work("pretrain", "0123456789abcdef", {}, {"pretrain": {}}, paths, outputs, folder)


def submitted(trainer: Trainer, folder: Path, launch: LaunchConfig) -> dict[str, Any]:
    """The object that the SDK sends, with the volume at /runs."""
    trainer.play = lambda job: job.start()
    Job(launch, some_work(folder)).create()
    (document,) = trainer.created
    return yaml.safe_load(yaml.safe_dump(document, width=120).replace(str(folder.resolve()), "/runs"))


def test_the_submitted_object_is_pinned(trainer: Trainer, runs: Path) -> None:
    """Renew it with RENEW_GOLDEN=1 and look at the difference: it is what a cluster is told."""
    launch = LaunchConfig(launcher="trainjob", num_nodes=2, num_gpus=8, image="registry.example/sonorant-train:0.1.0")
    document = submitted(trainer, runs, launch)
    assert_is_trainjob(document)
    if os.environ.get("RENEW_GOLDEN"):
        GOLDEN.write_text(yaml.safe_dump(document, width=120))
    assert document == yaml.safe_load(GOLDEN.read_text())


def test_cpus_alone_ask_for_no_gpu_and_the_runtimes_image(trainer: Trainer, runs: Path) -> None:
    launch = LaunchConfig(launcher="trainjob", num_gpus=0, num_processes=3)
    found = submitted(trainer, runs, launch)["spec"]["trainer"]
    assert set(found["resourcesPerNode"]["limits"]) == {"cpu", "memory"}
    assert "image" not in found
    assert found["args"][:2] == ["--nproc-per-node", "3"]


def put(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with something at a dotted place."""
    changed = copy.deepcopy(document)
    *above, last = path.split(".")
    inner = changed
    for key in above:
        inner = inner[key]
    inner[last] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.podTemplateOverrides", [{"targetJobs": [{"name": "node"}]}]),  # was in v1alpha1 of Trainer 2.0 and 2.1
        ("spec.trainer.numProcPerNode", "auto"),  # was a text until Trainer 2.2
        ("spec.trainer.gpus", 8),
        ("spec.trainer.numNodes", "two"),
        ("spec.trainer.resourcesPerNode.limit", {"cpu": "1"}),
        ("spec.runtime", "sonorant-torch"),
        ("spec.runtimeRef.names", "sonorant-torch"),
        ("metadata.label", {}),
    ],
)
def test_an_unknown_or_a_removed_field_is_caught(path: str, value: Any) -> None:
    golden = yaml.safe_load(GOLDEN.read_text())
    assert_is_trainjob(golden)
    with pytest.raises((AssertionError, ValueError)):
        assert_is_trainjob(put(golden, path, value))


# --------------------------------------------------------------------------------------------------- a job's life


def test_two_nodes_are_one_process(
    trainer: Trainer, tone_corpus: dict[str, Path], made: Path, tmp_path: Path, runs: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The job's command really runs, a torchrun a node that finds the other by the environment it is given."""
    metrics = run_component(tmp_path, tone_corpus, num_nodes=2.0)
    said = capfd.readouterr().err
    assert said.count("pretrain: 6/6 ") == 1
    one, two = (read_record(folder, "encoder") for folder in (made, tmp_path / "encoder"))
    for key in ("step", "config", "inputs", "lineage", "libraries", "sonorant"):
        assert one[key] == two[key]
    # As in tests/pipeline/test_ranks.py.
    for first, second in zip(journal_of(made), journal_of(tmp_path / "encoder"), strict=True):
        assert first == pytest.approx(second, rel=1e-4, abs=1e-4)
    assert metrics == two["metrics"]
    # The job, its copies and the checkpoints are gone.
    assert trainer.jobs == {}
    assert [path for path in runs.rglob("*") if not path.is_dir()] == []


def test_a_failing_ranks_last_words_are_the_error_and_the_next_try_starts_anew(
    trainer: Trainer, tone_corpus: dict[str, Path], made: Path, tmp_path: Path
) -> None:
    def fail(job: TrainJob) -> None:
        job.start()
        job.pods[1].say("rank 1: a", "rank 1: b", "rank 1: No space left on device")
        # Whoever waited for it ends later, and said why in Kubernetes' own place.
        job.pods[0].finish(1, "rank 0 exited with 1, its last words: pretrain: ranks: lost", "2026-01-05T10:00:09Z")
        job.pods[1].finish(137, at="2026-01-05T10:00:01Z")
        job.conclude()

    trainer.play = fail
    with pytest.raises(ValueError, match=r"^TrainJob sonorant/sonorant-pretrain-\w{16}: found it Failed ") as caught:
        run_component(tmp_path, tone_corpus, num_nodes=2)
    message = str(caught.value)
    assert "\n" not in message
    assert "-node-0-1-x1z9k exited with 137, Error: rank 1: a | rank 1: b | rank 1: No space left" in message
    # It stays, to be looked at.
    (name,) = trainer.jobs
    assert trainer.deleted == []
    trainer.play = delivering(made)
    run_component(tmp_path, tone_corpus, num_nodes=2)
    assert trainer.deleted == [name, name]
    assert len(trainer.created) == 2
    assert digest_folder(tmp_path / "encoder") == digest_folder(made)


def test_a_deadline_that_has_passed_is_told_in_kubeflows_words(
    trainer: Trainer, tone_corpus: dict[str, Path], tmp_path: Path
) -> None:
    def expire(job: TrainJob) -> None:
        job.pods.clear()
        job.end("Failed", "DeadlineExceeded", "TrainJob exceeded its active deadline")

    trainer.play = expire
    with pytest.raises(ValueError, match=r"found it Failed \(DeadlineExceeded: TrainJob exceeded its active deadline"):
        run_component(tmp_path, tone_corpus)


def test_a_job_that_does_not_end_is_given_up_and_deleted(
    trainer: Trainer, tone_corpus: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer.play = hanging
    with pytest.raises(ValueError, match=r"found it unfinished after launch\.hours 0\.00027.*: raise launch\.hours"):
        run_component(tmp_path, tone_corpus, hours=1 / 3600)
    assert len(trainer.deleted) == 1
    assert trainer.jobs == {}
    # Its log was shown while it ran, each line once.
    assert capfd.readouterr().err.count("rank 0: pretrain: 1/6\n") == 1


@pytest.mark.parametrize(("number", "end"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_whoever_cancels_the_component_cancels_the_job(
    trainer: Trainer, tone_corpus: dict[str, Path], tmp_path: Path, number: signal.Signals, end: type[BaseException]
) -> None:
    def interrupt(job: TrainJob) -> None:
        os.kill(os.getpid(), number)
        hanging(job)

    trainer.play = interrupt
    with pytest.raises(end) as caught:
        run_component(tmp_path, tone_corpus)
    if isinstance(caught.value, SystemExit):
        # For Kubeflow, which would take 0 for finished.
        assert caught.value.code == os.EX_TEMPFAIL
    assert len(trainer.deleted) == 1
    assert not (tmp_path / "encoder").exists()


def test_a_component_that_is_tried_again_finds_the_running_job(
    trainer: Trainer, tone_corpus: dict[str, Path], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    found_again = threading.Event()
    trainer.play = delivering(made, lambda: found_again.wait(100))

    def go_away(job: TrainJob) -> None:
        trainer.is_away = True
        trainer_play(job)

    trainer_play, trainer.play = trainer.play, go_away
    monkeypatch.setattr(trainjob, "PATIENCE", 0.3)
    with pytest.raises(ValueError, match=r"found no answer \(for 0\.3 s: .* it goes on meanwhile and is found"):
        run_component(tmp_path, tone_corpus)
    trainer.is_away = False
    threading.Timer(0.5, found_again.set).start()
    run_component(tmp_path, tone_corpus)
    assert len(trainer.created) == 1
    said = capfd.readouterr().err
    assert "is there already" in said
    # From its beginning, for this is another pod's log.
    assert said.count("rank 0: done") == 1
    assert digest_folder(tmp_path / "encoder") == digest_folder(made)


def test_a_log_whose_connection_breaks_is_shown_once(
    trainer: Trainer, tone_corpus: dict[str, Path], made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer.breaks_log = True
    trainer.play = delivering(made, lambda: trainer.reads_log_again.wait(100))
    run_component(tmp_path, tone_corpus)
    said = capfd.readouterr().err
    assert said.count("rank 0: pretrain: 6/6\n") == said.count("rank 0: done\n") == 1


def test_an_api_server_that_is_away_for_a_moment_is_waited_for(
    trainer: Trainer, tone_corpus: dict[str, Path], made: Path, tmp_path: Path
) -> None:
    def be_away() -> None:
        trainer.is_away = True
        threading.Event().wait(0.5)
        trainer.is_away = False

    trainer.play = delivering(made, be_away)
    run_component(tmp_path, tone_corpus)
    assert len(trainer.created) == 1


def test_a_finished_jobs_outputs_are_taken_without_another(
    trainer: Trainer, tone_corpus: dict[str, Path], made: Path, tmp_path: Path
) -> None:
    """The component was killed between the job's end and its own."""
    trainer.play = delivering(made)
    trainer.refusals["DELETE"] = (403, "not now")
    with pytest.raises(ValueError, match="found it not to be deleted"):
        run_component(tmp_path, tone_corpus)
    assert not (tmp_path / "encoder").exists()
    run_component(tmp_path, tone_corpus)
    assert len(trainer.created) == 1
    assert digest_folder(tmp_path / "encoder") == digest_folder(made)


def test_a_volume_that_the_pods_do_not_share_is_named(
    trainer: Trainer, tone_corpus: dict[str, Path], tmp_path: Path
) -> None:
    def finish(job: TrainJob) -> None:
        for pod in job.pods:
            pod.finish(0)
        job.conclude()

    trainer.play = finish
    with pytest.raises(ValueError, match=r"found it Complete, but nothing in .*: mount the volume that holds"):
        run_component(tmp_path, tone_corpus)


# ------------------------------------------------------------------------------------------------------- refused


def test_a_refusal_is_told_in_the_servers_words(trainer: Trainer, tone_corpus: dict[str, Path], tmp_path: Path) -> None:
    words = 'trainjobs.trainer.kubeflow.org is forbidden: User "x" cannot create'
    trainer.refusals["POST"] = (403, words)
    with pytest.raises(ValueError, match=r"found it refused \(HTTP 403, trainjobs\.trainer.*cannot create\)") as caught:
        run_component(tmp_path, tone_corpus)
    assert "\n" not in str(caught.value)
    trainer.refusals = {"GET": (403, words)}
    with pytest.raises(ValueError, match=r"found no leave to read it .*ServiceAccount sonorant-pipeline"):
        run_component(tmp_path, tone_corpus)


@pytest.mark.usefixtures("trainer")
def test_an_unknown_runtime_is_named(tone_corpus: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found it refused .*sonorant-torsh"):
        run_component(tmp_path, tone_corpus, runtime="sonorant-torsh")


def test_without_a_cluster_there_is_one_line(
    tone_corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"^launch\.launcher trainjob: found no way to a cluster") as caught:
        run_component(tmp_path, tone_corpus)
    assert "\n" not in str(caught.value)


def test_inputs_are_shared_whole_or_not_at_all(tone_corpus: dict[str, Path], tmp_path: Path) -> None:
    """What a killed component has left behind is not taken for a copy; a copy that is there is not made again."""
    folder = tmp_path / "jobs" / "one"
    work = replace(some_work(tmp_path), inputs=tone_corpus)
    (folder / ".corpus-half").mkdir(parents=True)
    there = share(work, folder)
    for name, path in tone_corpus.items():
        assert digest_folder(there.inputs[name]) == digest_folder(path)
    before = there.inputs["corpus"].stat().st_ino
    assert share(work, folder).inputs["corpus"].stat().st_ino == before


def test_the_servers_own_check_is_the_tests(trainer: Trainer, runs: Path) -> None:
    """A field that the API does not know is refused where a job is created, as a strict API server would."""
    golden = put(yaml.safe_load(GOLDEN.read_text()), "spec.trainer.gpus", 8)
    job = Job(LaunchConfig(launcher="trainjob"), some_work(runs))
    with pytest.raises(Exception, match="strict decoding error"):
        job.client.backend.custom_api.create_namespaced_custom_object(
            "trainer.kubeflow.org", "v1alpha1", "sonorant", "trainjobs", golden
        )
    assert trainer.play is run_nodes
