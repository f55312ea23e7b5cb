"""Do tasks help or fight? Each one's gradient on the shared encoder: its norm, and the cosine between any two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from sonorant.config import TrainConfig
from sonorant.data.batching import Batch
from sonorant.training.distributed import Ranks
from sonorant.training.engine import Engine
from sonorant.training.update import Counts, autocast, gatherer, scaled_weights, seed_part


def task_gradients(
    config: TrainConfig,
    engine: Engine,
    batches: Sequence[Batch],
    weights: Mapping[str, float],
    counts: Counts,
    update: int,
    ranks: Ranks,
) -> tuple[list[str], Tensor]:
    """The tasks with weight, and the inner products of their weighted gradients on the encoder, (N, N) float64.

    The same update's batches over all ranks, in passes of their own: nothing is changed by it.
    """
    scaled = scaled_weights(engine, weights, counts)
    gather = gatherer(config, engine, batches, scaled, update, ranks)
    shared = [p for p in engine.encoder.parameters() if p.requires_grad]
    gradients: dict[str, list[Tensor]] = {name: [torch.zeros_like(p) for p in shared] for name in scaled}
    for index, batch in enumerate(batches):
        seed_part(config, update, ranks, index)
        with autocast(config, ranks):
            outcomes = engine.outcomes(batch, scaled, update, gather, index * ranks.count + ranks.rank)
        for name, outcome in outcomes.items():
            loss = scaled[name] * outcome.loss
            if loss.requires_grad:
                found = torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True)
                for total, gradient in zip(gradients[name], found, strict=True):
                    if gradient is not None:
                        total += gradient
    products = torch.zeros(len(scaled), len(scaled), dtype=torch.float64, device=ranks.device)
    for tensors in zip(*gradients.values(), strict=True):
        # One parameter of all tasks at a time, so that only one more copy of it is held.
        rows = ranks.sum(torch.stack([tensor.flatten() for tensor in tensors])).double()
        products += rows @ rows.T
    return list(scaled), products.cpu()


def named_gradients(names: Sequence[str], products: Tensor) -> dict[str, float]:
    """Norms and cosines as the journal has them."""
    norms = products.diagonal().sqrt()
    entry = {f"{name}/encoder_gradient": float(norm) for name, norm in zip(names, norms, strict=True)}
    for (i, one), (j, other) in combinations(enumerate(names), 2):
        entry[f"{one}+{other}/gradient_cosine"] = float(products[i, j] / (norms[i] * norms[j]).clamp(min=1e-30))
    return entry


def balanced_scales(
    names: Sequence[str], products: Tensor, weights: Mapping[str, float], scales: Mapping[str, float]
) -> dict[str, float]:
    """New factors on the recipe's weights: each task pulls on the encoder in proportion to its weight.

    `products` were made with `weights`, scales included. The sum of all norms stays what it was.
    """
    norms = dict(zip(names, products.diagonal().sqrt().tolist(), strict=True))
    pulling = {name: norm for name, norm in norms.items() if norm > 0}
    if not pulling:
        return dict(scales)
    plain = {name: weights[name] / scales.get(name, 1.0) for name in pulling}
    total, total_plain = sum(pulling.values()), sum(plain.values())
    wanted = {name: total * plain[name] / total_plain for name in pulling}
    return {**scales, **{name: scales.get(name, 1.0) * wanted[name] / pulling[name] for name in pulling}}
