"""Every recipe parses at every size, runs two updates with a tiny model, and is what was published."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from sonorant.config import SECTIONS, PretrainConfig, TaskName, TrainConfig
from sonorant.params import check_params, parse_section, read_params
from sonorant.steps import pretrain
from sonorant.training.journal import read_journal
from tests.tiny import write_tone_corpus

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
BY_STEP = {path.stem: set(read_params([path])) for path in sorted(RECIPES.glob("*.yaml"))}
METHODS = [name for name, steps in BY_STEP.items() if steps == {"pretrain"}]
SIZES = sorted(path.stem for path in (RECIPES / "sizes").glob("*.yaml"))
PUBLISHED = ["hubert", "data2vec", "mt4ssl", "dinosr", "wav2vec2", "mgf"]
MIXTURES = ["mt4ssl+codebooks", "dinosr+utterance"]


def section(*files: str, step: str = "pretrain") -> dict[str, Any]:
    """The only section of recipe files laid over one another, that of `step`."""
    params = read_params([RECIPES / f"{file}.yaml" for file in files])
    assert set(params) == {step}
    values: dict[str, Any] = params[step]
    return values


def parsed(*files: str) -> PretrainConfig:
    """The same as a configuration."""
    return PretrainConfig.model_validate(section(*files))


@pytest.fixture(scope="module")
def tone_corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    corpus, units = write_tone_corpus(tmp_path_factory.mktemp("tones"))
    return {"corpus": corpus, "units": units}


def test_the_methods_of_the_specification_are_there() -> None:
    assert set(METHODS) == {*PUBLISHED, *MIXTURES}
    # Those of the other steps are in test_grounding_recipes.py and test_alignment_recipes.py.
    assert {name for name, steps in BY_STEP.items() if steps == {"ground"}} == {"grounding"}
    assert {name for name, steps in BY_STEP.items() if steps == {"align"}} == {"laser", "laser_wavlm", "score"}
    assert all(len(steps) == 1 for steps in BY_STEP.values())
    assert set(SIZES) == {"small", "tiny"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [[], ["sizes/small"], ["sizes/tiny"]], ids=["base", "small", "tiny"])
def test_a_method_parses_at_every_size(method: str, size: list[str]) -> None:
    assert isinstance(parse_section("pretrain", PretrainConfig, section(method, *size)), PretrainConfig)


@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_says_all_that_the_demo_says(method: str) -> None:
    """Laid over params.yaml nothing of the demo's model is left, but how often it is logged and checkpointed."""
    demo = read_params([RECIPES.parent / "params.yaml", RECIPES / f"{method}.yaml"])["pretrain"]
    config = PretrainConfig.model_validate({**demo, "log_every": 50, "checkpoint_every": 5_000})
    assert config == parsed(method)


@pytest.mark.parametrize("run", sorted(path.stem for path in (RECIPES / "runs").glob("*.yaml")))
def test_a_whole_run_parses(run: str) -> None:
    check_params(read_params([RECIPES / "runs" / f"{run}.yaml"]))


