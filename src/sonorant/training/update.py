"""One optimizer step over the parts of an update: micro-batches here, other ranks elsewhere."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from sonorant.config import TrainConfig
from sonorant.data.batching import Batch
from sonorant.data.frames import num_frames, num_samples
from sonorant.tasks.task import Per, Shares
from sonorant.training.distributed import Ranks, gradient_norm, without_exchange
from sonorant.training.engine import Engine, Gather, Parts

Counts = Mapping[Per, float]
"""How many masked frames, frames, samples and utterances an update has over all ranks; and one update."""


def count(batches: Sequence[Batch]) -> dict[Per, float]:
    """What this rank has of an update: samples are those that lie in some frame."""
    return {
        "masked": float(sum(int(batch.mask.sum()) for batch in batches)),
        "frame": float(sum(len(batch.mask) for batch in batches)),
        "sample": float(sum(num_samples(num_frames(n)) for batch in batches for n in batch.num_samples)),
        "utterance": float(sum(len(batch.num_samples) for batch in batches)),
    }


def scaled_weights(engine: Engine, weights: Mapping[str, float], counts: Counts) -> dict[str, float]:
    """Weights of the summed losses, so that each task's is a mean over what it counts, over all ranks."""
    return {name: weights[name] / counts[engine.task(name).per] for name in engine.tasks if weights.get(name)}


def run_update(
    config: TrainConfig,
    engine: Engine,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    weights: Mapping[str, float],
    counts: Counts,
    update: int,
    ranks: Ranks,
) -> dict[str, float]:
    """One optimizer step over this rank's micro-batches; returns this rank's sums.

    `model` is the engine, or what makes it one over several ranks. Raises ValueError where a loss or a gradient is
    not finite.
    """
    optimizer.zero_grad(set_to_none=True)
    scaled = scaled_weights(engine, weights, counts)
    gather = gatherer(config, engine, batches, scaled, update, ranks)
    sums: dict[str, float] = defaultdict(float)
    for index, batch in enumerate(batches):
        is_last = index == len(batches) - 1
        seed_part(config, update, ranks, index)
        with contextlib.nullcontext() if is_last else without_exchange(model):
            with autocast(config, ranks):
                loss, parts = model(batch, scaled, update, gather, index * ranks.count + ranks.rank)
            # Gradients are averaged over ranks, losses are means over what all of them have.
            (loss * ranks.count).backward()
        for name, value in parts.items():
            sums[name] += float(value)
    wrong = [name for name, value in sums.items() if not math.isfinite(value)]
    norm = gradient_norm(model)
    if wrong or not math.isfinite(norm):
        named = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        found = wrong or [f"the gradient of {name}" for name in named[:3]] or ["the gradient's norm"]
        raise ValueError(
            f"{config.step}: found {', '.join(found)} not finite at update {update + 1}, wanted numbers: "
            "lower optim.learning_rate or set optim.max_grad_norm and train again"
        )
    if config.optim.max_grad_norm is not None and norm > config.optim.max_grad_norm:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, config.optim.max_grad_norm / (norm + 1e-6))
    optimizer.step()
    sums["gradient_norm"] = norm / ranks.count
    return sums


def gatherer(
    config: TrainConfig,
    engine: Engine,
    batches: Sequence[Batch],
    weights: Mapping[str, float],
    update: int,
    ranks: Ranks,
) -> Gather:
    """How the parts of this update learn of one another.

    A single part a rank asks the others while it runs. Several are run once without gradient first, with the same
    random numbers, so that each then knows what all of them share (Gao et al. 2021, gradient caching).
    """
    if len(batches) == 1:
        return ranks.gather
    heard: list[Parts] = []
    for index, batch in enumerate(batches):
        seed_part(config, update, ranks, index)
        with autocast(config, ranks):
            shares: dict[str, Shares] = engine.shares(batch, weights, update)
        heard.append(ranks.gather(shares))
    together = {name: [share for parts in heard for share in parts[name]] for name in heard[0]}
    return lambda shares: {name: together[name] for name in shares}


def seed_part(config: TrainConfig, update: int, ranks: Ranks, index: int) -> None:
    """Give a part random numbers of its own, so that a resumed run draws what an undisturbed one draws."""
    torch.manual_seed(hash((config.seed, update, ranks.rank, index)))


def autocast(config: TrainConfig, ranks: Ranks) -> torch.autocast:
    """bfloat16 where the recipe and the device want it."""
    wanted = config.precision == "bfloat16" and ranks.device.type == "cuda"
    return torch.autocast(ranks.device.type, torch.bfloat16, enabled=wanted)
