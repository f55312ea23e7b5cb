"""Online codebooks: who is nearest, what an update makes of a code, and what it leaves alone to the last bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sonorant.config import CodebooksConfig
from sonorant.tasks.codebooks import Codebooks, codebook_loss, moving_average, nearest_codes, sums_and_counts
from sonorant.training.engine import Engine
from tests.references import codebooks as slow
from tests.tiny import alone, make_batch, make_engine

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(2, 6), st.integers(1, 5), st.integers(0, 10_000))
"""Codebooks, frames, codes, dimensions and a seed."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal values in float64."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def integers(high: int, *shape: int, seed: int = 0) -> Tensor:
    """Random integers below `high`."""
    return torch.from_numpy(np.random.default_rng(seed).integers(high, size=shape))


def bits(x: Tensor) -> Tensor:
    """The bits of float32 numbers: -0.0 is not 0.0, and NaN is NaN."""
    return x.view(torch.int32)


def make_codebooks(**config: object) -> tuple[Engine, Codebooks]:
    """A tiny engine whose one task has two codebooks of six codes, and that task."""
    engine = make_engine(tasks=["codebooks"], sections={"codebooks": {"num_codes": 6, **config}})
    task = engine.task("codebooks")
    assert isinstance(task, Codebooks)
    return engine, task


# ------------------------------------------------------------------------------------------------------ functions


@settings(deadline=None)
@given(SHAPES)
def test_the_code_is_the_nearest(shape: tuple[int, int, int, int, int]) -> None:
    books, frames, codes, dims, seed = shape
    x, codewords = normal(books, frames, dims, seed=seed), 2 * normal(books, codes, dims, seed=seed + 1)
    found = nearest_codes(x.float(), codewords.float())
    assert found.shape == (books, frames)
    for k in range(books):
        for m in range(frames):
            wanted = slow.distances(x[k, m].tolist(), codewords[k].tolist())
            # Of two that are equally far to float32's rounding (values up to about 50), either will do.
            assert wanted[int(found[k, m])] == pytest.approx(min(wanted), abs=1e-4)


def test_length_counts_for_the_nearest() -> None:
    # By inner product alone the long codeword would win.
    codewords = torch.tensor([[[1.0, 0.0], [100.0, 0.0]]])
    assert nearest_codes(torch.tensor([[[2.0, 0.0], [60.0, 0.0]]]), codewords).tolist() == [[0, 1]]


@settings(deadline=None)
@given(SHAPES)
def test_sums_and_counts_are_the_loop(shape: tuple[int, int, int, int, int]) -> None:
    books, frames, codes, dims, seed = shape
    x, assigned = normal(books, frames, dims, seed=seed), integers(codes, books, frames, seed=seed)
    found = sums_and_counts(x.float(), assigned, codes)
    wanted = [slow.sums_and_counts(x[k].tolist(), assigned[k].tolist(), codes) for k in range(books)]
    # Up to nine float32 values around 1 a sum.
    torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-5, rtol=0)
    assert torch.equal(found[..., -1].sum(1), torch.full((books,), float(frames)))


@settings(deadline=None)
@given(SHAPES, st.floats(0, 1))
def test_an_update_is_the_formula_and_spares_codes_without_a_hit(
    shape: tuple[int, int, int, int, int], decay: float
) -> None:
    books, frames, codes, dims, seed = shape
    state = normal(books, codes, dims + 1, seed=seed).float()
    state[..., 0] = -0.0
    fresh = sums_and_counts(
        normal(books, frames, dims, seed=seed + 1).float(), integers(codes, books, frames, seed=seed), codes
    )
    found = moving_average(state, fresh, decay)
    hit = fresh[..., -1] > 0
    assert torch.equal(bits(found[~hit]), bits(state[~hit]))
    wanted = decay * state[hit].double() + (1 - decay) * fresh[hit].double()
    # Two float32 products and a sum of values up to about 10.
    torch.testing.assert_close(found[hit].double(), wanted, atol=5e-6, rtol=0)


def test_even_what_is_no_number_stays_where_nothing_hits() -> None:
    odd = torch.tensor([[[-0.0, 1.0], [float("nan"), 1.0], [1e-45, 1.0], [float("inf"), 1.0]]])
    assert torch.equal(bits(moving_average(odd, torch.zeros_like(odd), 0.9)), bits(odd))


@settings(deadline=None)
@given(SHAPES)
def test_the_loss_is_the_loop(shape: tuple[int, int, int, int, int]) -> None:
    books, frames, codes, _, seed = shape
    logits, assigned = 5 * normal(books, frames, codes, seed=seed), integers(codes, books, frames, seed=seed)
    wanted = slow.codebook_loss(logits.tolist(), assigned.tolist())
    # float64 as it came, and seven digits of it in float32.
    assert float(codebook_loss(logits, assigned)) == pytest.approx(wanted, rel=1e-12, abs=1e-12)
    assert float(codebook_loss(logits.float(), assigned)) == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_the_loss_has_the_right_gradient() -> None:
    codes = integers(4, 2, 5)
    logits = normal(2, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: codebook_loss(x, codes), (logits,))
    (gradient,) = torch.autograd.grad(codebook_loss(logits, codes), logits)
    # Softmax minus truth, over K = 2.
    wanted = (logits.detach().softmax(2) - torch.nn.functional.one_hot(codes, 4)) / 2
    torch.testing.assert_close(gradient, wanted)


