"""The probe reads phones that are there, none that are not, and counts its errors as an oracle does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sonorant.evaluation.errors import error_rate, text_of
from sonorant.evaluation.probes.fitting import Budget, draw_batches
from sonorant.evaluation.probes.heads import LINEAR_DIM, LinearHead, RecurrentHead
from sonorant.evaluation.probes.recognition import Recogniser, Spoken, ctc_loss, fit_recogniser
from tests.references import recognition as oracle

PHONES = tuple("abcdefgh")
BUDGET = Budget(num_updates=300, learning_rate=1e-2, batch_frames=600, evaluate_every=50)
TOKENS = st.lists(st.sampled_from(["a", "b", "c c", "d"]), max_size=7)


def speak(count: int, seed: int, *, layer: int = 0, num_layers: int = 1, is_noise: bool = False) -> list[Spoken]:
    """Utterances of random phones, no two alike side by side, in 2 to 5 frames each, with silence's frames around them.

    One layer has a one-hot dimension a phone, the others noise, as all have where `is_noise`.
    """
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        drawn = rng.integers(len(PHONES), size=rng.integers(4, 12))
        spoken = [PHONES[label] for label, _ in groupby(drawn.tolist())]
        labels = [len(PHONES), *(PHONES.index(phone) for phone in spoken), len(PHONES)]
        frames = np.repeat(labels, rng.integers(2, 6, size=len(labels)))
        states = rng.standard_normal((num_layers, len(frames), len(PHONES) + 1)).astype(np.float32)
        if not is_noise:
            states[layer] = np.eye(len(PHONES) + 1)[frames]
        made.append(Spoken(states, tuple(spoken)))
    return made


def reader(num_labels: int) -> LinearHead:
    """A head whose logits are the one layer's states."""
    head = LinearHead(1, num_labels, num_labels)
    with torch.no_grad():
        head.project.weight.copy_(torch.eye(LINEAR_DIM, num_labels))
        head.read.weight.copy_(torch.eye(num_labels, LINEAR_DIM))
        head.project.bias.zero_()
        head.read.bias.zero_()
    return head


@given(st.lists(st.tuples(TOKENS.filter(bool), TOKENS), min_size=1, max_size=4))
def test_errors_are_edits_over_all_tokens(pairs: list[tuple[list[str], list[str]]]) -> None:
    references, hypotheses = [wanted for wanted, _ in pairs], [heard for _, heard in pairs]
    wanted = sum(oracle.edits(*pair) for pair in pairs) / sum(map(len, references))
    assert error_rate(references, hypotheses) == pytest.approx(wanted, abs=1e-12)  # one division of whole numbers


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_frames_are_read_as_ctc_spells(path: list[int]) -> None:
    states = np.eye(4, dtype=np.float32)[path][None]
    heard = Recogniser(reader(4), ("a", "b", "c"), 0, 0.0).recognise(states)
    assert heard == ["abc"[label - 1] for label in oracle.spell(path)]


@settings(deadline=None)
@given(st.integers(0, 999), st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=2), min_size=1, max_size=3))
def test_loss_sums_over_all_paths(seed: int, labels: list[list[int]]) -> None:
    rng = np.random.default_rng(seed)
    lengths = [int(rng.integers(4, 7)) for _ in labels]
    logits = torch.from_numpy(rng.standard_normal((sum(lengths), 3))).requires_grad_()

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return ctc_loss(logits, lengths, [torch.tensor(sequence) for sequence in labels])

    rows = torch.split(logits.softmax(-1), lengths)
    losses = [oracle.ctc_loss(part.tolist(), own) / len(own) for part, own in zip(rows, labels, strict=True)]
    assert loss(logits).item() == pytest.approx(np.mean(losses), rel=1e-10)  # at most 3⁶ products of float64
    assert torch.autograd.gradcheck(loss, (logits,))


def test_gold_phones_are_read_off() -> None:
    found = fit_recogniser(speak(60, 0), speak(20, 1), BUDGET)
    assert found.tokens == PHONES
    assert found.error(speak(40, 2)) <= 0.02


