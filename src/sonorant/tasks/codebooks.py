"""Online codebooks: at masked frames, name the codeword nearest to each of the teacher's layers.

DinoSR (Liu et al. 2023; pretraining.md §1). Each target layer has a codebook that follows the frames assigned to it,
by an exponential moving average of their sums and counts. Nothing revives a code that is never hit.

Shapes: M masked frames, D width, K codebooks, V codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sonorant.config import CodebooksConfig
from sonorant.tasks.task import Monitored, Outcome, Shares, View, Views, perplexity, precise


def nearest_codes(frames_KMD: Tensor, codewords_KVD: Tensor) -> Tensor:
    """The nearest codeword of each frame in each codebook by Euclid, (K, M), as one matrix product each."""
    half_norms_KV1 = -0.5 * codewords_KVD.square().sum(2, keepdim=True)
    return torch.baddbmm(half_norms_KV1, codewords_KVD, frames_KMD.transpose(1, 2)).argmax(1)


def sums_and_counts(frames_KMD: Tensor, codes_KM: Tensor, num_codes: int) -> Tensor:
    """Of the frames assigned to each code: their sum, and last their number, (K, V, D + 1) float32."""
    books, _, dim = frames_KMD.shape
    rows = (codes_KM + num_codes * torch.arange(books, device=codes_KM.device)[:, None]).flatten()
    sums = frames_KMD.new_zeros(books * num_codes, dim).index_add_(0, rows, frames_KMD.flatten(0, 1))
    counts = torch.bincount(rows, minlength=books * num_codes)
    return torch.cat([sums, counts[:, None].to(sums.dtype)], dim=1).view(books, num_codes, dim + 1)


def moving_average(state_KVE: Tensor, fresh_KVE: Tensor, decay: float) -> Tensor:
    """τ · state + (1 − τ) · fresh where the last column of `fresh` counts a hit; elsewhere the state, bit for bit."""
    return torch.where(fresh_KVE[..., -1:] > 0, decay * state_KVE + (1 - decay) * fresh_KVE, state_KVE)


def codebook_loss(logits_KMV: Tensor, codes_KM: Tensor) -> Tensor:
    """-Σ log p(code) over frames, in nats, float32, mean over codebooks."""
    return F.cross_entropy(precise(logits_KMV).flatten(0, 1), codes_KM.flatten(), reduction="sum") / len(logits_KMV)


class Codebooks(Monitored):
    """K codebooks and a linear head for each.

    `state` holds every code's moving sum and, last, its moving count, (K, V, D + 1) float32: never cast, and changed
    in place and only when an update is done.
    """

    state: Tensor

    def __init__(self, dim: int, layers: Sequence[int], config: CodebooksConfig) -> None:
        super().__init__()
        self.config, self.layers = config, tuple(layers)
        self.views: Mapping[View, int | None] = {"masked": None, "teacher": None}
        self.heads = nn.ModuleList(nn.Linear(dim, config.num_codes) for _ in self.layers)
        for head in self.heads:
            assert isinstance(head, nn.Linear)
            nn.init.normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        codewords_KVD = torch.randn(len(self.layers), config.num_codes, dim)
        if config.init == "normalised":
            # Every dimension has mean 0 and variance 1 over the codewords, as it has over an utterance's frames.
            variance, mean = torch.var_mean(codewords_KVD, dim=1, correction=0, keepdim=True)
            codewords_KVD = (codewords_KVD - mean) * torch.rsqrt(variance + 1e-5)
        else:
            codewords_KVD /= config.num_codes**0.5
        self.register_buffer("state", F.pad(codewords_KVD, (0, 1), value=1.0))
        self.register_buffer("window", torch.zeros(len(self.layers), config.num_codes, dtype=torch.float64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Whatever happens to the module, as in `engine.bfloat16()`, the state only changes its device."""
        state = self.state
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.state = state.to(self.state.device)
        return self

    @property
    def codewords(self) -> Tensor:
        """Moving sum over moving count, (K, V, D)."""
        return self.state[..., :-1] / self.state[..., -1:]

    def forward(self, views: Views, whole: Shares) -> Outcome:
        """Cross-entropy between the heads at masked frames and the codes of the teacher's frames there."""
        del whole
        assert views.masked is not None
        assert views.targets is not None
        with torch.no_grad(), torch.autocast(views.targets.device.type, enabled=False):
            codes_KM = nearest_codes(views.targets, self.codewords)
            statistics = sums_and_counts(views.targets, codes_KM, self.config.num_codes)
        logits_KMV = self._logits(views)
        loss = codebook_loss(logits_KMV, codes_KM)
        right = (logits_KMV.argmax(2) == codes_KM).sum() / len(self.layers)
        return Outcome(loss, {"accuracy": right}, statistics)

    def _logits(self, views: Views) -> Tensor:
        assert views.masked is not None
        if self.config.reads == "own":
            states = [views.masked.states[layer][views.mask] for layer in self.layers]
            return torch.stack([head(frames) for head, frames in zip(self.heads, states, strict=True)])
        # One product for all heads: they read the same frames.
        weight_LD = torch.cat([head.get_parameter("weight") for head in self.heads])
        bias_L = torch.cat([head.get_parameter("bias") for head in self.heads])
        logits_ML = F.linear(views.masked.output[views.mask], weight_LD, bias_L)
        return logits_ML.view(len(logits_ML), len(self.layers), -1).transpose(0, 1)

    @torch.no_grad()
    def settle(self, statistics: Tensor, update: int) -> None:
        """Move the codes that the update's frames hit (pretraining.md §1.1), until the codebooks stand still."""
        if self.config.freeze_at is None or update <= self.config.freeze_at:
            self.state.copy_(moving_average(self.state, statistics.to(self.state.dtype), self.config.decay))
        super().settle(statistics[..., -1], update)

    def watch(self) -> dict[str, float]:
        """Over how many codes the targets are spread and how many were hit at all, mean over codebooks."""
        return {
            "perplexity": float(perplexity(self.window).mean()),
            "active_codes": float((self.window > 0).sum(1).double().mean()),
        }
