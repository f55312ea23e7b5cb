"""The training loop: one update after another, resumable at any instant with the same result."""

from __future__ import annotations

import contextlib
import signal
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from itertools import accumulate, pairwise
from pathlib import Path

from sonorant.config import LinearWeight, StepWeight, TrainConfig
from sonorant.data.batching import Cursor, Loader
from sonorant.tasks.task import Per
from sonorant.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from sonorant.training.distributed import Ranks, gather_parameters, spread_over_ranks
from sonorant.training.engine import Engine
from sonorant.training.gradients import balanced_scales, named_gradients, task_gradients
from sonorant.training.journal import Journal, last_numbers
from sonorant.training.optim import build_optimizer, learning_rate
from sonorant.training.progress import Pace, say, show, stop_signals
from sonorant.training.update import count, run_update

PERS: tuple[Per, ...] = ("masked", "frame", "sample", "utterance", "update")


def train(
    config: TrainConfig, engine: Engine, loader: Loader, run: Path, ranks: Ranks
) -> dict[str, float]:
    """Make all updates and return the last journal entry's numbers.

    On SIGTERM or SIGINT a checkpoint is written after the update in hand and the process exits. Raises
    ValueError when a loss is not finite or the targets have collapsed.
    """
    engine = engine.to(ranks.device).train()
    model = spread_over_ranks(engine, ranks, config)
    optimizer = build_optimizer(engine, config.optim)
    cursor = Cursor()
    sums: dict[str, float] = defaultdict(float)
    scales: dict[str, float] = {}
    if checkpoint := latest_checkpoint(run):
        about = load_checkpoint(checkpoint, engine, optimizer)
        if about["config"] != config.model_dump(mode="json"):
            raise ValueError(
                f"{config.step}: found {checkpoint} of another configuration, wanted one of this: "
                "use another run directory"
            )
        cursor, scales = Cursor(**about["cursor"]), about["scales"]
        sums |= {name: value if ranks.is_first else 0.0 for name, value in about["sums"].items()}
        say(ranks, f"{config.step}: resuming at update {cursor.update} from {checkpoint}")
        ranks.wait()
    journal = Journal(run / "journal.jsonl", after=cursor.update) if ranks.is_first else None
    pace = Pace(cursor.update, config.num_updates)

    def checkpoint_now() -> None:
        nonlocal sums
        sums = total_over_ranks(sums, ranks)
        about = {
            "cursor": asdict(cursor), "sums": sums, "scales": scales, "config": config.model_dump(mode="json")
        }  # fmt: skip
        save_checkpoint(run, cursor.update, engine, optimizer, about, config.keep_checkpoints, ranks.is_first)
        if not ranks.is_first:
            # The first rank carries the sums on, but all must have the same names.
            sums = defaultdict(float, dict.fromkeys(sums, 0.0))
        ranks.wait()

    updates = loader.updates(cursor)
    with stop_signals() as stopped, contextlib.closing(updates):
        while cursor.update < config.num_updates:
            update = cursor.update
            phase, plain = weights_at(config, update)
            weights = {name: weight * scales.get(name, 1.0) for name, weight in plain.items()}
            batches, after = next(updates)
            own = count(batches)
            *totals, stop = ranks.total([*own.values(), float(bool(stopped))])
            if stop:
                checkpoint_now()
                say(
                    ranks,
                    f"{config.step}: stopped at update {update} of {config.num_updates}; "
                    f"the same command goes on from {run}",
                )
                raise SystemExit(0 if signal.SIGTERM in stopped or not stopped else 130)
            counts: dict[Per, float] = {**dict(zip(own, totals, strict=True)), "update": 1.0}
            batches = [batch.to(ranks.device) for batch in batches]
            is_last_of_phase = update + 1 == config.num_updates or weights_at(config, update + 1)[0] != phase
            is_logged = (update + 1) % config.log_every == 0 or is_last_of_phase
            gradients: dict[str, float] = {}
            if is_balanced(config, update) or (config.log_gradients and is_logged):
                names, products = task_gradients(config, engine, batches, weights, counts, update, ranks)
                gradients = named_gradients(names, products)
                if is_balanced(config, update):
                    scales = balanced_scales(names, products, weights, scales)
                    weights = {name: weight * scales.get(name, 1.0) for name, weight in plain.items()}
            begin, end = schedule_at(config, update)
            if update == begin:
                optimizer.state.clear()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(update - begin, end - begin, config.optim)
            step_sums = run_update(config, engine, model, optimizer, batches, weights, counts, update, ranks)
            cursor = after
            engine.after_update(cursor.update, ranks.sum)
            for name, value in step_sums.items():
                sums[name] += value
            for name, weight in weights.items():
                if weight:
                    sums[f"{name}/weighted"] += weight * step_sums[f"{name}/loss"]
                    sums[f"{name}/weight"] += weight / ranks.count
            for per, number in counts.items():
                sums[per] += number / ranks.count
            pace.add(sum(batch.seconds for batch in batches) * ranks.count)
            # An entry averages over updates of one phase.
            if is_logged:
                totals_by_name = total_over_ranks(sums, ranks)
                sums = defaultdict(float)
                entry = {**averages(config, engine, totals_by_name), **engine.monitor(), **gradients}
                check_alive(config, entry, cursor.update)
                say(
                    ranks,
                    f"{config.step}: {cursor.update}/{config.num_updates}  "
                    + show(entry)
                    + pace.show(cursor.update),
                )
                if journal:
                    journal.write(
                        update=cursor.update, learning_rate=optimizer.param_groups[0]["lr"], **entry
                    )
            if cursor.update % config.checkpoint_every == 0:
                checkpoint_now()
    gather_parameters(engine)
    say(ranks, f"{config.step}: {pace.summary(cursor.update)}")
    return last_numbers(journal.path) if journal else {}