def spelt(count: int, seed: int, *, is_noise: bool = False) -> list[Spoken]:
    """Utterances of one-hot characters, the last phone being what stands between words."""
    tokens = dict(zip(PHONES, ("A", "B", "C", "D", "E", "F", "G", "|"), strict=True))
    return [Spoken(one.states, tuple(tokens[t] for t in one.tokens)) for one in speak(count, seed, is_noise=is_noise)]


def test_a_recurrent_head_reads_words() -> None:
    budget = replace(BUDGET, hidden_dim=24, num_updates=200)
    found = fit_recogniser(spelt(60, 0), spelt(20, 1), budget, is_recurrent=True)
    assert isinstance(found.head, RecurrentHead)
    test = [one for one in spelt(40, 2) if text_of(one.tokens)]
    assert found.error(test) <= 0.02
    words = [(text_of(one.tokens).split(), text_of(found.recognise(one.states)).split()) for one in test]
    assert error_rate([wanted for wanted, _ in words], [heard for _, heard in words]) <= 0.1
    short = replace(budget, num_updates=50)
    noise = fit_recogniser(spelt(60, 0, is_noise=True), spelt(20, 1, is_noise=True), short, is_recurrent=True)
    assert noise.error(spelt(40, 2, is_noise=True)) > 0.7


def test_no_utterance_hears_another() -> None:
    torch.manual_seed(0)
    head = RecurrentHead(2, 5, 4, hidden_dim=6).eval()
    states_LFD, lengths = torch.randn(2, 11, 5), [3, 7, 1]
    together = head(states_LFD, lengths)
    alone = torch.cat([head(part, [part.shape[1]]) for part in states_LFD.split(lengths, dim=1)])
    torch.testing.assert_close(together, alone)


def test_noise_tells_nothing() -> None:
    found = fit_recogniser(speak(60, 0, is_noise=True), speak(20, 1, is_noise=True), BUDGET)
    # Whoever says one phone a frame at will is right for one in eight; the order lets a few more fit in.
    assert found.error(speak(40, 2, is_noise=True)) > 0.7


def test_the_layer_that_speaks_is_read() -> None:
    train, dev, test = (speak(count, seed, layer=1, num_layers=3) for seed, count in enumerate((60, 20, 40)))
    found = fit_recogniser(train, dev, BUDGET)
    assert found.head.mix.shares.argmax() == 1
    assert found.head.mix.shares.sum() == pytest.approx(1, abs=1e-6)  # float32
    assert found.error(test) <= 0.2  # one layer alone: 0; noise alone: above 0.7


def shifted(utterances: Sequence[Spoken]) -> list[Spoken]:
    """The same at another scale and place in each dimension, powers of two so that hardly a digit is lost."""
    scale = 2.0 ** np.arange(-4, 5, dtype=np.float32)
    return [Spoken(utterance.states * scale + 64, utterance.tokens) for utterance in utterances]


def test_standardised_states_have_no_scale() -> None:
    train, dev, test = speak(60, 0), speak(20, 1), speak(40, 2)
    found = fit_recogniser(shifted(train), shifted(dev), BUDGET)
    states = torch.from_numpy(np.concatenate([utterance.states for utterance in shifted(train)], axis=1))
    seen = (states - found.head.mix.shift) * found.head.mix.scale
    # float32 keeps 64 + 2⁻⁴ to 2⁻¹⁷: an eighth of a thousandth of such a dimension's spread.
    torch.testing.assert_close(seen.mean(1), torch.zeros_like(seen.mean(1)), rtol=0, atol=1e-3)
    torch.testing.assert_close(seen.var(1, correction=0), torch.ones_like(seen.mean(1)), rtol=0, atol=1e-3)
    assert found.error(shifted(test)) <= 0.02
    raw = fit_recogniser(train, dev, replace(BUDGET, is_standardised=False))
    assert not raw.head.mix.shift.any()
    assert (raw.head.mix.scale == 1).all()
    flat = [Spoken(np.pad(one.states, ((0, 0), (0, 0), (0, 1)), constant_values=3), one.tokens) for one in train]
    assert fit_recogniser(flat, flat, BUDGET).dev_error <= 0.02