def test_the_loss_of_ignorance_is_log_of_the_codes() -> None:
    # pretraining.md §1.4: a run begins around ln 256 = 5.5.
    found = float(codebook_loss(torch.zeros(8, 10, 256), torch.zeros(8, 10, dtype=torch.long))) / 10
    assert found == pytest.approx(math.log(256), rel=1e-6)


# ----------------------------------------------------------------------------------------------------------- task


def test_codewords_begin_as_long_as_target_frames() -> None:
    """Per dimension mean 0 and variance 1 over codes; so their mean square length is D, as that of target frames."""
    torch.manual_seed(0)
    codewords = Codebooks(64, (1, 2), CodebooksConfig(num_codes=50)).codewords
    # Sums of 50 float32 values around 1; eps 1e-5 beside the variance.
    torch.testing.assert_close(codewords.mean(1), torch.zeros(2, 64), atol=1e-5, rtol=0)
    torch.testing.assert_close(codewords.var(1, correction=0), torch.ones(2, 64), atol=5e-5, rtol=0)
    lengths = codewords.norm(dim=2)
    assert float(lengths.square().mean()) == pytest.approx(64, rel=1e-4)
    # χ² with 64 degrees of freedom: the length scatters by about 1/√2 around 8, and is no constant.
    assert 4.5 < float(lengths.min()) < 7.8 < 8.2 < float(lengths.max()) < 11.5
    assert not torch.equal(codewords[0], codewords[1])


def test_small_codewords_have_standard_deviation_of_one_over_root_codes() -> None:
    torch.manual_seed(0)
    codewords = Codebooks(64, (1, 2), CodebooksConfig(num_codes=64, init="small")).codewords
    # 8,192 draws: the deviation is known to 1/√(2 · 8,192) = 0.8 %; five of these.
    assert float(codewords.std()) == pytest.approx(1 / 8, rel=0.04)
    assert abs(float(codewords.mean())) < 5 / 8 / math.sqrt(8_192)


def test_counts_begin_at_one() -> None:
    assert torch.equal(make_codebooks()[1].state[..., -1], torch.ones(2, 6))


def test_the_state_is_float32_in_the_checkpoint_and_no_parameter() -> None:
    engine, task = make_codebooks()
    assert engine.state_dict()["tasks.codebooks.state"].dtype == torch.float32
    assert not any("state" in name for name, _ in engine.named_parameters())
    before = bits(task.state).clone()
    where = task.state.data_ptr()
    other, other_task = make_codebooks()
    other_task.state.add_(1)
    other.load_state_dict(engine.state_dict())
    assert torch.equal(bits(other_task.state), before)
    engine(make_batch([5_000]), {"codebooks": 1.0})
    engine.after_update(1)
    # In place: whoever holds the buffer (DDP, an optimizer, a checkpoint) sees it move.
    assert task.state.data_ptr() == where
    assert not torch.equal(bits(task.state), before)


def test_autocast_does_not_touch_codes_and_statistics() -> None:
    engine, task = make_codebooks()
    batch = make_batch([9_000, 6_000])
    views = engine.views(batch, {"codebooks": task}, 0)
    exact = task(views, ())
    with torch.autocast("cpu", torch.bfloat16):
        rough = task(views, ())
    assert exact.statistics is not None
    assert rough.statistics is not None
    assert rough.statistics.dtype == torch.float32
    assert torch.equal(exact.statistics, rough.statistics)
    assert rough.loss.dtype == torch.float32


def test_parts_of_an_update_add_up_to_the_whole() -> None:
    """Two ranks, or two micro-batches, are one rank on the concatenated data; codes move once an update."""
    batch = make_batch([5_000, 2_000, 7_000, 3_000])
    (whole, whole_task), (parts, parts_task) = make_codebooks(decay=0.7), make_codebooks(decay=0.7)
    before = whole_task.state.clone()
    whole(batch, {"codebooks": 1.0})
    whole.after_update(1)
    for part in alone(batch):
        parts(part, {"codebooks": 1.0})
        assert torch.equal(parts_task.state, before), "codes are assigned by the codebook before the update"
    parts.after_update(1)
    hit = whole_task.window > 0
    assert torch.equal(whole_task.window, parts_task.window)
    # Sums of up to about twenty float32 values around 1, in another order.
    torch.testing.assert_close(whole_task.state, parts_task.state, atol=1e-5, rtol=0)
    assert torch.equal(bits(whole_task.state[~hit]), bits(before[~hit]))
    assert hit.any()
    assert not torch.equal(whole_task.state[hit], before[hit])

    # The same over two ranks: each has half the parts, and their statistics are summed on the way.
    ranks = [make_codebooks(decay=0.7) for _ in range(2)]
    for (engine, _), share in zip(ranks, (alone(batch)[:2], alone(batch)[2:]), strict=True):
        for part in share:
            engine(part, {"codebooks": 1.0})
    sent = torch.stack([engine.pending["codebooks"].flatten() for engine, _ in ranks]).sum(0)
    for engine, task in ranks:
        engine.after_update(1, lambda _: sent)
        torch.testing.assert_close(task.state, whole_task.state, atol=1e-5, rtol=0)
    assert torch.equal(bits(ranks[0][1].state), bits(ranks[1][1].state))


