"""Contrast, its quantiser, and what keeps both alive: negatives, losses and gradients against loops."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sonorant.config import QuantiserConfig
from sonorant.models.quantizer import Quantizer, gumbel, straight_through
from sonorant.tasks.contrast import Contrast, draw_negatives, info_nce
from sonorant.tasks.diversity import unused_share
from sonorant.tasks.magnitude import mean_square
from sonorant.tasks.task import Outcome, Views
from sonorant.tasks.units import cosine_logits
from sonorant.training.engine import Engine
from tests.references import contrast as slow
from tests.references.losses import cross_entropy, spread
from tests.tiny import alone, make_batch, make_engine

PLACES = st.sets(st.integers(0, 25), min_size=1, max_size=12).map(sorted)
SHAPES = st.tuples(st.integers(1, 6), st.integers(2, 5), st.integers(0, 10_000))
ALMOST_ONE = 1 - 2**-24
"""The greatest float32 below one."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal values in float64."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def make_contrast(targets: str = "quantised", **config: object) -> tuple[Engine, Contrast]:
    """A tiny training engine with `contrast` alone, and that task."""
    engine = make_engine(tasks=["contrast"], sections={"contrast": {"dim": 8, "targets": targets, **config}})
    task = engine.task("contrast")
    assert isinstance(task, Contrast)
    return engine.train(), task


def run(engine: Engine, task: Contrast, lengths: list[int], seed: int = 0) -> tuple[Views, Outcome]:
    """The task on a batch, and the views it read."""
    views = engine.views(make_batch(lengths, seed=seed), {"contrast": task}, 0)
    return views, task(views, ())


# ------------------------------------------------------------------------------------------------------ negatives


@settings(deadline=None)
@given(PLACES, st.integers(1, 6), st.lists(st.floats(0, ALMOST_ONE, width=32), min_size=1, max_size=8))
def test_negatives_are_picked_from_those_allowed(places: list[int], distance: int, numbers: list[float]) -> None:
    uniform = torch.tensor(numbers).expand(len(places), -1)
    found, has_any = draw_negatives(uniform, torch.tensor(places), distance)
    assert found.shape == uniform.shape
    for own in range(len(places)):
        choices = slow.allowed(places, own, distance)
        assert bool(has_any[own]) == bool(choices)
        for u, negative in zip(uniform[own].tolist(), found[own].tolist(), strict=True):
            assert 0 <= negative < len(places), "even one that will not count must be some frame"
            if choices:
                # The oracle multiplies in float64; at the border of two choices float32 may take the next.
                near = {choices[int(u * len(choices) + e) if u * len(choices) + e >= 0 else 0] for e in (-1e-5, 0.0)}
                upper = min(int(u * len(choices) + 1e-5), len(choices) - 1)
                assert negative in near | {choices[upper]}
                assert negative != own


def test_every_allowed_frame_is_as_likely() -> None:
    places, draws = [0, 1, 4, 5, 6, 11, 20], 20_000
    uniform = torch.rand(len(places), draws, generator=torch.Generator().manual_seed(0))
    found, _ = draw_negatives(uniform, torch.tensor(places), 3)
    for own in range(len(places)):
        choices = slow.allowed(places, own, 3)
        counts = np.bincount(found[own].numpy(), minlength=len(places))
        assert set(np.flatnonzero(counts)) == set(choices)
        expected = draws / len(choices)
        # χ² with at most 5 degrees of freedom exceeds 20.5 once in a thousand; the draws are fixed.
        assert float(((counts[choices] - expected) ** 2 / expected).sum()) < 20.5


def test_a_lonely_frame_has_no_negative() -> None:
    _, has_any = draw_negatives(torch.rand(1, 4), torch.tensor([7]), 1)
    assert has_any.tolist() == [False]
    _, has_any = draw_negatives(torch.rand(3, 4), torch.tensor([0, 2, 9]), 3)
    assert has_any.tolist() == [True, True, True]
    _, has_any = draw_negatives(torch.rand(3, 4), torch.tensor([0, 2, 4]), 4)
    assert has_any.tolist() == [True, False, True]


