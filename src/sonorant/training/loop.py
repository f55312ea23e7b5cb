"""The training loop: one update after another, resumable at any instant with the same result."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import FrameType

import torch
from torch import nn

from sonorant.config import PretrainConfig
from sonorant.data.batching import Batch, Cursor, Loader
from sonorant.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from sonorant.training.distributed import Ranks
from sonorant.training.engine import Engine
from sonorant.training.journal import Journal, last_numbers
from sonorant.training.optim import build_optimizer, learning_rate


def train(
    config: PretrainConfig, engine: Engine, loader: Loader, run: Path, ranks: Ranks
) -> dict[str, float]:
    """Make all updates and return the last journal entry's numbers.

    On SIGTERM or SIGINT a checkpoint is written after the update in hand and the process exits. Raises
    ValueError when a loss is not finite or the targets have collapsed.
    """
    engine = engine.to(ranks.device).train()
    optimizer = build_optimizer(engine, config.optim)
    cursor = Cursor()
    sums: dict[str, float] = defaultdict(float)
    if checkpoint := latest_checkpoint(run):
        about = load_checkpoint(checkpoint, engine, optimizer)
        if about["config"] != config.model_dump(mode="json"):
            raise ValueError(
                f"pretrain: found {checkpoint} of another configuration, wanted one of this: use another run directory"
            )
        cursor = Cursor(**about["cursor"])
        sums |= {name: value if ranks.is_first else 0.0 for name, value in about["sums"].items()}
        say(ranks, f"pretrain: resuming at update {cursor.update} from {checkpoint}")
    journal = Journal(run / "journal.jsonl", after=cursor.update) if ranks.is_first else None
    model: nn.Module = engine
    if ranks.count > 1:
        model = nn.parallel.DistributedDataParallel(engine, find_unused_parameters=True)
    pace = Pace(cursor.update, config.num_updates)

    def checkpoint_now() -> None:
        nonlocal sums
        sums = total_over_ranks(sums, ranks)
        if ranks.is_first:
            about = {"cursor": asdict(cursor), "sums": sums, "config": config.model_dump(mode="json")}
            save_checkpoint(run, cursor.update, engine, optimizer, about, config.keep_checkpoints)
        else:
            # The first rank carries the sums on, but all must have the same names.
            sums = defaultdict(float, dict.fromkeys(sums, 0.0))
        ranks.wait()

    updates = loader.updates(cursor)
    with stop_signals() as stopped, contextlib.closing(updates):
        while cursor.update < config.num_updates:
            update = cursor.update
            weights = weights_at(config, update)
            # Every update has its own random numbers, so a resumed run draws what an undisturbed one draws.
            torch.manual_seed(hash((config.seed, update, ranks.rank)))
            batches, after = next(updates)
            masked, stop = ranks.total(
                [float(sum(int(batch.mask.sum()) for batch in batches)), float(bool(stopped))]
            )
            if stop:
                checkpoint_now()
                say(
                    ranks,
                    f"pretrain: stopped at update {update} of {config.num_updates}; "
                    f"the same command goes on from {run}",
                )
                raise SystemExit(0 if signal.SIGTERM in stopped or not stopped else 130)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(update, config.num_updates, config.optim)
            step_sums = run_update(config, model, optimizer, batches, weights, masked, update, ranks)
            cursor = after
            engine.after_update(cursor.update)
            for name, value in step_sums.items():
                sums[name] += value
            sums["masked_frames"] += masked / ranks.count
            sums["updates"] += 1 / ranks.count
            pace.add(sum(batch.seconds for batch in batches) * ranks.count)
            # An entry averages over updates of one phase.
            phase_ends = cursor.update == config.num_updates or weights_at(config, cursor.update) != weights
            if cursor.update % config.log_every == 0 or phase_ends:
                totals = total_over_ranks(sums, ranks)
                sums = defaultdict(float)
                entry = averages(totals)
                check_alive(config, entry, cursor.update)
                say(
                    ranks,
                    f"pretrain: {cursor.update}/{config.num_updates}  "
                    + show(entry)
                    + pace.show(cursor.update),
                )
                if journal:
                    journal.write(
                        update=cursor.update, learning_rate=optimizer.param_groups[0]["lr"], **entry
                    )
            if cursor.update % config.checkpoint_every == 0:
                checkpoint_now()
    say(ranks, f"pretrain: {pace.summary(cursor.update)}")
    return last_numbers(journal.path) if journal else {}


def run_update(
    config: PretrainConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    weights: Mapping[str, float],
    masked: float,
    update: int,
    ranks: Ranks,
) -> dict[str, float]:
    """One optimizer step over this rank's micro-batches; returns this rank's sums."""
    optimizer.zero_grad(set_to_none=True)
    bf16 = config.precision == "bfloat16" and ranks.device.type == "cuda"
    sums: dict[str, float] = defaultdict(float)
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        distributed = nn.parallel.DistributedDataParallel
        alone = model.no_sync() if isinstance(model, distributed) and not last else contextlib.nullcontext()
        with alone:
            with torch.autocast(ranks.device.type, torch.bfloat16, enabled=bf16):
                loss, parts = model(batch.to(ranks.device), weights)
            # DDP averages gradients over ranks; the loss is a mean over the masked frames of all of them.
            (loss * (ranks.count / masked)).backward()
        for name, value in parts.items():
            sums[name] += float(value.detach())
    wrong = [name for name, value in sums.items() if not math.isfinite(value)]
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if wrong or not torch.isfinite(norm):
        named = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        found = wrong or [f"the gradient of {name}" for name in named[:3]] or ["the gradient's norm"]
        raise ValueError(
            f"pretrain: found {', '.join(found)} not finite at update {update + 1}, wanted numbers: "
            "lower optim.learning_rate or set optim.max_grad_norm and train again"
        )
    if config.optim.max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, config.optim.max_grad_norm, norm)
    optimizer.step()
    sums["gradient_norm"] = float(norm) / ranks.count
    return sums


def weights_at(config: PretrainConfig, update: int) -> dict[str, float]:
    """The task weights of the phase that the update with this index from 0 belongs to."""
    end = 0.0
    for phase in config.phases:
        end += phase.share
        if update < round(end * config.num_updates):
            break
    return dict(phase.weights.items())


def averages(totals: Mapping[str, float]) -> dict[str, float]:
    """Per masked frame what was summed over frames, per update what was summed over updates."""
    per_update = {"gradient_norm"}
    masked, updates = totals["masked_frames"], round(totals["updates"])
    entry = {name: value / (updates if name in per_update else masked) for name, value in totals.items()}
    return {name: value for name, value in entry.items() if name not in ("masked_frames", "updates")}


def total_over_ranks(sums: Mapping[str, float], ranks: Ranks) -> dict[str, float]:
    """Sums over all ranks, by name."""
    names = sorted(sums)
    return defaultdict(float, zip(names, ranks.total([sums[name] for name in names]), strict=True))


def check_alive(config: PretrainConfig, entry: Mapping[str, float], update: int) -> None:
    """ValueError where the teacher's targets or the predictions hardly vary any more: a collapse."""
    limits = {
        "teacher/target_std": config.guard.min_target_std,
        "teacher/prediction_std": config.guard.min_prediction_std,
    }
    for name, limit in limits.items():
        if update > config.guard.after_updates and entry.get(name, limit) < limit:
            raise ValueError(
                f"pretrain: found {name} {entry[name]:.4g} at update {update}, wanted at least {limit:g}: "
                "it has collapsed; lower optim.learning_rate or raise teacher.start_decay and train again"
            )


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that SIGTERM and SIGINT are added to instead of ending the process."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        seen.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Pace:
    """How fast it goes and how long it will take."""

    def __init__(self, first_update: int, num_updates: int) -> None:
        self.first, self.num_updates = first_update, num_updates
        self.start, self.seconds = time.monotonic(), 0.0

    def add(self, seconds: float) -> None:
        """Count audio that an update has seen."""
        self.seconds += seconds

    def show(self, update: int) -> str:
        """Audio-seconds per second and the time left."""
        elapsed = time.monotonic() - self.start
        left = elapsed / max(1, update - self.first) * (self.num_updates - update)
        return f"  {self.seconds / elapsed:.1f} audio-s/s  ETA {int(left // 60)}:{int(left % 60):02d}"

    def summary(self, update: int) -> str:
        """The whole run in one line."""
        elapsed = time.monotonic() - self.start
        done = update - self.first
        hours, rate = self.seconds / 3600, self.seconds / elapsed
        return f"{done} updates, {hours:.2f} h of audio in {elapsed:.0f} s, {rate:.1f} audio-s/s"


def show(entry: Mapping[str, float]) -> str:
    """An entry's numbers on one line."""
    return "  ".join(f"{name} {value:.4g}" for name, value in entry.items())


def say(ranks: Ranks, line: str) -> None:
    """Print from the first rank alone."""
    if ranks.is_first:
        print(line, file=sys.stderr, flush=True)
