"""The scores that a model has: what they are called, which is better and how they are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sonorant.evaluation.intervals import Estimate, bootstrap, difference
from sonorant.evaluation.retrieval import TOPS


@dataclass(frozen=True)
class Measure:
    """A row of the table: the key of a score, what it is called and which direction is better."""

    key: str
    name: str
    better: Literal["lower", "higher", ""] = ""
    decimals: int = 3


ABX_SLICINGS = {"": "", "_librilight": ", libri-light's slicing"}
MEASURES: Mapping[str, Sequence[Measure]] = {
    "ABX error of features": [
        Measure(f"abx_{speaker}_{context}{slicing}", f"{speaker} speakers, {context_name}{slicing_name}", "lower")
        for slicing, slicing_name in ABX_SLICINGS.items()
        for context, context_name in {"any": "any context", "in": "in context"}.items()
        for speaker in ("across", "within")
    ],
    "What small heads read off the layers": [
        Measure("probe_per", "phone error rate, linear CTC", "lower"),
        Measure("probe_wer", "word error rate, recurrent CTC", "lower"),
        Measure("probe_cer", "character error rate, recurrent CTC", "lower"),
        Measure("probe_speaker", "speakers named", "higher"),
        Measure("probe_word", "words named", "higher"),
        Measure("probe_emotion", "emotions named", "higher"),
    ],
    "Units and phones": [
        Measure("unit_abx_across_any", "ABX error of units, across speakers, any context", "lower"),
        Measure("pnmi", "PNMI", "higher"),
        Measure("phone_purity", "phone purity", "higher"),
        Measure("cluster_purity", "cluster purity", "higher"),
        Measure("pnmi_speech", "PNMI without silence", "higher"),
        Measure("phone_purity_speech", "phone purity without silence", "higher"),
        Measure("cluster_purity_speech", "cluster purity without silence", "higher"),
    ],
    "Units that change where what is said does not": [
        Measure("unit_edits_speed", "spoken a tenth faster", "lower"),
        Measure("unit_edits_pitch", "two semitones higher or lower", "lower"),
        Measure("unit_edits_noise", "in white noise at 10 dB", "lower"),
        Measure("unit_edits_room", "in a room that rings for 0.4 s", "lower"),
    ],
    "Online codes at the end of training": [
        Measure("training_active_codes", "codes that are hit", "higher", 1),
        Measure("training_perplexity", "perplexity", "higher", 1),
    ],
    "Units alone": [
        Measure("num_units", "units in the codebook", decimals=0),
        Measure("active_units", "units that occur", decimals=0),
        Measure("perplexity", "perplexity", decimals=1),
        Measure("repetition_rate", "share of frames that repeat the one before", decimals=3),
        Measure("bitrate", "bits a second, every frame", decimals=1),
        Measure("bitrate_dedup", "bits a second without repeats", decimals=1),
        Measure("bitrate_dedup_durations", "bits a second without repeats, with durations", decimals=1),
    ],
}
RETRIEVAL: Mapping[str, Sequence[Measure]] = {
    f"{way_name}, {kind_name}": [
        *(Measure(f"{way}_recall_at_{top}{kind}", f"recall at {top}", "higher") for top in TOPS),
        Measure(f"{way}_median_rank{kind}", "median rank", "lower", 1),
    ]
    for way, way_name in {"speech_to_image": "Speech to image", "image_to_speech": "Image to speech"}.items()
    for kind, kind_name in {"": "its own", "_by_class": "any with the same words"}.items()
}
WHERE_ALONE = {
    "ABX error of features": "ABX error",
    "Units that change where what is said does not": "units that change",
    "Online codes at the end of training": "online codes",
    **{group: group for group in RETRIEVAL},
}
"""What must be said of a measure where its group is not named."""
EVERY_MEASURE = {
    measure.key: replace(measure, name=f"{WHERE_ALONE[group]}, {measure.name}") if group in WHERE_ALONE else measure
    for groups in (MEASURES, RETRIEVAL)
    for group, measures in groups.items()
    for measure in measures
}
"""By key, under names that stand alone."""
HEADLINES = {
    "abx_across_any": "ABX error, across speakers, any context",
    "abx_within_any": "ABX error, within speakers, any context",
    "pnmi": "PNMI",
    "bitrate_dedup": "bits a second without repeats",
    "speech_to_image_recall_at_1_by_class": "speech to image of the same words, recall at 1",
}


@dataclass(frozen=True)
class System:
    """What was measured: the model or a baseline. Scores it has not are left out."""

    key: str
    name: str
    detail: str
    scores: Mapping[str, float]
    estimates: Mapping[str, Estimate] = field(default_factory=dict)
    """Of the scores whose share by utterance is known."""
    shares: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """By probe, how much it reads of each layer, (L,), in sum 1."""


def show_score(measure: Measure, value: float | None) -> str:
    """A score as the table prints it."""
    return "–" if value is None else f"{value:.{measure.decimals}f}"


def show_interval(measure: Measure, system: System) -> str:
    """Where the score lies in 95 of 100 draws of utterances; nothing where that is not known or all draws are alike."""
    if measure.key not in system.estimates:
        return ""
    interval = bootstrap(system.estimates[measure.key])
    if not interval.error > 0:
        return ""
    return f"{interval.low:.{measure.decimals}f} … {interval.high:.{measure.decimals}f}"


def best_systems(measure: Measure, systems: Sequence[System]) -> set[str]:
    """Keys of the systems whose printed score is the best of at least two; none where there is no better, or where
    another system's, of the same utterances, may be as good: the interval of the difference holds zero.

    Where intervals are known of some scores, the others have no best.
    """
    printed = {s.key: show_score(measure, s.scores[measure.key]) for s in systems if measure.key in s.scores}
    estimates = {s.key: s.estimates[measure.key] for s in systems if measure.key in s.estimates}
    is_known = estimates or not any(s.estimates for s in systems)
    if not measure.better or len(set(printed.values())) < 2 or not is_known:
        return set()
    choose = min if measure.better == "lower" else max
    best = choose(printed.values(), key=float)
    first = {key for key, value in printed.items() if value == best}
    for leader, other in product(first & estimates.keys(), estimates.keys() - first):
        if not bootstrap(difference(estimates[leader], estimates[other])).excludes_zero:
            return set()
    return first


def measured(
    groups: Mapping[str, Sequence[Measure]], systems: Sequence[System]
) -> tuple[dict[str, list[Measure]], list[System]]:
    """The groups and measures of which there is a score, and the systems that have one."""
    keys = {key for system in systems for key in system.scores}
    present = {group: [m for m in measures if m.key in keys] for group, measures in groups.items()}
    present = {group: measures for group, measures in present.items() if measures}
    rows = {measure.key for measures in present.values() for measure in measures}
    return present, [system for system in systems if rows & set(system.scores)]
