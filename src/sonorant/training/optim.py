"""AdamW and the tri-stage learning rate."""

from __future__ import annotations

import torch
from torch import nn

from sonorant.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with decoupled weight decay on all trainable parameters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(update: int, num_updates: int, config: OptimConfig) -> float:
    """The rate of the update with this index from 0: linear warm-up, hold, decay along an exponential or a line."""
    warmup = round(config.warmup_share * num_updates)
    # Two halves of three updates are two each.
    decay = min(round(config.decay_share * num_updates), num_updates - warmup)
    if update < warmup:
        return config.learning_rate * (config.start_scale + (1 - config.start_scale) * update / warmup)
    if update < num_updates - decay:
        return config.learning_rate
    done = (update - (num_updates - decay)) / decay
    if config.decay == "linear":
        return config.learning_rate * (1 + done * (config.final_scale - 1))
    scale: float = config.final_scale**done
    return config.learning_rate * scale