# ---------------------------------------------------------------------------------------------------------- losses


@settings(deadline=None)
@given(SHAPES)
def test_info_nce_is_the_loop(shape: tuple[int, int, int]) -> None:
    frames, others, seed = shape
    scores = 5 * normal(frames, 1 + others, seed=seed)
    allowed = torch.from_numpy(np.random.default_rng(seed).random((frames, 1 + others)) < 0.6)
    allowed[:, 0] = True
    wanted = 0.0
    for row, mask in zip(scores.tolist(), allowed.tolist(), strict=True):
        wanted += slow.info_nce(row[0], [score for score, may in zip(row[1:], mask[1:], strict=True) if may])
    assert float(info_nce(scores, allowed)) == pytest.approx(wanted, rel=1e-12, abs=1e-12)
    # The loss of lower precision is float32: seven digits.
    assert float(info_nce(scores.float(), allowed)) == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_info_nce_has_the_right_gradient_and_none_where_nothing_counts() -> None:
    allowed = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
    scores = normal(3, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: info_nce(x, allowed), (scores,))
    (gradient,) = torch.autograd.grad(info_nce(scores, allowed), scores)
    assert torch.equal(gradient[~allowed], torch.zeros(3, dtype=torch.float64))
    assert torch.equal(gradient[1], torch.zeros(3, dtype=torch.float64)), "no negative: nothing to learn"


def test_info_nce_stays_finite_in_half_precision() -> None:
    scores = torch.tensor([[-10.0, 10.0, 10.0]], dtype=torch.bfloat16)
    found = info_nce(scores, torch.tensor([[True, True, False]]))
    assert found.dtype == torch.float32
    # log(1 + e²⁰).
    assert float(found) == pytest.approx(20, rel=1e-6)


@settings(deadline=None)
@given(SHAPES, st.integers(1, 3))
def test_unused_share_is_the_loop(shape: tuple[int, int, int], groups: int) -> None:
    frames, codes, seed = shape
    probabilities = (3 * normal(frames, groups, codes, seed=seed)).softmax(2)
    found = float(unused_share(probabilities.mean(0)))
    # 1e-7 within the logarithm, and float64 otherwise.
    assert found == pytest.approx(slow.unused_share(probabilities.tolist()), abs=1e-6)


def test_unused_share_goes_from_nothing_to_nearly_all() -> None:
    assert float(unused_share(torch.full((2, 320), 1 / 320))) == pytest.approx(0, abs=1e-4)
    one = torch.zeros(2, 320)
    one[:, 7] = 1
    # One code of 320 in each group is used. 1e-4 above: 320 · 1e-7 within the logarithm.
    assert float(unused_share(one)) == pytest.approx(1 - 1 / 320, abs=1e-5)
    half = torch.zeros(1, 4)
    half[0, :2] = 0.5
    assert float(unused_share(half)) == pytest.approx(0.5, abs=1e-5)


def test_unused_share_has_the_right_gradient() -> None:
    logits = normal(2, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: unused_share(x.softmax(1)), (logits,))
    flat = torch.full((2, 5), 0.2, dtype=torch.float64).log().requires_grad_()
    (gradient,) = torch.autograd.grad(unused_share(flat.softmax(1)), flat)
    # Uniform use is the minimum.
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-7, rtol=0)


@settings(deadline=None)
@given(SHAPES)
def test_mean_square_is_the_loop(shape: tuple[int, int, int]) -> None:
    frames, channels, seed = shape
    x = 3 * normal(frames, channels, seed=seed)
    assert float(mean_square(x)) == pytest.approx(slow.mean_square(x.tolist()), rel=1e-12)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(mean_square(x), x)
    torch.testing.assert_close(gradient, 2 * x.detach() / channels)


def test_mean_square_has_the_right_gradient_and_stays_float32() -> None:
    assert torch.autograd.gradcheck(mean_square, (normal(3, 4).requires_grad_(),))
    assert mean_square(torch.full((4_000, 8), 3.0, dtype=torch.bfloat16)).item() == 36_000


