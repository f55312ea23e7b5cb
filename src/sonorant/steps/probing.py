"""What small heads read off a contender's layers: phones, words, and whose voice, which word, which emotion it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sonorant.config import EvaluateConfig, ProbeConfig
from sonorant.data.corpus import Utterance
from sonorant.data.frames import FRAME_RATE
from sonorant.data.progress import shown_progress
from sonorant.evaluation.errors import characters_of, count_edits, normalise_text, text_of, without_silence
from sonorant.evaluation.intervals import Estimate, ratio_of_sums
from sonorant.evaluation.probes.fitting import Budget, deal
from sonorant.evaluation.probes.naming import Named, fit_namer
from sonorant.evaluation.probes.recognition import Spoken, fewest_frames, fit_recogniser
from sonorant.steps.states import Layers, States, keep_states

VOICE_FOLDS = 4
"""Of each speaker's utterances one part is asked, one chooses the head, the others fit it."""
SPLITS = ("train", "dev", "test")
Parts = dict[str, list[Utterance]]


@dataclass(frozen=True)
class Probed:
    """Error rates and accuracies by score's name, and by probe how much is read of each layer, (L,)."""

    estimates: Mapping[str, Estimate] = field(default_factory=dict)
    shares: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


def measure_probes(
    config: EvaluateConfig, layers: Layers, everything: Sequence[Utterance], corpus: str, label: str
) -> Probed:
    """Every probe that is asked for; `corpus` is the digest of the utterances' corpus.

    Raises ValueError where a probe's labels are missing in a split, or heads would be chosen on what is measured.
    """
    if not config.probes:
        return Probed()
    if config.split != "test":
        raise ValueError(
            f"evaluate.probes: found evaluate.split {config.split}, on which heads are fitted or chosen, wanted test: "
            "set it or leave out the probes"
        )
    chosen = [u for u in everything if config.source in (None, u.source)]
    states: dict[str, States] = {}
    for split in SPLITS:
        own = [u for u in chosen if u.split == split]
        states |= keep_states(layers, own, corpus, f"{label}, states of {split}")
    estimates: dict[str, Estimate] = {}
    shares: dict[str, NDArray[np.float32]] = {}
    for name, probe in config.probes.items():
        found, shares[name] = PROBES[name](probe, states, chosen, config.seed, f"{label}, {name}")
        estimates |= found
    return Probed(estimates, shares)


# ------------------------------------------------------------------------------------------------ recognition


def read_phones(
    probe: ProbeConfig, states: Mapping[str, States], chosen: Sequence[Utterance], seed: int, label: str
) -> tuple[dict[str, Estimate], NDArray[np.float32]]:
    """PER of a linear head."""
    tokens = {u.id: tuple(without_silence([name for name, _, _ in u.phones])) for u in chosen if u.phones is not None}
    heard, shares = recognise(probe, states, chosen, tokens, seed, label, is_recurrent=False)
    return {"probe_per": rate({name: (tokens[name], found) for name, found in heard.items()})}, shares


def read_text(
    probe: ProbeConfig, states: Mapping[str, States], chosen: Sequence[Utterance], seed: int, label: str
) -> tuple[dict[str, Estimate], NDArray[np.float32]]:
    """WER and CER of a recurrent head; words are split where it says so."""
    texts = {u.id: normalise_text(u.text) for u in chosen if u.text}
    tokens = {name: characters_of(text) for name, text in texts.items()}
    heard, shares = recognise(probe, states, chosen, tokens, seed, label, is_recurrent=True)
    said = {name: text_of(found) for name, found in heard.items()}
    return {
        "probe_wer": rate({name: (texts[name].split(), text.split()) for name, text in said.items()}),
        "probe_cer": rate({name: (tokens[name], characters_of(text)) for name, text in said.items()}),
    }, shares


def recognise(
    probe: ProbeConfig,
    states: Mapping[str, States],
    chosen: Sequence[Utterance],
    tokens: Mapping[str, tuple[str, ...]],
    seed: int,
    label: str,
    *,
    is_recurrent: bool,
) -> tuple[dict[str, list[str]], NDArray[np.float32]]:
    """What is heard in each test utterance that has tokens, and how much of each layer is read for it.

    Utterances whose tokens CTC cannot spell in their frames are left out of what heads learn from.
    """
    spoken: dict[str, list[Spoken]] = {split: [] for split in SPLITS}
    for u in chosen:
        own = tokens.get(u.id)
        if own and (u.split != "train" or fewest_frames(own) <= u.num_frames):
            spoken[u.split].append(Spoken(states[u.id], own))
    check_parts("text" if is_recurrent else "phones", spoken)
    with shown_progress(label, "updates") as report:
        found = fit_recogniser(
            spoken["train"],
            spoken["dev"],
            budget_of(probe, seed),
            is_recurrent=is_recurrent,
            report=lambda update, _: report(update, probe.num_updates),
        )
    asked = [u for u in chosen if u.split == "test" and tokens.get(u.id)]
    return {u.id: found.recognise(states[u.id]) for u in asked}, found.head.mix.shares