def phase_ends(config: TrainConfig) -> list[int]:
    """How many updates are done when each phase ends."""
    return [round(share * config.num_updates) for share in accumulate(phase.share for phase in config.phases)]


def schedule_at(config: TrainConfig, update: int) -> tuple[int, int]:
    """The updates that the learning rate's schedule runs over when the one with this index from 0 is made."""
    begins = zip(config.phases, [0, *phase_ends(config)], strict=False)
    resets = [0, *(begin for phase, begin in begins if phase.reset_optimizer and begin), config.num_updates]
    return next((begin, end) for begin, end in pairwise(resets) if update < end)


def weights_at(config: TrainConfig, update: int) -> tuple[int, dict[str, float]]:
    """Index of the phase that the update with this index from 0 belongs to, and the task weights there."""
    ends = phase_ends(config)
    index = next((i for i, end in enumerate(ends) if update < end), len(ends) - 1)
    first, last = [0, *ends][index : index + 2]
    return index, config.phases[index].weights_at((update - first) / max(1, last - first))


def is_balanced(config: TrainConfig, update: int) -> bool:
    """Whether weights are rescaled before the update with this index from 0."""
    at, every = config.balance.at, config.balance.every
    return at is not None and (update == at or (every > 0 and update > at and (update - at) % every == 0))


def averages(config: TrainConfig, engine: Engine, totals: Mapping[str, float]) -> dict[str, float]:
    """Means over what each task's loss is a sum over, and over updates for what is no task's."""
    is_constant = config.balance.at is None and not any(
        isinstance(weight, LinearWeight | StepWeight) for phase in config.phases for weight in phase.weights.values()
    )
    entry: dict[str, float] = {"loss": 0.0}
    for name, value in totals.items():
        task, _, key = name.partition("/")
        if not key:
            if name not in PERS:
                entry[name] = value / totals["update"]
            continue
        per = engine.task(task).per
        if key == "weighted":
            entry["loss"] += value / totals[per]
        elif key == "weight":
            if not is_constant:
                entry[name] = value / totals["update"]
        else:
            entry[name] = value / totals[per]
    return entry


def total_over_ranks(sums: Mapping[str, float], ranks: Ranks) -> dict[str, float]:
    """Sums over all ranks, by name."""
    names = sorted(sums)
    return defaultdict(float, zip(names, ranks.total([sums[name] for name in names]), strict=True))


def check_alive(config: TrainConfig, entry: Mapping[str, float], update: int) -> None:
    """ValueError where targets or predictions hardly vary any more, or few codes are used: a collapse."""
    guard = config.guard
    limits = {
        "teacher/target_std": (guard.min_target_std, "raise teacher.start_decay"),
        "teacher/prediction_std": (guard.min_prediction_std, "raise teacher.start_decay"),
        "codebooks/perplexity": (guard.min_perplexity, "raise batching.batch_seconds or set codebooks.init small"),
        "contrast/perplexity": (guard.min_perplexity, "raise the weight of diversity"),
        "alignment/effective_rank": (guard.min_effective_rank, "raise alignment.repulsion_relative"),
    }
    for name, (limit, move) in limits.items():
        if update > guard.after_updates and entry.get(name, limit) < limit:
            raise ValueError(
                f"{config.step}: found {name} {entry[name]:.4g} at update {update}, wanted at least {limit:g}: "
                f"it has collapsed; lower optim.learning_rate or {move} and train again"
            )
