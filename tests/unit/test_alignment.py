"""Alignment: each term against a loop, the task against its terms, what a collapse looks like and what prevents it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from sonorant.config import AlignConfig, AlignmentConfig, OptimConfig
from sonorant.data.batching import Batch
from sonorant.data.frames import pack_waves
from sonorant.data.perturbation import make_twins
from sonorant.models.encoder import Encoder
from sonorant.soft_dtw import soft_dtw_divergence
from sonorant.tasks.alignment import (
    Alignment,
    distances,
    effective_rank,
    mean_cosine,
    repulsion,
    repulsion_relative,
    second_moments,
)
from sonorant.tasks.task import Per
from sonorant.training.distributed import Ranks
from sonorant.training.engine import Engine, build_engine
from sonorant.training.optim import build_optimizer
from sonorant.training.update import count, run_update
from tests.references import alignment as slow
from tests.tiny import encoder_config, make_batch, noise, shaken

LENGTHS = (5_000, 2_600, 4_100)
CPU = torch.device("cpu")


def unit_rows(frames: int, dims: int, seed: int = 0) -> Tensor:
    """Random frames of length one in float64."""
    return F.normalize(torch.from_numpy(np.random.default_rng(seed).standard_normal((frames, dims))), dim=1)


def with_twins(lengths: Sequence[int] = LENGTHS, seed: int = 0, config: AlignmentConfig | None = None) -> Batch:
    """Noise of so many samples each, and its twins."""
    rng = np.random.default_rng(seed)
    waves = [noise(length, seed + index) for index, length in enumerate(lengths)]
    twins = [twin for wave in waves for twin in make_twins(wave, config or AlignmentConfig(), rng)]
    packed, sizes = torch.from_numpy(pack_waves(twins)), tuple(len(twin) for twin in twins)
    return replace(make_batch(lengths, seed=seed), twins=packed, twin_samples=sizes)


def make_aligner(seed: int = 0, num_trained_layers: int | None = 1, **alignment: Any) -> Engine:
    """A random encoder with the one task, in evaluation mode."""
    torch.manual_seed(seed)
    config = AlignConfig.model_validate(
        {
            "phases": [{"weights": {"alignment": 1.0}}],
            "num_trained_layers": num_trained_layers,
            "alignment": {"dim": 8, **alignment},
        }
    )
    encoder = Encoder(encoder_config())
    shaken(encoder, seed)
    return build_engine(config, encoder, 0).eval()


# ------------------------------------------------------------------------------------------------------ terms


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(2, 5), st.floats(0.1, 2.5), st.integers(0, 10), st.integers(0, 10_000))
@example(1, 2, 1.0, 0, 0)
@example(2, 2, 1.0, 1, 0)
def test_both_forms_are_the_loop(frames: int, dims: int, margin: float, window: int, seed: int) -> None:
    z_ND = unit_rows(frames, dims, seed)
    for function, is_relative in ((repulsion, False), (repulsion_relative, True)):
        wanted = slow.contrast_in_time(z_ND.tolist(), margin, window, is_relative)
        # Squares of distances are differences: half of float64's digits where two frames are close.
        assert float(function(z_ND, margin, window)) == pytest.approx(wanted, abs=1e-6)
        # Likewise float32's.
        assert float(function(z_ND.float(), margin, window)) == pytest.approx(wanted, rel=5e-3, abs=5e-3)


@pytest.mark.parametrize("frames", [2, 20, 620])
def test_the_official_form_grows_with_the_square_of_the_length_and_the_relative_does_not(frames: int) -> None:
    """Where all frames agree every pair counts fully: the mean of W̄ is about n²/6, and 1 + (n + 1) / 6n."""
    z_ND = torch.ones(frames, 4) / 2
    official = (frames**2 - 1) / 6 + (frames - 1) / frames
    # Sums of 400,000 float32.
    assert float(repulsion(z_ND, 1.1, 0)) == pytest.approx(1.1 * official, rel=1e-4)
    assert float(repulsion_relative(z_ND, 1.1, 0)) == pytest.approx(1.1 * (1 + (frames + 1) / (6 * frames)), rel=1e-4)


@pytest.mark.parametrize("function", [repulsion, repulsion_relative])
@pytest.mark.parametrize("window", [0, 2])
def test_gradients_are_right(function: Any, window: int) -> None:
    z_ND = unit_rows(6, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: function(z, 1.1, window), (z_ND,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("window", [0, 2])
def test_frames_that_agree_have_a_finite_gradient(dtype: torch.dtype, window: int) -> None:
    """The root's own is infinite at zero; those of frames that agree or nearly do must not drown the others'."""
    for shift in (0.0, 1e-9, 1e-5):
        z_ND = unit_rows(6, 16).to(dtype)
        z_ND[3] = F.normalize(z_ND[2] + shift, dim=0)
        z_ND.requires_grad_()
        (gradient,) = torch.autograd.grad(repulsion_relative(z_ND, 1.1, window), z_ND)
        # Five neighbours, each pulls with less than 2 · W̄ ≤ 4 of 30; the radial part of a root of rounding adds some.
        assert gradient.isfinite().all()
        tangent = gradient - (gradient * z_ND).sum(1, keepdim=True) * z_ND
        assert tangent.norm(dim=1).max() < 1


def test_distances_are_cdist_and_zero_on_the_diagonal() -> None:
    z_ND = unit_rows(40, 256)
    wanted = torch.cdist(z_ND, z_ND, compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(distances(z_ND), wanted)
    assert distances(z_ND.float()).diagonal().tolist() == [0.0] * 40


def test_what_is_half_precise_is_raised() -> None:
    z_ND = unit_rows(30, 16).bfloat16()
    assert repulsion(z_ND, 1.0, 0).dtype == torch.float32
    assert float(repulsion(z_ND, 1.0, 0)) == float(repulsion(z_ND.float(), 1.0, 0))


# ------------------------------------------------------------------------------------------------------- task

EVERY_TERM = {"divergence": 0.3, "divergence_per_frame": 0.7, "repulsion": 0.2, "repulsion_relative": 0.4}


@pytest.mark.parametrize("partner", ["student", "frozen"])
@pytest.mark.parametrize("window", [0, 3])
def test_the_task_is_its_terms_summed_over_utterances(partner: str, window: int) -> None:
    engine = make_aligner(partner=partner, window=window, margin=1.1, gamma=0.2, radius=2, **EVERY_TERM)
    if engine.anchor is not None:
        shaken(engine.anchor, 9)
    batch, task = with_twins(), engine.task("alignment")
    (outcome,) = engine.outcomes(batch, {"alignment": 1.0}).values()
    views = engine.views(batch, {"alignment": task}, 0)
    assert views.twins is not None
    assert views.twin_frames is not None
    hidden = views.twins.output
    theirs = hidden if views.anchors is None else views.anchors.output
    assert (views.anchors is None) == (partner == "student")
    weight, bias = (value.detach().double() for value in task.head.parameters())
    wanted = dict.fromkeys(EVERY_TERM, 0.0)
    slices = list(views.twin_frames.slices())
    for first, second in zip(slices[0::2], slices[1::2], strict=True):
        pair = [F.normalize(part.detach().double() @ weight.T + bias) for part in (hidden[first], theirs[second])]
        divergence = float(soft_dtw_divergence([pair[0]], [pair[1]], 0.2, radius=2, backend="plain"))
        wanted["divergence"] += divergence
        wanted["divergence_per_frame"] += divergence / (len(pair[0]) + len(pair[1]))
        for z_ND in pair[:1] if partner == "frozen" else pair:
            wanted["repulsion"] += slow.contrast_in_time(z_ND.tolist(), 1.1, window, is_relative=False)
            wanted["repulsion_relative"] += slow.contrast_in_time(z_ND.tolist(), 1.1, window, is_relative=True)
    # float32 throughout, and squares of distances.
    assert {name: float(value.detach()) for name, value in outcome.sums.items()} == pytest.approx(wanted, rel=1e-3)
    total = sum(EVERY_TERM[name] * value for name, value in wanted.items())
    assert float(outcome.loss.detach()) == pytest.approx(total, rel=1e-3)
    seen = hidden if partner == "student" else torch.cat([hidden[rows] for rows in slices[0::2]])
    assert outcome.statistics is not None
    assert float(outcome.statistics[0, 0]) == len(seen)


@torch.no_grad()
@pytest.mark.parametrize("partner", ["student", "frozen"])
def test_a_loss_is_the_sum_over_parts(partner: str) -> None:
    engine = make_aligner(partner=partner)
    whole = with_twins()
    found = float(engine(whole, {"alignment": 1.0})[0])
    parts = []
    for row, length in enumerate(LENGTHS):
        sizes = whole.twin_samples[2 * row : 2 * row + 2]
        starts = np.cumsum([0, *(-(-size // 320) * 320 for size in whole.twin_samples)])
        assert whole.twins is not None
        twins = whole.twins[starts[2 * row] : starts[2 * row + 2]]
        parts.append(replace(make_batch([length]), twins=twins, twin_samples=sizes))
    # Float32 sums in another order.
    assert sum(float(engine(part, {"alignment": 1.0})[0]) for part in parts) == pytest.approx(found, rel=1e-4)
    assert engine.task("alignment").per == "utterance"


def test_a_term_of_weight_zero_is_not_computed() -> None:
    (outcome,) = make_aligner(repulsion_relative=0.0).outcomes(with_twins(), {"alignment": 1.0}).values()
    assert set(outcome.sums) == {"divergence", "divergence_per_frame"}


def test_gradients_go_through_both_twins_or_through_one_and_never_into_the_frozen_copy() -> None:
    for partner in ("student", "frozen"):
        engine, batch = make_aligner(partner=partner), with_twins([3_000])
        views = engine.views(batch, {"alignment": engine.task("alignment")}, 0)
        assert views.twins is not None
        assert views.twin_frames is not None
        views.twins.output.retain_grad()
        engine.task("alignment")(views, ()).loss.backward()
        gradient = views.twins.output.grad
        assert gradient is not None
        first, second = (bool(gradient[rows].any()) for rows in views.twin_frames.slices())
        assert (first, second) == (True, partner == "student")
        if engine.anchor is not None:
            assert all(p.grad is None and not p.requires_grad for p in engine.anchor.parameters())


def test_the_frozen_partner_is_the_encoder_as_it_was() -> None:
    """After updates too: the anchors of the same waves stay what they were, bit for bit, in training as well."""
    engine, batch = make_aligner(partner="frozen"), with_twins()
    tasks = {"alignment": engine.task("alignment")}
    before = engine.views(batch, tasks, 0)
    assert before.twins is not None
    assert before.anchors is not None
    torch.testing.assert_close(before.twins.output, before.anchors.output)
    run_updates(engine, batch, 2)
    after = engine.train().views(batch, tasks, 0)
    assert after.twins is not None
    assert after.anchors is not None
    assert torch.equal(after.anchors.output, before.anchors.output)
    assert not torch.allclose(after.twins.output, before.twins.output)


# ---------------------------------------------------------------------------------------------------- collapse


def run_updates(engine: Engine, batch: Batch, num_updates: int, learning_rate: float = 0.01) -> dict[str, float]:
    """What is watched over the last of so many updates on one batch."""
    engine.train()
    optimizer = build_optimizer(engine, OptimConfig(learning_rate=learning_rate))
    config, ranks = AlignConfig.model_validate({"phases": [{"weights": {"alignment": 1}}]}), Ranks(0, 1, CPU)
    counts: dict[Per, float] = {**count([batch]), "update": 1.0}
    for update in range(num_updates):
        engine.monitor()
        run_update(config, engine, engine, optimizer, [batch], {"alignment": 1.0}, counts, update, ranks)
        engine.after_update(update + 1)
    return engine.monitor()


@settings(deadline=None)
@given(st.integers(2, 8), st.integers(2, 5), st.integers(0, 10_000))
def test_what_is_watched_is_the_loop_and_adds_up(frames: int, dims: int, seed: int) -> None:
    parts = [unit_rows(frames, dims, seed), unit_rows(frames + 1, dims, seed + 1)]
    moments, z_FD = sum(map(second_moments, parts)), torch.cat(parts)
    assert isinstance(moments, Tensor)
    assert float(mean_cosine(moments)) == pytest.approx(slow.mean_cosine(z_FD.tolist()), abs=1e-9)
    shares = np.linalg.eigvalsh(np.cov(z_FD.numpy(), rowvar=False, bias=True)).clip(1e-300)
    shares /= shares.sum()
    assert float(effective_rank(moments)) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-6)


def test_a_collapse_shows() -> None:
    one, few, many = torch.ones(50, 16) / 4, torch.eye(16)[torch.arange(48) % 3], torch.eye(16).repeat(3, 1)
    for z_FD, rank in ((one, 1), (few, 2), (many, 15)):  # a covariance has a dimension fewer than there are points
        moments = second_moments(z_FD)
        assert float(effective_rank(moments)) == pytest.approx(rank, rel=1e-6)
    assert float(mean_cosine(second_moments(one))) == pytest.approx(1)
    assert float(mean_cosine(second_moments(torch.cat([many, -many])))) < 0


def test_without_repulsion_frames_become_one_and_with_it_they_do_not() -> None:
    batch = with_twins()
    collapsed = run_updates(make_aligner(repulsion_relative=0.0), batch, 40)
    spread = run_updates(make_aligner(repulsion_relative=1.0, margin=1.2), batch, 40)
    assert collapsed["alignment/mean_cosine"] > 0.98
    assert spread["alignment/mean_cosine"] < 0.7
    assert spread["alignment/effective_rank"] > 2


def test_training_brings_an_utterance_and_its_copy_together() -> None:
    batch = with_twins()
    engine = make_aligner(partner="frozen", repulsion_relative=0.0)
    before = float(engine(batch, {"alignment": 1.0})[0].detach())
    run_updates(engine, batch, 20)
    assert float(engine.eval()(batch, {"alignment": 1.0})[0].detach()) < 0.7 * before


# ------------------------------------------------------------------------------------------------------ config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"divergence": 0, "divergence_per_frame": 0}, "divergence and divergence_per_frame are both 0"),
        ({"speeds": []}, "at least 1 item"),
        ({"speeds": [1.005]}, "multiple of 0.01"),
        ({"speeds": [4.0]}, "less than or equal to 3"),
        ({"radius": 1}, "greater than or equal to 2"),
        ({"gamma": 0}, "greater than 0"),
        ({"partner": "teacher"}, "'student' or 'frozen'"),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AlignmentConfig.model_validate(values)


def test_published_speeds_are_taken() -> None:
    speeds = (0.8, 0.85, 0.9, 1.0, 1.1, 1.15, 1.2)
    assert AlignmentConfig(speeds=speeds).speeds == speeds


def test_the_task_is_built_on_the_encoders_width() -> None:
    task = make_aligner().task("alignment")
    assert isinstance(task, Alignment)
    assert task.head.weight.shape == (8, 32)
