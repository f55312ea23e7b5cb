"""Every recipe parses, runs two updates with a tiny model, and differs from the others in weights alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sonorant.config import PretrainConfig
from sonorant.params import check_params, parse_section, read_params
from sonorant.steps import pretrain
from sonorant.training.journal import read_journal
from tests.tiny import write_tone_corpus

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
METHODS = sorted(path.stem for path in RECIPES.glob("*.yaml"))
SIZES = sorted(path.stem for path in (RECIPES / "sizes").glob("*.yaml"))
FIRST = ["hubert", "data2vec", "mt4ssl"]
"""The methods that share MT4SSL's student and masking (pretraining.md §2)."""


def section(*files: str) -> dict[str, Any]:
    """The `pretrain` section of recipe files laid over one another."""
    params = read_params([RECIPES / f"{file}.yaml" for file in files])
    assert set(params) == {"pretrain"}
    values: dict[str, Any] = params["pretrain"]
    return values


@pytest.fixture(scope="module")
def tone_corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    corpus, units = write_tone_corpus(tmp_path_factory.mktemp("tones"))
    return {"corpus": corpus, "units": units}


def test_the_methods_of_the_specification_are_there() -> None:
    assert set(FIRST) <= set(METHODS)
    assert {"base", "small", "tiny"} <= set(SIZES)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", SIZES)
def test_a_method_parses_at_every_size(method: str, size: str) -> None:
    values = section(f"sizes/{size}", method)
    assert values == section(method, f"sizes/{size}"), "methods and sizes choose different things"
    assert isinstance(parse_section("pretrain", PretrainConfig, values), PretrainConfig)


@pytest.mark.parametrize("run", sorted(path.stem for path in (RECIPES / "runs").glob("*.yaml")))
def test_a_whole_run_parses(run: str) -> None:
    check_params(read_params([RECIPES / "runs" / f"{run}.yaml"]))


@pytest.mark.parametrize("method", METHODS)
def test_a_method_runs_two_updates(
    method: str, tone_corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SONORANT_RUNS", str(tmp_path / "runs"))
    values = section("sizes/tiny", method)
    metrics = pretrain(values, **tone_corpus, encoder=tmp_path / "encoder")
    assert [entry["update"] for entry in read_journal(tmp_path / "encoder" / "journal.jsonl")] == [1, 2]
    config = PretrainConfig.model_validate(values)
    wanted = {name for phase in config.phases for name, weight in phase.weights.items() if weight}
    assert {name.split("/")[0] for name in metrics if "/" in name} == wanted


def test_methods_differ_in_weights_alone() -> None:
    rows = {method: section(method) for method in FIRST}
    weights = {method: row.pop("phases") for method, row in rows.items()}
    assert rows["hubert"] == rows["data2vec"] == rows["mt4ssl"]
    assert weights["hubert"] == [{"weights": {"units": 1, "teacher": 0}}]
    assert weights["data2vec"] == [{"weights": {"units": 0, "teacher": 1}}]
    assert weights["mt4ssl"] == [{"weights": {"units": 1, "teacher": 1}}]


def test_base_is_the_published_setting() -> None:
    # pretraining.md §0 and §2.3.
    config = PretrainConfig.model_validate(section("sizes/base", "mt4ssl"))
    encoder, optim, teacher = config.encoder, config.optim, config.teacher
    assert (encoder.dim, encoder.num_layers, encoder.num_heads, encoder.ffn_dim) == (768, 12, 12, 3072)
    assert encoder.stem_widths == (512,) * 7
    assert (encoder.position_depth, encoder.position_kernel, encoder.position_groups) == (5, 19, 16)
    assert (encoder.pre_norm, encoder.stem_norm) == (False, "layer")
    assert (encoder.dropout, encoder.attention_dropout, encoder.ffn_dropout, encoder.layer_drop) == (0.1, 0.1, 0, 0.05)
    assert (config.masking.share, config.masking.length) == (0.65, 10)
    assert (config.num_updates, optim.learning_rate, optim.weight_decay) == (400_000, 5e-4, 0.01)
    assert (optim.beta1, optim.beta2, optim.eps, optim.max_grad_norm) == (0.9, 0.98, 1e-6, None)
    assert (optim.warmup_share, optim.decay_share, optim.final_scale) == (0.03, 0.07, 0.01)
    assert (teacher.num_layers, teacher.ramp_updates) == (8, 30_000)
    assert (teacher.start_decay, teacher.end_decay) == (0.999, 0.9999)
    guard = config.guard
    assert (guard.after_updates, guard.min_target_std, guard.min_prediction_std) == (5_000, 0.1, 0.01)
    # 63.3 minutes of audio an update, from utterances cut to 20 s.
    assert config.batching.batch_seconds == pytest.approx(63.3 * 60, rel=0.001)
    assert config.batching.crop_seconds == 20
