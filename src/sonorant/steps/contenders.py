"""Who is measured: the published model and what it is measured beside, with features, units and probes of each."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sonorant.clustering import fit_kmeans
from sonorant.config import EvaluateConfig
from sonorant.data.corpus import Utterance
from sonorant.data.progress import shown_progress
from sonorant.evaluation.intervals import Estimate
from sonorant.inference import Speech, load, load_untrained
from sonorant.models.codebook import Codebook, centre_frames
from sonorant.steps.changing import measure_changes
from sonorant.steps.features import draw_utterances, layer_of, mfcc_of
from sonorant.steps.probing import Probed, measure_probes
from sonorant.steps.searching import Hunt, Pairs, hunt
from sonorant.steps.states import Layers, layers_of, layers_of_mfcc

CODEBOOK_FRAMES = 500_000
"""Training frames that a baseline's codebook is fitted on."""
BATCH_UTTERANCES = 16
Frames = NDArray[np.float32]
Units = NDArray[np.int64]


@dataclass(frozen=True)
class Contender:
    """What is compared: features (T, D) and units (T,) of every evaluated utterance, by id; what it makes of images
    and what is said of them, where it can."""

    key: str
    name: str
    detail: str
    features: Mapping[str, Frames]
    units: Mapping[str, Units]
    num_units: int
    hunt: Hunt | None = None
    changes: Mapping[str, Estimate] = field(default_factory=dict)
    probed: Probed = field(default_factory=Probed)


def contenders(
    config: EvaluateConfig,
    model: Path,
    previous: Path | None,
    utterances: Sequence[Utterance],
    everything: Sequence[Utterance],
    corpus: str,
) -> Iterator[Contender]:
    """The model, then its baselines, each made when it is asked for: those that are configured and the previous model.

    `corpus` is the digest of the corpus of `everything`. A baseline without a codebook of its own gets one of the
    model's size, fitted on the train split: MFCC are clustered as they are, as HuBERT does, the untrained encoder's
    frames scaled and centred as the model's are.
    """
    speech = load(model)
    assert speech.codebook is not None
    pairs = None if speech.gallery is None else Pairs.among(speech.gallery.rows, utterances)

    def probed(layers: Layers, contender: Contender) -> Contender:
        found = measure_probes(config, layers, everything, corpus, f"evaluate: {contender.name}")
        return replace(contender, probed=found)

    def published(key: str, name: str, speech: Speech) -> Contender:
        return probed(layers_of(speech), as_contender(config, key, name, speech, utterances, pairs))

    yield published("model", "this model", speech)
    if config.baselines:
        training = [utterance for utterance in everything if utterance.split == "train"]
        for found, layers in baselines(config, model, speech, utterances, training):
            yield probed(layers, found)
    if previous is not None:
        yield published("previous", "previous model", load(previous))


def baselines(
    config: EvaluateConfig,
    model: Path,
    speech: Speech,
    utterances: Sequence[Utterance],
    training: Sequence[Utterance],
) -> Iterator[tuple[Contender, Layers]]:
    """The configured ones, and what makes their layers: MFCC, the same without each utterance's mean, and the untrained
    encoder."""
    assert speech.codebook is not None
    drawn = draw_utterances(training, CODEBOOK_FRAMES, config.seed)
    is_scaled, is_centred = bool((speech.codebook.scale != 1).any()), speech.codebook.centred
    num_units = speech.num_units

    def fit(frames: Iterable[Frames], normalise: bool = False, centred: bool = False) -> Codebook:
        seen = np.concatenate([centre_frames(part) for part in frames] if centred else list(frames))
        return replace(fit_kmeans(seen, num_units, seed=config.seed, normalise=normalise).codebook, centred=centred)

    def mfcc(utterances: Sequence[Utterance], label: str) -> Iterator[Frames]:
        return counted(mfcc_of(utterances, num_threads(config)), utterances, label)

    if {"mfcc", "mfcc_centred"} & set(config.baselines):
        seen = list(mfcc(drawn, "evaluate: MFCC, training"))
        features = by_id(utterances, mfcc(utterances, "evaluate: MFCC"))
        if "mfcc" in config.baselines:
            detail = f"39 dimensions; {num_units} units fitted here on the train split"
            yield (
                contender("mfcc", "MFCC", detail, features, fit(seen)),
                layers_of_mfcc(num_threads(config), centred=False),
            )
        if "mfcc_centred" in config.baselines:
            features = {name: centre_frames(frames) for name, frames in features.items()}
            detail = "the same without each utterance's mean"
            yield (
                contender("mfcc_centred", "MFCC, centred", detail, features, fit(seen, centred=True)),
                layers_of_mfcc(num_threads(config), centred=True),
            )
    if "untrained" in config.baselines:
        untrained = load_untrained(model, config.seed)
        codebook = fit(embedded(untrained, drawn, "evaluate: untrained encoder, training"), is_scaled, is_centred)
        features = by_id(utterances, embedded(untrained, utterances, "evaluate: untrained encoder"))
        detail = f"the same architecture and layer with random weights; {num_units} units fitted here"
        yield contender("untrained", "untrained", detail, features, codebook), layers_of(untrained)


def as_contender(
    config: EvaluateConfig, key: str, name: str, speech: Speech, utterances: Sequence[Utterance], pairs: Pairs | None
) -> Contender:
    """A published model as a contender."""
    assert speech.codebook is not None
    features = by_id(utterances, embedded(speech, utterances, f"evaluate: {name}"))
    detail = f"layer {speech.layer} of {speech.num_layers}, {speech.dim} dimensions; {speech.num_units} units"
    found = None if pairs is None else hunt(speech, pairs, f"evaluate: {name}, retrieval")
    drawn = np.random.default_rng(config.seed).permutation(len(utterances))[: config.max_changed]
    chosen = [utterances[row] for row in sorted(drawn.tolist())]
    changes = measure_changes(speech, chosen, config.seed, f"evaluate: {name}, changed") if chosen else {}
    return replace(contender(key, name, detail, features, speech.codebook), hunt=found, changes=changes)


def contender(key: str, name: str, detail: str, features: Mapping[str, Frames], codebook: Codebook) -> Contender:
    """A contender whose units are its features' nearest centroids."""
    units = {utterance: codebook.assign(frames) for utterance, frames in features.items()}
    return Contender(key, name, detail, features, units, codebook.num_units)


def by_id(utterances: Sequence[Utterance], frames: Iterator[Frames]) -> dict[str, Frames]:
    """Frames by their utterance's id."""
    return {utterance.id: part for utterance, part in zip(utterances, frames, strict=True)}


def embedded(speech: Speech, utterances: Sequence[Utterance], label: str) -> Iterator[Frames]:
    """The published layer's frames of each utterance."""
    starts = range(0, len(utterances), BATCH_UTTERANCES)
    batches = (utterances[start : start + BATCH_UTTERANCES] for start in starts)
    frames = (part for batch in batches for part in layer_of(batch, speech, None))
    return counted(frames, utterances, label)


def counted(frames: Iterator[Frames], utterances: Sequence[Utterance], label: str) -> Iterator[Frames]:
    """The same frames, with the progress shown."""
    with shown_progress(label, "utterances") as report:
        for place, part in enumerate(frames, start=1):
            report(place, len(utterances))
            yield part


def num_threads(config: EvaluateConfig) -> int:
    """Threads to decode audio in."""
    return config.num_workers or len(os.sched_getaffinity(0))