# ----------------------------------------------------------------------------------------------------- naming


def name_speakers(
    probe: ProbeConfig, states: Mapping[str, States], chosen: Sequence[Utterance], seed: int, label: str
) -> tuple[dict[str, Estimate], NDArray[np.float32]]:
    """Accuracy among the speakers that the encoder was not trained on, each of whose utterances are shared out."""
    unseen = [u for u in chosen if u.split != "train"]
    folds = deal([u.speaker for u in unseen], VOICE_FOLDS, np.random.default_rng(seed))
    parts: Parts = {split: [] for split in SPLITS}
    for u, fold in zip(unseen, folds.tolist(), strict=True):
        parts[{0: "test", 1: "dev"}.get(fold, "train")].append(u)
    return name_parts(probe, states, parts, lambda u: u.speaker, seed, label, "speaker")


def name_words(
    probe: ProbeConfig, states: Mapping[str, States], chosen: Sequence[Utterance], seed: int, label: str
) -> tuple[dict[str, Estimate], NDArray[np.float32]]:
    """Accuracy where all that is said is one name, such as a keyword."""
    return name_parts(probe, states, by_split(chosen), lambda u: normalise_text(u.text or ""), seed, label, "word")


def name_emotions(
    probe: ProbeConfig, states: Mapping[str, States], chosen: Sequence[Utterance], seed: int, label: str
) -> tuple[dict[str, Estimate], NDArray[np.float32]]:
    """Accuracy among the emotions that the corpus tells of."""
    return name_parts(probe, states, by_split(chosen), lambda u: u.emotion or "", seed, label, "emotion")


def name_parts(
    probe: ProbeConfig,
    states: Mapping[str, States],
    parts: Parts,
    name_of: Callable[[Utterance], str],
    seed: int,
    label: str,
    what: str,
) -> tuple[dict[str, Estimate], NDArray[np.float32]]:
    """Accuracy on the test part of those that have a name, and how much of each layer is read for it."""
    named = {s: [Named(states[u.id], name_of(u)) for u in parts[s] if name_of(u)] for s in SPLITS}
    check_parts(what, named)
    with shown_progress(label, "updates") as report:
        found = fit_namer(
            named["train"],
            named["dev"],
            budget_of(probe, seed),
            report=lambda update, _: report(update, probe.num_updates),
        )
    asked = [u for u in parts["test"] if name_of(u)]
    right = {u.id: (float(found.name(states[u.id]) == name_of(u)), 1.0) for u in asked}
    return {f"probe_{what}": ratio_of_sums(right)}, found.head.mix.shares


# ---------------------------------------------------------------------------------------------------- in common


def by_split(chosen: Sequence[Utterance]) -> Parts:
    """As prepare split them."""
    return {split: [u for u in chosen if u.split == split] for split in SPLITS}


def budget_of(probe: ProbeConfig, seed: int) -> Budget:
    """The same in frames."""
    return Budget(
        num_updates=probe.num_updates,
        learning_rate=probe.learning_rate,
        batch_frames=round(probe.batch_seconds * FRAME_RATE),
        evaluate_every=probe.evaluate_every,
        hidden_dim=probe.hidden_dim,
        is_standardised=probe.standardised,
        seed=seed,
    )


def check_parts(name: str, parts: Mapping[str, Sequence[Any]]) -> None:
    """ValueError where a part has no utterance with what the probe asks for."""
    if empty := [part for part in SPLITS if not parts[part]]:
        raise ValueError(
            f"evaluate.probes.{name}: found no utterance with it for {' and '.join(empty)}, wanted some: prepare a "
            "source that has it in every split, or leave this probe out"
        )


def rate(pairs: Mapping[str, tuple[Sequence[str], Sequence[str]]]) -> Estimate:
    """Edits over reference tokens, by utterance's id from what was said and what was heard."""
    counted = {name: count_edits(f"utterance {name}", *pair) for name, pair in pairs.items()}
    return ratio_of_sums({name: (float(edits), float(tokens)) for name, (edits, tokens) in counted.items()})


PROBES: Mapping[str, Callable[..., tuple[dict[str, Estimate], NDArray[np.float32]]]] = {
    "phones": read_phones,
    "text": read_text,
    "speaker": name_speakers,
    "word": name_words,
    "emotion": name_emotions,
}