def test_magnitude_reads_the_stem_before_its_norm() -> None:
    engine, batch = make_engine(tasks=["magnitude"]), make_batch([5_000, 3_000])
    loss, _ = engine(batch, {"magnitude": 1.0})
    stem = engine.encoder.stem(batch.waves, batch.num_samples)
    # float32 sums of some twenty frames.
    assert loss.item() == pytest.approx(slow.mean_square(stem.tolist()), rel=1e-5)
    loss.backward()
    assert {name.split(".")[1] for name, p in engine.named_parameters() if p.grad is not None} == {"stem"}


# --------------------------------------------------------------------------------------------- HuBERT's cosine head


@settings(deadline=None)
@given(SHAPES, st.integers(1, 4))
def test_cosine_logits_are_the_loop(shape: tuple[int, int, int], dims: int) -> None:
    frames, units, seed = shape
    projected, embeddings = normal(frames, dims, seed=seed), normal(units, dims, seed=seed + 1)
    found = cosine_logits(projected, embeddings, 0.1)
    wanted = torch.tensor(slow.cosine_logits(projected.tolist(), embeddings.tolist(), 0.1), dtype=torch.float64)
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=0)
    assert float(found.abs().max()) <= 10 + 1e-9


def test_cosine_logits_have_the_right_gradients_and_no_length() -> None:
    projected, embeddings = normal(3, 4).requires_grad_(), normal(5, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: cosine_logits(a, b, 0.1), (projected, embeddings))
    longer = cosine_logits(7 * projected, 0.2 * embeddings, 0.1)
    torch.testing.assert_close(longer, cosine_logits(projected, embeddings, 0.1))
    with torch.autocast("cpu", torch.bfloat16):
        assert cosine_logits(projected.bfloat16(), embeddings.float(), 0.1).dtype == torch.float32


