"""DinoSR's whole loss and its codebooks once more, from pretraining.md §1.1 alone, on the plain network of §0.

float64, one utterance, one frame, one codeword at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.references.network import Parameters, Shape, linear, project, student, teacher


@dataclass
class Codebook:
    """S and N of one target layer: V sums of D numbers, V counts."""

    sums: list[list[float]]
    counts: list[float]

    def nearest(self, frame: Sequence[float]) -> int:
        """argmin over v of ‖t − S_v / N_v‖²."""
        best, least = -1, float("inf")
        for v, (total, count) in enumerate(zip(self.sums, self.counts, strict=True)):
            distance = sum((t - s / count) ** 2 for t, s in zip(frame, total, strict=True))
            if distance < least:
                best, least = v, distance
        return best

    def update(self, frames: Sequence[Sequence[float]], decay: float) -> None:
        """S ← a S + (1 − a) s, N ← a N + (1 − a) c: a is τ where a frame came to the code, else 1."""
        codes = [self.nearest(frame) for frame in frames]
        for v in range(len(self.sums)):
            hits = [frame for frame, code in zip(frames, codes, strict=True) if code == v]
            if not hits:
                continue
            self.sums[v] = [
                decay * old + (1 - decay) * sum(column)
                for old, column in zip(self.sums[v], zip(*hits, strict=True), strict=True)
            ]
            self.counts[v] = decay * self.counts[v] + (1 - decay) * len(hits)


def dinosr_update(
    parameters: Parameters,
    codebooks: Sequence[Codebook],
    waves: Sequence[Tensor],
    masks: Sequence[Tensor],
    shape: Shape,
    decay: float,
) -> Tensor:
    """(1 / M) Σ_t Σ_k CE_tk / K with the codebooks as they are; then they take in the update's masked frames.

    Codebook k reads the k-th of the last K layers.
    """
    total, masked_frames = torch.zeros((), dtype=torch.float64), 0
    targets: list[list[list[float]]] = [[] for _ in codebooks]
    for wave, mask in zip(waves, masks, strict=True):
        z = project(wave, parameters)
        heard = student(z, mask, parameters, shape)
        layers = teacher(z, parameters, shape)[-len(codebooks) :]
        for t in mask.nonzero()[:, 0].tolist():
            for k, (codebook, layer) in enumerate(zip(codebooks, layers, strict=True)):
                frame = layer[t].tolist()
                logits = linear(heard[t], parameters, f"tasks.codebooks.heads.{k}")
                loss = torch.log(torch.exp(logits).sum()) - logits[codebook.nearest(frame)]
                total = total + loss / len(codebooks)
                targets[k].append(frame)
            masked_frames += 1
    for codebook, frames in zip(codebooks, targets, strict=True):
        codebook.update(frames, decay)
    return total / masked_frames
