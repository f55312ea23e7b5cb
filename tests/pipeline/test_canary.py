"""A rollout for real: two embedding servers, a store, and the graph that moves a model from one to the other."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import soundfile

from sonorant.artifacts import read_record
from sonorant.config.release import CanaryConfig
from sonorant.data.corpus import Row, Taken, write_corpus
from sonorant.release.canary import await_model, check, draw_waves, judge_canary, percentile
from tests.serving.conftest import RunningServer
from tests.tiny import write_model, write_tone_corpus

SERVER = {"SONORANT_SERVE_NUM_WORKERS": "1", "SONORANT_SERVE_WATCH_SECONDS": "0.2"}
# Tests assert no time: however busy the machine is, latency decides nothing here.
LIMITS: Mapping[str, Any] = {"num_requests": 12, "num_reports": 3, "wait_seconds": 60.0, "max_slowdown": 1e6}


def digest_of(model: Path) -> str:
    return str(read_record(model, "model")["digest"])


@contextmanager
def served(model: Path, folder: Path) -> Iterator[RunningServer]:
    """`python -m serving` on the folder, ended by its process id."""
    folder.mkdir()
    server = RunningServer(model, folder, SERVER)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model in production, a good candidate, and one whose codebook is not that of its record."""
    folder = tmp_path_factory.mktemp("models")
    models = {name: write_model(folder / name / "model", seed) for seed, name in enumerate(("old", "new", "other"))}
    shutil.copytree(models["new"], folder / "twisted" / "model")
    shutil.copy(models["other"] / "codebook.safetensors", folder / "twisted" / "model")
    return {**models, "twisted": folder / "twisted" / "model"}


@pytest.fixture(scope="module")
def urls(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A server for each of three models."""
    folder = tmp_path_factory.mktemp("servers")
    with ExitStack() as stack:
        servers = {name: stack.enter_context(served(models[name], folder / name)) for name in ("old", "new", "twisted")}
        for server in servers.values():
            server.wait()
        yield {name: server.url for name, server in servers.items()}


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve short recordings."""
    folder = tmp_path_factory.mktemp("speech")
    write_tone_corpus(folder)
    return folder / "raw"


def test_a_good_canary_stands_the_check(
    models: dict[str, Path], urls: dict[str, str], speech: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await_model(LIMITS, urls["new"], digest_of(models["new"]))
    found = check(LIMITS, speech, models["new"], urls["new"], urls["old"], digest_of(models["old"]))
    assert found["equal_units"] == 1
    assert found["num_requests"] == 12
    assert {"canary_p95_ms", "production_p95_ms"} < set(found)
    assert "check: num_requests 12, equal_units 1, canary_p95_ms" in capsys.readouterr().out


def test_with_nothing_in_production_only_the_canary_is_asked(
    models: dict[str, Path], urls: dict[str, str], speech: Path
) -> None:
    assert "production_p95_ms" not in check(LIMITS, speech, models["new"], urls["new"], "http://127.0.0.1:1", "")


def test_units_that_are_not_the_models_own_are_found(
    models: dict[str, Path], urls: dict[str, str], speech: Path
) -> None:
    """The server reports the right digest, for that is what the folder says of itself."""
    await_model(LIMITS, urls["twisted"], digest_of(models["new"]))
    with pytest.raises(ValueError, match=r"canary: found \d+\.\d\d% of its units equal to the model's own"):
        check(LIMITS, speech, models["new"], urls["twisted"], urls["old"], digest_of(models["old"]))


@pytest.mark.parametrize(
    ("canary", "incumbent", "wanted"),
    [
        ("old", "old", "canary, .*found an answer of model"),
        ("new", "other", "production, .*found an answer of model"),
        ("nobody", "old", "canary, .*found no answer"),
    ],
)
def test_an_answer_of_another_model_or_none_is_a_fault(
    models: dict[str, Path], urls: dict[str, str], speech: Path, canary: str, incumbent: str, wanted: str
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = urls.get(canary, f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(ValueError, match=wanted) as caught:
            check(LIMITS, speech, models["new"], url, urls["old"], digest_of(models[incumbent]))
    assert "\n" not in str(caught.value)


def test_waiting_for_a_model_is_bounded(models: dict[str, Path], urls: dict[str, str]) -> None:
    limits = {**LIMITS, "wait_seconds": 0.5}
    with pytest.raises(ValueError, match=rf"found {digest_of(models['old'])} after 0\.5 s, wanted the model"):
        await_model(limits, urls["old"], digest_of(models["new"]))
    with pytest.raises(ValueError, match="found no answer"):
        await_model(limits, "http://127.0.0.1:1", digest_of(models["new"]))


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        ({"equal_units": 0.999, "canary_p95_ms": 200.0, "production_p95_ms": 100.0}, None),
        ({"equal_units": 0.998, "canary_p95_ms": 10.0, "production_p95_ms": 100.0}, "99.80%"),
        ({"equal_units": 1.0, "canary_p95_ms": 201.0, "production_p95_ms": 100.0}, "201 ms, wanted at most 200 ms"),
        ({"equal_units": 1.0, "canary_p95_ms": 1e9}, None),
    ],
)
def test_what_the_canary_must_stand(found: dict[str, float], fault: str | None) -> None:
    config = CanaryConfig(min_equal_units=0.999, max_slowdown=1.5, slack_ms=50)
    if fault is None:
        judge_canary(config, found)
    else:
        with pytest.raises(ValueError, match=fault):
            judge_canary(config, found)


def test_the_percentile_is_the_least_value_that_the_share_does_not_exceed() -> None:
    assert [percentile(range(1, 21), share) for share in (0.05, 0.5, 0.95, 0.96, 1.0)] == [1, 10, 19, 20, 20]
    assert percentile([7.0], 0.95) == 7


def test_speech_is_a_corpus_or_a_folder(speech: Path, tmp_path: Path) -> None:
    names = [name for name, _ in draw_waves(speech, CanaryConfig(num_requests=4))]
    assert names == ["00.flac", "03.flac", "06.flac", "09.flac"]
    with pytest.raises(ValueError, match=r"found nothing of up to 0\.1 s"):
        draw_waves(speech, CanaryConfig(max_seconds=0.1))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="found no audio file"):
        draw_waves(tmp_path / "empty", CanaryConfig())
    rows = [
        Row(id=f"t{path.stem}", source="tones", speaker="s", path=path, split="test")
        for path in sorted(speech.iterdir())
    ]
    taken = [Taken(row, "test", row.id, soundfile.info(row.path).frames, row.path, None) for row in rows[:5]]
    (tmp_path / "corpus").mkdir()
    write_corpus(tmp_path / "corpus", taken, [], {"tones": {"kind": "synthetic"}})
    drawn = draw_waves(tmp_path / "corpus", CanaryConfig(num_requests=50))
    assert [name for name, _ in drawn] == [row.id for row in rows[:5]]
    assert [len(wave) for _, wave in drawn] == [one.num_samples for one in taken]
    # These have a train and a dev split; what was trained on proves nothing.
    with pytest.raises(ValueError, match="test"):
        draw_waves(speech.with_name("corpus"), CanaryConfig())