def test_a_seed_makes_one_probe_whatever_was_drawn_before() -> None:
    train, dev = speak(30, 0), speak(10, 1)
    budget = replace(BUDGET, num_updates=60, evaluate_every=20)
    torch.manual_seed(5)
    first = fit_recogniser(train, dev, replace(budget, seed=3))
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.rand(1) == after  # nobody else's numbers were taken
    second = fit_recogniser(train, dev, replace(budget, seed=3))
    other = fit_recogniser(train, dev, replace(budget, seed=4))
    for name, value in first.head.state_dict().items():
        assert torch.equal(value, second.head.state_dict()[name]), name
    assert (first.update, first.dev_error) == (second.update, second.dev_error)
    assert not torch.equal(first.head.read.weight, other.head.read.weight)


def test_the_best_on_dev_is_kept() -> None:
    train, dev = speak(4, 0, is_noise=True), speak(10, 1, is_noise=True)
    told: dict[int, float] = {}
    budget = replace(BUDGET, num_updates=130, evaluate_every=20)
    found = fit_recogniser(train, dev, budget, report=told.__setitem__)
    assert list(told) == [20, 40, 60, 80, 100, 120, 130]
    assert found.dev_error == min(told.values()) == told[found.update] == found.error(dev)
    assert found.update == next(update for update, error in told.items() if error == found.dev_error)
    assert min(told.values()) < told[130], "the last is best: nothing was tested"


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 12))
def test_an_epoch_has_every_utterance_once(lengths: list[int], batch_frames: int) -> None:
    batches = draw_batches(lengths, batch_frames, np.random.default_rng(0))
    for _ in range(2):
        seen: list[int] = []
        while len(seen) < len(lengths):
            batch = next(batches)
            assert len(batch) == 1 or sum(lengths[row] for row in batch) <= batch_frames
            seen += batch
        assert sorted(seen) == list(range(len(lengths)))


def frames(count: int, dim: int = 9, value: float = 0.0) -> Any:
    """One layer's states."""
    return np.full((1, count, dim), value, np.float32)


@pytest.mark.parametrize(
    ("train", "dev", "message"),
    [
        ([], None, "found no train utterance, wanted some"),
        (None, [], "found no dev utterance, wanted some"),
        ([Spoken(frames(4), ())], None, "found no token in train utterance 0, wanted one at least: leave it out"),
        (None, [Spoken(frames(4), ())], "found no token in dev utterance 0"),
        (
            [Spoken(frames(3), ("a", "b", "b"))],
            None,
            "found 3 tokens in the 3 frames of train utterance 0, wanted 4 frames at least for CTC",
        ),
        (None, [Spoken(frames(4, dim=5), ("a",))], "states (1, 4, 5) of dev utterance 0, wanted (1, frames, 9)"),
        ([Spoken(frames(4, value=np.nan), ("a",))], None, "train utterance 0 that are not finite, wanted finite"),
    ],
)
def test_what_cannot_be_measured_is_refused(train: list[Spoken] | None, dev: list[Spoken] | None, message: str) -> None:
    good = speak(3, 0)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        fit_recogniser(good if train is None else train, good if dev is None else dev, BUDGET)
    assert "\n" not in str(caught.value)


def test_as_many_frames_as_ctc_needs_are_enough() -> None:
    tight = [Spoken(np.eye(3, dtype=np.float32)[[0, 1, 2, 1]][None], ("a", "b", "b"))]
    assert fit_recogniser(tight, tight, replace(BUDGET, num_updates=100)).dev_error == 0


@pytest.mark.parametrize(
    ("references", "hypotheses", "message"),
    [
        ([["a"]], [], "found 1 references and 0 hypotheses, wanted as many"),
        ([], [], "found 0 references and 0 hypotheses"),
        ([["a"], []], [["a"], ["b"]], "found no token in reference 1, wanted one at least: leave it out"),
    ],
)
def test_errors_without_measure_are_refused(
    references: list[list[str]], hypotheses: list[list[str]], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        error_rate(references, hypotheses)