def test_a_cosine_head_is_trained_by_its_cosines() -> None:
    engine = make_engine(tasks=["units"], sections={"units": {"cosine_dim": 6, "temperature": 0.2}})
    batch, task = make_batch([5_000, 3_000]), engine.task("units")
    assert batch.units is not None
    views = engine.views(batch, {"units": task}, 0)
    assert views.masked is not None
    outcome = task(views, ())
    embeddings = task.get_parameter("embeddings")
    assert embeddings.shape == (5, 6)
    projected = task.get_submodule("head")(views.masked.output[batch.mask])
    logits = slow.cosine_logits(projected.tolist(), embeddings.tolist(), 0.2)
    # float32 cosines over τ.
    assert outcome.loss.item() == pytest.approx(cross_entropy(logits, batch.units[batch.mask].tolist()), rel=1e-5)
    outcome.loss.backward()
    for parameter in (embeddings, *task.get_submodule("head").parameters()):
        assert parameter.grad is not None
        assert float(parameter.grad.abs().max()) > 1e-4
    # The loss does not depend on an embedding's length, so its gradient is at right angles to it.
    assert embeddings.grad is not None
    along = (embeddings.grad * embeddings).sum(1).detach()
    torch.testing.assert_close(along, torch.zeros(5), atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------- quantiser


def make_quantizer(**config: object) -> Quantizer:
    """Seven features to two groups of four codes, three dimensions each."""
    torch.manual_seed(0)
    return Quantizer(7, QuantiserConfig.model_validate({"num_groups": 2, "num_codes": 4, "dim": 6, **config}))


def test_gumbel_noise_has_its_mean_and_variance_and_is_finite() -> None:
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    found = gumbel(uniform).double()
    # π²/6 over 200,000 draws: the mean is known to 0.0029, the variance (kurtosis 5.4) to 0.0077; four of these.
    assert float(found.mean()) == pytest.approx(0.5772, abs=0.012)
    assert float(found.var()) == pytest.approx(math.pi**2 / 6, abs=0.031)
    # P(x < 0) = e^-1.
    assert float((found < 0).double().mean()) == pytest.approx(math.exp(-1), abs=0.005)
    ends = gumbel(torch.tensor([0.0, ALMOST_ONE, 1.0, 0.5]))
    assert bool(ends.isfinite().all())
    assert float(ends[1]) == pytest.approx(24 * math.log(2), rel=1e-3)
    assert float(ends[3]) == pytest.approx(-math.log(math.log(2)), rel=1e-5)


def test_noise_picks_codes_as_softmax_says() -> None:
    """argmax of logits plus Gumbel noise is a draw from the softmax (Gumbel 1954)."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    noise = gumbel(torch.rand(40_000, 4, generator=torch.Generator().manual_seed(0)))
    _, codes = straight_through((logits + noise)[:, None], 0.5)
    found = torch.bincount(codes[:, 0], minlength=4) / 40_000
    # √(p (1 − p) / 40,000) is at most 0.0025; four of these.
    torch.testing.assert_close(found, torch.tensor(slow.softmax(logits.tolist())), atol=0.01, rtol=0)


@pytest.mark.parametrize("temperature", [2.0, 0.5])
def test_straight_through_chooses_hard_and_learns_soft(temperature: float) -> None:
    logits, vectors = normal(5, 2, 4).requires_grad_(), normal(5, 2, 4, seed=1)
    chosen, codes = straight_through(logits, temperature)
    assert torch.equal(codes, logits.argmax(2))
    hard = torch.nn.functional.one_hot(codes, 4).double()
    # hard − soft + soft: a rounding of float64.
    torch.testing.assert_close(chosen, hard, atol=1e-15, rtol=0)
    (gradient,) = torch.autograd.grad((chosen * vectors).sum(), logits)
    for m in range(5):
        for g in range(2):
            p = slow.softmax((logits[m, g] / temperature).tolist())
            mean = sum(a * b for a, b in zip(p, vectors[m, g].tolist(), strict=True))
            # ∂/∂x_v Σ p w = p_v (w_v − Σ p w) / τ.
            wanted = [a * (b - mean) / temperature for a, b in zip(p, vectors[m, g].tolist(), strict=True)]
            torch.testing.assert_close(gradient[m, g], torch.tensor(wanted, dtype=torch.float64))


def test_the_quantiser_gives_each_group_its_codeword() -> None:
    quantizer, features = make_quantizer(), normal(9, 7).float()
    found = quantizer(features, None, 1.0)
    logits = quantizer.logits(features).detach()
    for m in range(9):
        rows = [logits[m, 4 * g : 4 * g + 4].tolist() for g in range(2)]
        codes = [row.index(max(row)) for row in rows]
        assert found.codes[m].tolist() == codes
        wanted = torch.cat([quantizer.codewords[g, code] for g, code in enumerate(codes)])
        # hard − soft + soft in float32.
        torch.testing.assert_close(found.vectors[m], wanted, atol=1e-6, rtol=0)
        softmaxes = torch.tensor([slow.softmax(row) for row in rows])
        torch.testing.assert_close(found.probabilities[m], softmaxes, atol=1e-6, rtol=0)


def test_noise_changes_choices_and_not_probabilities() -> None:
    quantizer, features = make_quantizer(), normal(200, 7).float()
    plain = quantizer(features, None, 1.0)
    noisy = quantizer(features, torch.rand(200, 8, generator=torch.Generator().manual_seed(0)), 1.0)
    assert torch.equal(plain.probabilities, noisy.probabilities)
    assert 0.1 < float((plain.codes != noisy.codes).double().mean()) < 0.9


def test_the_temperature_falls_by_its_factor_to_its_end() -> None:
    quantizer = make_quantizer(start_temperature=2.0, end_temperature=0.5, temperature_decay=0.999995)
    assert quantizer.temperature(0) == 2.0
    assert quantizer.temperature(100_000) == pytest.approx(2 * math.exp(100_000 * math.log(0.999995)))
    # wav2vec 2.0's schedule reaches 0.5 after ln 4 / 5e-6 = 277,000 updates.
    assert quantizer.temperature(277_000) > 0.5 == quantizer.temperature(278_000)


def test_the_temperature_of_the_update_reaches_the_gradient() -> None:
    sections = {"quantiser": {"start_temperature": 2.0, "end_temperature": 0.5, "temperature_decay": 0.5}}
    engine = make_engine(tasks=["contrast"], sections=sections).train()
    batch = make_batch([6_000])
    losses, gradients = [], []
    for update in range(4):
        engine.zero_grad()
        loss = engine(batch, {"contrast": 1.0}, update)[0]
        loss.backward()
        assert engine.quantizer is not None
        gradient = engine.quantizer.logits.weight.grad
        assert gradient is not None
        losses.append(loss.item())
        gradients.append(gradient.clone())
    # Same codes, since the noise is the utterance's: only the gradient knows τ. hard − soft + soft rounds.
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)
    assert not torch.allclose(gradients[0], gradients[1], rtol=0.05)
    assert not torch.allclose(gradients[1], gradients[2], rtol=0.05)
    torch.testing.assert_close(gradients[2], gradients[3], rtol=1e-4, atol=1e-6)


def test_without_training_codes_are_without_noise() -> None:
    engine, batch = make_engine(tasks=["contrast"]), make_batch([6_000, 5_000])
    tasks = {"contrast": engine.task("contrast")}
    assert engine.quantizer is not None
    views = engine.eval().views(batch, tasks, 0)
    assert views.quantised is not None
    plain = engine.quantizer(views.features[batch.mask], None, 1.0)
    assert torch.equal(views.quantised.codes, plain.codes)
    noisy = engine.train().views(batch, tasks, 0).quantised
    assert noisy is not None
    assert not torch.equal(noisy.codes, plain.codes)


# -------------------------------------------------------------------------------------------------------- contrast


@pytest.mark.parametrize("targets", ["quantised", "projected"])
@pytest.mark.parametrize("min_distance", [1, 3])
def test_contrast_is_the_loop(targets: str, min_distance: int) -> None:
    engine, task = make_contrast(targets, min_distance=min_distance, num_negatives=4, temperature=0.3)
    # The first utterance has one frame, which no other frame can be told from.
    views, found = run(engine, task, [500, 5_000, 9_000])
    assert views.masked is not None
    predicted = task.predict(views.masked.output[views.mask])
    chosen = views.quantised.vectors if views.quantised else views.z[views.mask]
    projected = task.project(chosen)
    uniform, loss, right, row = views.uniform(1, 4), 0.0, 0, 0
    for rows in views.frames.slices():
        positions = views.mask[rows].nonzero()[:, 0].tolist()
        part = slice(row, row + len(positions))
        row = part.stop
        codes = views.quantised.codes[part].tolist() if views.quantised else None
        arguments = (predicted[part].tolist(), projected[part].tolist(), codes, positions, uniform[part].tolist())
        more, told = slow.contrast(*arguments, min_distance, 0.3)
        loss, right = loss + more, right + told
    assert row == int(views.mask.sum())
    # Float32 cosines over τ: seven digits, less one for the sum.
    assert found.loss.item() == pytest.approx(loss, rel=1e-5)
    assert int(found.sums["accuracy"]) == right
    assert 0 < right < row


def test_equal_codes_are_no_negatives() -> None:
    engine, task = make_contrast()
    views, found = run(engine, task, [9_000])
    assert views.quantised is not None
    assert found.loss.item() > 0.1
    views.quantised = replace(views.quantised, codes=torch.zeros_like(views.quantised.codes))
    assert task(views, ()).loss.item() == 0
    assert int(task(views, ()).sums["accuracy"]) == 0, "told from nothing is not told"
    # One group that differs is enough to differ.
    views.quantised.codes[:, 1] = torch.arange(len(views.quantised.codes)) % 4
    assert task(views, ()).loss.item() > 0.1


def test_negatives_come_from_the_same_utterance() -> None:
    engine, task = make_contrast("projected")
    batch = make_batch([9_000, 7_000])
    loss = engine(alone(batch)[0], {"contrast": 1.0})[0].item()
    with_other = engine(batch, {"contrast": 1.0})[0] - engine(alone(batch)[1], {"contrast": 1.0})[0]
    # A float32 difference of losses around 20.
    assert with_other.item() == pytest.approx(loss, rel=1e-4)
    changed = replace(batch, waves=batch.waves.clone())
    changed.waves[-7_000:] = 0.5 * changed.waves[-7_000:].flip(0)
    views = engine.views(changed, {"contrast": task}, 0)
    after = task(views, ()).loss - engine(alone(changed)[1], {"contrast": 1.0})[0]
    assert after.item() == pytest.approx(loss, rel=1e-4)


def test_projected_targets_send_no_gradient_into_the_stem_but_predictions_do() -> None:
    engine, task = make_contrast("projected")
    batch = make_batch([9_000])
    views = engine.views(batch, {"contrast": task}, 0)
    (of_z,) = torch.autograd.grad(task(views, ()).loss, views.z, retain_graph=True)
    # By way of masked frames alone z has none: there the encoder sees the mask embedding.
    assert torch.equal(of_z[batch.mask], torch.zeros_like(of_z[batch.mask]))
    assert float(of_z[~batch.mask].abs().max()) > 0
    engine(batch, {"contrast": 1.0})[0].backward()
    assert task.project.weight.grad is not None
    assert float(task.project.weight.grad.abs().max()) > 0


def test_quantised_targets_train_quantiser_and_stem_by_their_masked_frames() -> None:
    engine, task = make_contrast()
    batch = make_batch([9_000])
    views = engine.views(batch, {"contrast": task}, 0)
    loss = task(views, ()).loss
    (of_features,) = torch.autograd.grad(loss, views.features, retain_graph=True)
    assert float(of_features[batch.mask].abs().min(1).values.min()) > 0
    loss.backward()
    assert engine.quantizer is not None
    for parameter in engine.quantizer.parameters():
        assert parameter.grad is not None
        assert float(parameter.grad.abs().max()) > 0


def test_random_numbers_do_not_depend_on_how_an_update_is_divided() -> None:
    engine, task = make_contrast()
    batch = make_batch([5_000, 3_000, 8_000])
    whole = engine.views(batch, {"contrast": task}, 0)
    parts = [engine.views(part, {"contrast": task}, 0) for part in alone(batch)]
    for purpose in (0, 1):
        assert torch.equal(whole.uniform(purpose, 5), torch.cat([part.uniform(purpose, 5) for part in parts]))
    assert whole.quantised is not None
    codes = torch.cat([part.quantised.codes for part in parts if part.quantised is not None])
    assert torch.equal(whole.quantised.codes, codes)
    assert not torch.equal(whole.uniform(0, 5), whole.uniform(1, 5)), "each purpose has its own"
    other = engine.views(replace(batch, seeds=tuple(s + 9 for s in batch.seeds)), {"contrast": task}, 0)
    assert not torch.equal(whole.uniform(0, 5), other.uniform(0, 5))
    numbers = whole.uniform(2, 400)
    assert 0 <= float(numbers.min()) < 0.01
    assert 0.99 < float(numbers.max()) < 1


def test_the_monitor_shows_how_many_codes_are_chosen() -> None:
    engine, task = make_contrast()
    used: list[Tensor] = []
    for update in range(2):
        batch = make_batch([6_000, 4_000], seed=update)
        views = engine.views(batch, {"contrast": task}, update)
        assert views.quantised is not None
        used.append(views.quantised.codes)
        engine(batch, {"contrast": 1.0}, update)
        engine.after_update(update + 1)
    found = engine.monitor()
    codes = torch.cat(used)
    perplexities = [
        math.exp(sum(-n / len(codes) * math.log(n / len(codes)) for n in np.bincount(codes[:, g]) if n)) for g in (0, 1)
    ]
    assert found["contrast/perplexity"] == pytest.approx(sum(perplexities) / 2)
    assert found["contrast/active_codes"] == sum(len(codes[:, g].unique()) for g in (0, 1)) / 2
    assert engine.monitor() == {}


def test_the_monitor_of_projected_targets_is_their_spread() -> None:
    engine, task = make_contrast("projected")
    batch = make_batch([6_000, 4_000])
    views = engine.views(batch, {"contrast": task}, 0)
    engine(batch, {"contrast": 1.0})
    engine.after_update(1)
    wanted = spread(task.project(views.z[batch.mask]).tolist())
    # Sums in float64 of float32 values, carried as float32.
    assert engine.monitor()["contrast/target_std"] == pytest.approx(wanted, rel=1e-4)