@pytest.mark.parametrize("method", METHODS)
def test_a_method_runs_two_updates(
    method: str, tone_corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SONORANT_RUNS", str(tmp_path / "runs"))
    values = section(method, "sizes/tiny")
    metrics = pretrain(values, **tone_corpus, encoder=tmp_path / "encoder")
    assert [entry["update"] for entry in read_journal(tmp_path / "encoder" / "journal.jsonl")] == [1, 2]
    config = PretrainConfig.model_validate(values)
    assert {name.split("/")[0] for name in metrics if "/" in name} == config.tasks


def test_every_task_has_a_recipe() -> None:
    recipes = [parse_section(step, SECTIONS[step], section(name, step=step)) for name, (step,) in BY_STEP.items()]
    tasks = {task for recipe in recipes if isinstance(recipe, TrainConfig) for task in recipe.tasks}
    assert tasks == set(get_args(TaskName))


@pytest.mark.parametrize(
    ("method", "weights"),
    [
        ("hubert", {"units": 1, "magnitude": 10}),
        ("data2vec", {"teacher": 1}),
        ("mt4ssl", {"units": 1, "teacher": 1}),
        ("dinosr", {"codebooks": 1}),
        ("wav2vec2", {"contrast": 1, "diversity": 0.1, "magnitude": 10}),
        ("mgf", {"waveform": 1, "spectrum": 1, "contrast": 1, "utterance": 0.1}),
        ("mt4ssl+codebooks", {"units": 1, "teacher": 1, "codebooks": 1}),
        ("dinosr+utterance", {"codebooks": 1, "utterance": 0.1}),
    ],
)
def test_a_method_is_a_row_of_weights(method: str, weights: dict[str, float]) -> None:
    (phase,) = parsed(method).phases
    assert phase.weights == weights


def test_single_targets_and_mixtures_differ_from_mt4ssl_in_weights_alone() -> None:
    both = section("mt4ssl")
    for method in ("data2vec", "mt4ssl+codebooks"):
        other = section(method)
        changed = {key for key in {*both, *other} if both.get(key) != other.get(key)}
        # A codebook's alarm and its settings come with it.
        assert changed - {"codebooks", "guard"} == {"phases"}


@pytest.mark.parametrize("method", ["data2vec", "mt4ssl", "dinosr"])
def test_base_is_the_published_setting(method: str) -> None:
    # pretraining.md §0, §1.2 and §2.3.
    config = parsed(method)
    encoder, optim, teacher = config.encoder, config.optim, config.teacher
    assert (encoder.dim, encoder.num_layers, encoder.num_heads, encoder.ffn_dim) == (768, 12, 12, 3072)
    assert encoder.stem_widths == (512,) * 7
    assert (encoder.position_depth, encoder.position_kernel, encoder.position_groups) == (5, 19, 16)
    assert (encoder.pre_norm, encoder.stem_norm) == (False, "layer")
    assert (encoder.dropout, encoder.attention_dropout, encoder.ffn_dropout, encoder.layer_drop) == (0.1, 0.1, 0, 0.05)
    assert (config.masking.share, config.masking.length) == (0.8 if method == "dinosr" else 0.65, 10)
    assert (config.num_updates, optim.learning_rate, optim.weight_decay) == (400_000, 5e-4, 0.01)
    assert (optim.beta1, optim.beta2, optim.eps, optim.max_grad_norm) == (0.9, 0.98, 1e-6, None)
    decay = 0.5 if method == "dinosr" else 0.07
    assert (optim.warmup_share, optim.decay_share, optim.final_scale) == (0.03, decay, 0.01)
    assert (teacher.num_layers, teacher.ramp_updates) == (8, 30_000)
    assert (teacher.start_decay, teacher.end_decay) == (0.999, 0.9999)
    assert teacher.freeze_at == (200_000 if method == "dinosr" else None)
    guard = config.guard
    assert (guard.after_updates, guard.min_target_std, guard.min_prediction_std) == (5_000, 0.1, 0.01)
    # 63.3 minutes of audio an update, from utterances cut to 20 s.
    assert config.batching.batch_seconds == pytest.approx(63.3 * 60, rel=0.001)
    assert config.batching.crop_seconds == 20


def test_dinosr_is_the_published_setting() -> None:
    # pretraining.md §1.2 and §1.4's alarm.
    config = parsed("dinosr")
    assert (config.codebooks.num_codes, config.codebooks.decay, config.codebooks.freeze_at) == (256, 0.9, None)
    assert config.teacher.targets(config.encoder.num_layers) == (5, 6, 7, 8, 9, 10, 11, 12)
    assert (config.stem.freeze, config.guard.min_perplexity) == ("none", 100)


@pytest.mark.parametrize(("method", "gpus"), [("hubert", 32), ("wav2vec2", 64)])
def test_fairseq_bases_are_their_settings(method: str, gpus: int) -> None:
    # fairseq's hubert_base_librispeech.yaml and wav2vec2_base_librispeech.yaml.
    config = parsed(method)
    encoder, optim = config.encoder, config.optim
    assert (encoder.stem_norm, encoder.position_depth, encoder.position_kernel) == ("group", 1, 128)
    assert (optim.warmup_share, optim.decay_share, optim.decay, optim.final_scale) == (0.08, 0.92, "linear", 0)
    assert config.stem.gradient == 0.1
    # 1.4 M samples a GPU, crops of 250,000.
    assert config.batching.batch_seconds == gpus * 87.5
    assert config.batching.crop_seconds == 250_000 / 16_000


def test_wav2vec2_anneals_its_temperature() -> None:
    quantiser = parsed("wav2vec2").quantiser
    assert (quantiser.num_groups, quantiser.num_codes, quantiser.dim) == (2, 320, 256)
    assert (quantiser.start_temperature, quantiser.end_temperature) == (2, 0.5)
    # 2 · 0.999995^u reaches 0.5 after ln 4 / 5e-6 = 277,000 of 400,000 updates.
    assert quantiser.temperature_decay == 0.999995