def test_after_freeze_at_updates_the_codebooks_stand_still() -> None:
    engine, task = make_codebooks(freeze_at=2)
    moved = []
    for update in range(1, 5):
        before = bits(task.state).clone()
        engine(make_batch([5_000, 4_000], seed=update), {"codebooks": 1.0}, update - 1)
        engine.after_update(update)
        moved.append(not torch.equal(bits(task.state), before))
    assert moved == [True, True, False, False]


def test_the_monitor_is_the_loop_over_all_updates_since_the_last_entry() -> None:
    engine, task = make_codebooks()
    codes: list[list[int]] = [[], []]
    for update in range(1, 3):
        batch = make_batch([5_000, 4_000], seed=update)
        views = engine.views(batch, {"codebooks": task}, update - 1)
        assert views.targets is not None
        for k, frames in enumerate(views.targets.tolist()):
            for frame in frames:
                distances = slow.distances(frame, task.codewords[k].tolist())
                codes[k].append(distances.index(min(distances)))
        engine(batch, {"codebooks": 1.0}, update - 1)
        engine.after_update(update)
    found = engine.monitor()
    assert found["codebooks/perplexity"] == pytest.approx(sum(map(slow.perplexity, codes)) / 2)
    assert found["codebooks/active_codes"] == sum(len(set(row)) for row in codes) / 2
    assert engine.monitor() == {}, "an entry begins anew"


def test_a_collapse_shows_in_the_monitor() -> None:
    engine, task = make_codebooks()
    statistics = torch.zeros_like(task.state)
    statistics[:, 3, -1] = 40
    task.settle(statistics, 1)
    assert engine.monitor() == {"codebooks/perplexity": pytest.approx(1), "codebooks/active_codes": 1}
    task.settle(torch.ones_like(task.state), 2)
    assert engine.monitor() == {"codebooks/perplexity": pytest.approx(6), "codebooks/active_codes": 6}


def test_heads_read_the_last_layer_or_each_its_own() -> None:
    batch = make_batch([5_000, 4_000])
    for reads, layers in (("last", (3, 3)), ("own", (2, 3))):
        engine = make_engine(
            tasks=["codebooks"], num_layers=3, sections={"codebooks": {"num_codes": 6, "reads": reads}}
        )
        task = engine.task("codebooks")
        assert isinstance(task, Codebooks)
        views = engine.views(batch, {"codebooks": task}, 0)
        assert views.masked is not None
        assert views.targets is not None
        codes = nearest_codes(views.targets, task.codewords)
        total = 0.0
        for k, layer in enumerate(layers):
            # Before the final norm, which only what leaves the last layer goes through.
            frames = views.masked.output if reads == "last" else views.masked.states[layer]
            head = dict(task.heads.named_children())[str(k)]
            with torch.no_grad():
                total += slow.cross_entropy(head(frames[batch.mask]).tolist(), codes[k].tolist()) / 2
        # The loss is float32: seven digits.
        assert task(views, ()).loss.item() == pytest.approx(total, rel=1e-5)


def test_accuracy_counts_frames_whose_code_is_named() -> None:
    engine, task = make_codebooks()
    views = engine.views(make_batch([5_000, 4_000]), {"codebooks": task}, 0)
    assert views.targets is not None
    frames = views.targets.shape[1]
    for head in task.heads:
        head.get_parameter("weight").data.zero_()
        head.get_parameter("bias").data.copy_(torch.tensor([9.0, 0, 0, 0, 0, 0]))
    codes = nearest_codes(views.targets, task.codewords)
    right = float(task(views, ()).sums["accuracy"])
    assert right == pytest.approx(float((codes == 0).sum()) / 2)
    assert 0 < right < frames


def test_the_state_is_never_cast() -> None:
    # A bfloat16 average at τ = 0.9 keeps eight bits of a sum over thousands of frames.
    engine = make_engine(tasks=["codebooks"])
    before = engine.task("codebooks").state.clone()
    for cast in (engine.bfloat16, engine.half, engine.double):
        cast()
        assert torch.equal(engine.task("codebooks").state, before)
        assert engine.task("codebooks").state.dtype == torch.float32
    assert "tasks.codebooks.state" in engine.state_dict()
