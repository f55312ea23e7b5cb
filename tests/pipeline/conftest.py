"""What the tests of `pretrain` share: a corpus of tones, and where its runs go."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import write_tone_corpus


@pytest.fixture(scope="module")
def tone_corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The artifacts that the step reads."""
    corpus, units = write_tone_corpus(tmp_path_factory.mktemp("tones"))
    return {"corpus": corpus, "units": units}


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where checkpoints go."""
    folder = tmp_path / "runs"
    monkeypatch.setenv("SONORANT_RUNS", str(folder))
    return folder
