"""LASER's and SCORE's recipes parse, run two updates with a tiny model, and are what was published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sonorant.config import AlignConfig
from sonorant.models.huggingface import save_encoder
from sonorant.params import parse_section, read_params
from sonorant.steps import align
from sonorant.training.journal import read_journal
from sonorant.training.optim import learning_rate
from tests.tiny import make_encoder, with_changes, write_tone_corpus

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
METHODS = ["laser", "laser_wavlm", "score"]
TINY: dict[str, Any] = {
    "num_updates": 2,
    "num_trained_layers": 1,
    "batching": {"batch_seconds": 4, "crop_seconds": 2},
    "log_every": 1,
}


def section(method: str) -> dict[str, Any]:
    """The recipe's only section."""
    params = read_params([RECIPES / f"{method}.yaml"])
    assert set(params) == {"align"}
    values: dict[str, Any] = params["align"]
    return values


def parsed(method: str) -> AlignConfig:
    """The same as a configuration."""
    config = parse_section("align", AlignConfig, section(method))
    assert isinstance(config, AlignConfig)
    return config


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A corpus of tones and a random encoder."""
    folder = tmp_path_factory.mktemp("tones")
    (folder / "encoder").mkdir()
    save_encoder(make_encoder(), folder / "encoder")
    return {"corpus": write_tone_corpus(folder)[0], "encoder": folder / "encoder"}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_runs_two_updates(
    method: str, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SONORANT_RUNS", str(tmp_path / "runs"))
    metrics = align(with_changes(section(method), TINY), **inputs, aligned=tmp_path / "aligned")
    assert [entry["update"] for entry in read_journal(tmp_path / "aligned" / "journal.jsonl")] == [1, 2]
    logged = {"loss", "divergence", "divergence_per_frame", "mean_cosine", "effective_rank"}
    terms = {"repulsion"} if method != "score" else set()
    assert {name.removeprefix("alignment/") for name in metrics if "/" in name} == logged | terms
    assert metrics["alignment/divergence"] > 0


@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_says_all_that_the_demo_says(method: str) -> None:
    """Laid over params.yaml nothing of the demo is left, but how often it is logged and checkpointed."""
    demo = read_params([RECIPES.parent / "params.yaml", RECIPES / f"{method}.yaml"])["align"]
    assert AlignConfig.model_validate({**demo, "log_every": 50, "checkpoint_every": 5_000}) == parsed(method)


@pytest.mark.parametrize("method", METHODS)
def test_what_the_published_settings_share(method: str) -> None:
    # alignment.md §2.1.
    config = parsed(method)
    alignment, optim = config.alignment, config.optim
    assert config.phases[0].weights == {"alignment": 1}
    assert (config.num_updates, config.num_trained_layers) == (3_600, 2)
    assert (alignment.dim, alignment.gamma, alignment.semitones, alignment.window) == (256, 0.1, 2, 0)
    assert (alignment.radius, alignment.repulsion_relative) == (None, 0)
    # From nothing in 1,000 updates, and in a line to nothing.
    rates = {update: learning_rate(update, 3_600, optim) for update in (0, 500, 1_000, 2_300, 3_600)}
    assert rates == pytest.approx({0: 0, 500: 1e-5, 1_000: 2e-5, 2_300: 1e-5, 3_600: 0}, rel=1e-9)
    assert optim.max_grad_norm == 1
    # 8 of 12.7 s: a batch ends before the utterance that would be too much, half a one early on average.
    assert config.batching.batch_seconds == pytest.approx(8.5 * 12.7, abs=1)


@pytest.mark.parametrize(
    ("method", "speeds", "partner", "terms", "margin"),
    [
        ("laser", (0.9, 1, 1.1), "student", (1, 0, 0.4), 1.1),
        ("laser_wavlm", (0.8, 0.85, 0.9, 1, 1.1, 1.15, 1.2), "student", (1, 0, 0.15), 1.0),
        ("score", (0.9, 1, 1.1), "frozen", (0, 1, 0), None),
    ],
)
def test_what_sets_the_published_settings_apart(
    method: str, speeds: tuple[float, ...], partner: str, terms: tuple[float, ...], margin: float | None
) -> None:
    alignment = parsed(method).alignment
    assert (alignment.speeds, alignment.partner) == (speeds, partner)
    assert (alignment.divergence, alignment.divergence_per_frame, alignment.repulsion) == terms
    assert margin is None or alignment.margin == margin
