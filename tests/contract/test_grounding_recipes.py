"""The nine schedules parse over every setting, run two updates with a tiny model, and are the study's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sonorant.config import GroundConfig
from sonorant.params import parse_section, read_params
from sonorant.steps import ground
from sonorant.training.journal import read_journal
from sonorant.training.optim import learning_rate
from tests.tiny import encoder_config, with_changes, write_pairs_corpus

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SCHEDULES = sorted(path.stem for path in (RECIPES / "schedules").glob("*.yaml"))
RUNS = sorted(path.stem for path in (RECIPES / "runs").glob("*.yaml") if "ground" in read_params([path]))
W2V2 = {"contrast": 1, "diversity": 0.1, "magnitude": 1}
VGS = {"grounding": 1}
PLUS = {"grounding": 0.5, "contrast": 0.5, "diversity": 0.05, "magnitude": 0.5}
STUDY: dict[str, list[dict[str, float]]] = {
    "w2v2": [W2V2],
    "vgs": [VGS],
    "vgs_plus": [PLUS],
    "w2v2_then_vgs_plus": [W2V2, PLUS],
    "vgs_then_vgs_plus": [VGS, PLUS],
    "w2v2_then_vgs": [W2V2, VGS],
    "vgs_then_w2v2": [VGS, W2V2],
    "vgs_plus_then_w2v2": [PLUS, W2V2],
    "vgs_plus_then_vgs": [PLUS, VGS],
}
TINY: dict[str, Any] = {
    "num_updates": 2,
    "encoder": encoder_config().model_dump(mode="json"),
    "grounding": {
        "layer": 1, "dim": 8, "branch_widths": [8, 12], "branch_heads": 2,
        "image": {"kind": "small", "side": 12, "patch": 6, "dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 32},
    },
    "teacher": {"num_layers": 2},
    "codebooks": {"num_codes": 6},
    "contrast": {"dim": 8, "num_negatives": 5},
    "quantiser": {"num_codes": 4, "dim": 8},
    "batching": {"batch_seconds": 6, "crop_seconds": 2},
    "log_every": 1,
}  # fmt: skip


def section(*files: str) -> dict[str, Any]:
    """The `ground` section of recipe files laid over one another."""
    values: dict[str, Any] = read_params([RECIPES / f"{file}.yaml" for file in files])["ground"]
    return values


def parsed(*files: str) -> GroundConfig:
    """The same as a configuration."""
    config = parse_section("ground", GroundConfig, section(*files))
    assert isinstance(config, GroundConfig)
    return config


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tones, each with its image, and their units."""
    corpus, units = write_pairs_corpus(tmp_path_factory.mktemp("pairs"))
    return {"corpus": corpus, "units": units}


def run(values: dict[str, Any], inputs: dict[str, Path], folder: Path) -> list[dict[str, Any]]:
    """The journal of two updates with a tiny model."""
    ground(with_changes(values, TINY), **inputs, grounded=folder / "grounded", scratch=folder / "scratch")
    entries = read_journal(folder / "grounded" / "journal.jsonl")
    assert [entry["update"] for entry in entries] == [1, 2]
    return entries


def test_the_nine_scenarios_are_there() -> None:
    # grounding.md §1.4.
    assert set(SCHEDULES) == set(STUDY)
    for name, rows in STUDY.items():
        phases = parsed("grounding", f"schedules/{name}").phases
        assert [phase.weights for phase in phases] == rows
        # 20 and 50 epochs of 70; the optimizer forgets in between.
        shares = [1] if len(rows) == 1 else [20 / 70, 50 / 70]
        assert [phase.share for phase in phases] == pytest.approx(shares, abs=1e-6)
        assert [phase.reset_optimizer for phase in phases] == [False, True][: len(rows)]


@pytest.mark.parametrize("setting", ["../params", *(f"runs/{run}" for run in RUNS)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_lies_over_other_settings(name: str, setting: str) -> None:
    assert parsed(setting, f"schedules/{name}").phases == parsed("grounding", f"schedules/{name}").phases


def test_the_recipe_says_all_that_the_demo_says() -> None:
    """Laid over params.yaml nothing of the demo is left, but how often it is logged and checkpointed."""
    demo = section("../params", "grounding")
    assert GroundConfig.model_validate({**demo, "log_every": 50, "checkpoint_every": 5_000}) == parsed("grounding")


def test_the_recipe_is_the_published_setting() -> None:
    # grounding.md §1.1 to §1.3.
    config = parsed("grounding")
    encoder, grounding, optim = config.encoder, config.grounding, config.optim
    assert encoder is not None
    assert (encoder.dim, encoder.num_layers, encoder.num_heads, encoder.ffn_dim) == (768, 12, 12, 3072)
    assert (encoder.stem_norm, encoder.position_depth, encoder.position_kernel) == ("group", 1, 128)
    assert (grounding.layer, grounding.dim, grounding.branch_widths) == (8, 768, (128, 256, 512, 768))
    assert (grounding.similarity, grounding.margin, grounding.queue_size) == ("dot", 1, 0)
    image = grounding.image
    assert (image.kind, image.region_dim, image.dim, image.num_layers) == ("regions", 2048, 768, 6)
    assert (config.masking.share, config.masking.length, config.masking.equalise) == (0.65, 10, True)
    assert (optim.beta1, optim.beta2, optim.eps, optim.weight_decay, optim.max_grad_norm) == (0.9, 0.999, 1e-6, 0.01, 1)
    rates = {update: learning_rate(update, 1_000, optim) for update in (0, 50, 100, 550, 1_000)}
    assert rates == pytest.approx({0: 0, 50: 5e-5, 100: 1e-4, 550: 5e-5, 1_000: 0}, abs=1e-12)
    # 64 of 4.4 s, less half a one.
    assert config.batching.batch_seconds == pytest.approx(64.5 * 4.4, abs=1)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_runs_two_updates(name: str, inputs: dict[str, Path], tmp_path: Path) -> None:
    entries = run(section("grounding", f"schedules/{name}"), inputs, tmp_path)
    for entry, weights in zip(entries, [STUDY[name][0], STUDY[name][-1]], strict=True):
        assert {key.split("/")[0] for key in entry if key.endswith("/loss")} == set(weights)
    is_grounded = any("grounding" in weights for weights in STUDY[name])
    assert (tmp_path / "grounded" / "grounding.json").exists() == is_grounded


@pytest.mark.parametrize("method", ["dinosr", "mt4ssl", "data2vec"])
def test_any_recipe_of_pretraining_takes_the_place_of_wav2vec2(
    method: str, inputs: dict[str, Path], tmp_path: Path
) -> None:
    """Its sections, with its row of weights before grounding's."""
    alone: dict[str, Any] = read_params([RECIPES / f"{method}.yaml"])["pretrain"]
    phases = section("schedules/w2v2_then_vgs")["phases"]
    phases[0]["weights"] = alone["phases"][0]["weights"]
    values = with_changes(alone, {"grounding": section("grounding")["grounding"], "phases": phases})
    assert parse_section("ground", GroundConfig, values) == GroundConfig.model_validate(values)
    first, second = run(values, inputs, tmp_path)
    assert {key.split("/")[0] for key in first if key.endswith("/loss")} == set(phases[0]["weights"])
    assert {key for key in second if key.endswith("/loss")} == {"grounding/loss"}
