"""Scores of the published model and of its baselines on one set of utterances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sonorant.config import EvaluateConfig
from sonorant.data.corpus import Utterance
from sonorant.data.frames import frame_labels
from sonorant.data.progress import shown_progress
from sonorant.evaluation.abx import score_abx
from sonorant.evaluation.abx.items import SILENCE
from sonorant.evaluation.intervals import Estimate
from sonorant.evaluation.measures import System
from sonorant.evaluation.units import Joint, estimate_pnmi, estimate_purities, measure_use
from sonorant.steps.contenders import Contender
from sonorant.steps.items import Items
from sonorant.steps.searching import Hunt


@dataclass(frozen=True)
class Scored:
    """A contender's scores, its phone–unit table where there are phones, what could not be measured, and what its
    retrieval was measured on."""

    system: System
    joint: Joint | None
    missing: tuple[str, ...]
    hunt: Hunt | None = None


def score(config: EvaluateConfig, contender: Contender, utterances: Sequence[Utterance], items: Items) -> Scored:
    """Every score that the utterances and the items allow."""
    units = [contender.units[utterance.id] for utterance in utterances]
    use = measure_use(units, sum(utterance.seconds for utterance in utterances))
    scores = {"num_units": float(contender.num_units), "active_units": float(use.num_active)}
    scores |= {name: value for name, value in asdict(use).items() if name != "num_active"}
    estimates = {**contender.changes, **contender.probed.estimates}
    scores |= {name: change.value for name, change in estimates.items()}
    if contender.hunt:
        scores |= contender.hunt.scores
        estimates |= contender.hunt.estimates
    aligned = {u.id: u.phones for u in utterances if u.phones is not None}
    joint: Joint | None = None
    missing: tuple[str, ...] = ()
    if aligned:
        labels = [frame_labels(phones, len(contender.units[name])) for name, phones in aligned.items()]
        joint = Joint.of_frames(labels, (contender.units[name] for name in aligned), contender.num_units)
        phones = dict(zip(aligned, labels, strict=True))
        for suffix, table in {"": joint, "_speech": joint.without(SILENCE)}.items():
            known = {"pnmi": estimate_pnmi(table, phones, contender.units)}
            known["phone_purity"], known["cluster_purity"] = estimate_purities(table, phones, contender.units)
            estimates |= {f"{name}{suffix}": estimate for name, estimate in known.items()}
            scores |= {f"{name}{suffix}": estimate.value for name, estimate in known.items()}
    if items.utterances:
        errors, missing = abx_errors(config, contender, items)
        estimates = errors | estimates
        scores = {name: error.value for name, error in errors.items()} | scores
    system = System(contender.key, contender.name, contender.detail, scores, estimates, contender.probed.shares)
    return Scored(system, joint, missing, contender.hunt)


def abx_errors(
    config: EvaluateConfig, contender: Contender, items: Items
) -> tuple[dict[str, Estimate], tuple[str, ...]]:
    """ABX errors by name, and the names of those for which there is no cell."""
    choices: dict[str, dict[str, Any]] = {
        f"abx_{speaker}_{context}{suffix}": {
            "items": items.in_context if context == "in" else items.any_context,
            "features": contender.features,
            "speaker": speaker,
            "context": context,
            "slicing": slicing,
        }
        for suffix, slicing in {"": "fixed", "_librilight": "librilight"}.items()
        for context in ("any", "in")
        for speaker in ("across", "within")
    }
    choices["unit_abx_across_any"] = {
        "items": items.any_context,
        "features": contender.units,
        "speaker": "across",
        "context": "any",
        "distance": "identical",
    }
    found = {}
    with shown_progress(f"evaluate: {contender.name}", "ABX scores") as report:
        for name, choice in choices.items():
            found[name] = score_abx(
                **choice,
                max_items=config.abx_max_items,
                max_speakers=config.abx_max_speakers,
                seed=config.seed,
            )
            report(len(found), len(choices))
    errors = {
        name: Estimate(result.error, {one: result.influence.get(one, 0.0) for one in items.utterances})
        for name, result in found.items()
        if result.num_cells
    }
    return errors, tuple(name for name, result in found.items() if not result.num_cells)
