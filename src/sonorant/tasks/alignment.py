"""An utterance and its perturbed copy say the same, frame by frame, along the best monotone path (LASER, SCORE).

Soft-DTW brings the two together (Blondel et al. 2021), contrastive inverse difference moments (Haresh et al. 2021, LAV)
keep an utterance's own frames apart: without them, or a partner that stands still, all frames become one (alignment.md
§2). LASER's own form of both grows with the length; the relative forms do not.

Shapes: F frames of utterances end to end, N frames of one utterance, B utterances, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sonorant.config import AlignmentConfig
from sonorant.soft_dtw import soft_dtw_divergence
from sonorant.tasks.task import Monitored, Outcome, Per, Shares, View, Views, precise


def repulsion(z_ND: Tensor, margin: float, window: int) -> Tensor:
    """I(Z) = 1/n² Σ_ij [y W̄ max(0, λ - ‖z_i - z_j‖) + (1 - y) ‖z_i - z_j‖ / W̄], y = |i - j| > σ, W̄ = (i - j)² + 1.

    LASER's temporal regulariser of one utterance (alignment.md §2.2): it grows with the square of the length. `margin`
    is λ, `window` σ, in frames.
    """
    return _contrast_in_time(z_ND, 1, margin, window) / len(z_ND) ** 2


def repulsion_relative(z_ND: Tensor, margin: float, window: int) -> Tensor:
    """The same with W̄ = ((i - j) / n)² + 1, so between 1 and 2, and a mean over the pairs i ≠ j: free of the length.

    Zero for a single frame.
    """
    num_frames = len(z_ND)
    return _contrast_in_time(z_ND, num_frames, margin, window) / max(num_frames * (num_frames - 1), 1)


def _contrast_in_time(z_ND: Tensor, unit: int, margin: float, window: int) -> Tensor:
    """Σ over i ≠ j of what `repulsion` sums, times in units of so many frames."""
    places_N = torch.arange(len(z_ND), device=z_ND.device)
    lag_NN = (places_N[:, None] - places_N).abs()
    distances_NN = distances(precise(z_ND))
    weights_NN = (lag_NN / unit).to(distances_NN.dtype).square() + 1
    apart_NN = weights_NN * (margin - distances_NN).clamp(min=0)
    if not window:
        return apart_NN.masked_fill(lag_NN == 0, 0).sum()
    terms_NN = torch.where(lag_NN > window, apart_NN, distances_NN / weights_NN)
    return terms_NN.masked_fill(lag_NN == 0, 0).sum()


def distances(z_ND: Tensor) -> Tensor:
    """‖z_i - z_j‖ of all with all (N, N), without an (N, N, D) tensor.

    Where two are nearer than rounding can tell, the distance and its gradient are zero: that of a root has no bound.
    """
    squares_N = z_ND.square().sum(1)
    sums_NN = squares_N[:, None] + squares_N
    squares_NN = sums_NN - 2 * z_ND @ z_ND.T
    # A difference of sums of squares is off by a few times their last digit.
    is_apart_NN = squares_NN > 8 * torch.finfo(z_ND.dtype).eps * sums_NN.detach()
    distances_NN: Tensor = torch.where(is_apart_NN, squares_NN, 1).sqrt() * is_apart_NN
    return distances_NN


def second_moments(z_FD: Tensor) -> Tensor:
    """Σ (1, z)(1, z)ᵀ, (D + 1, D + 1) float64: count, sum and sum of products of frames, which add up over parts."""
    z_FD = F.pad(z_FD.detach().double(), (1, 0), value=1.0)
    return z_FD.T @ z_FD


def mean_cosine(moments: Tensor) -> Tensor:
    """Of all pairs of different frames of length one, from `second_moments`: near 1 when all agree."""
    count, total_D, products_DD = moments[0, 0], moments[0, 1:], moments[1:, 1:]
    return (total_D.square().sum() - products_DD.trace()) / (count * (count - 1)).clamp(min=1)


def effective_rank(moments: Tensor) -> Tensor:
    """exp(entropy of the covariance's eigenvalues as shares of their sum), from `second_moments`: 1 to D."""
    mean_D = moments[0, 1:] / moments[0, 0]
    covariance_DD = moments[1:, 1:] / moments[0, 0] - mean_D[:, None] * mean_D
    values_D: Tensor = torch.linalg.eigvalsh(covariance_DD).clamp(min=0)
    entropy: Tensor = torch.special.entr(values_D / values_D.sum().clamp(min=1e-12)).sum()
    return entropy.exp()


class Alignment(Monitored):
    """One linear map of every frame, at length one; dropped when training is done.

    The partner of an utterance is its copy, both trained (LASER), or its copy as the frozen encoder hears it (SCORE):
    the same map for both. Either way which of the two is the utterance as it was recorded is drawn.
    """

    per: ClassVar[Per] = "utterance"
    views: Mapping[View, int | None] = {"twins": None}

    def __init__(self, dim: int, config: AlignmentConfig) -> None:
        super().__init__()
        self.config = config
        self.head = nn.Linear(dim, config.dim)
        self.register_buffer("window", torch.zeros(config.dim + 1, config.dim + 1, dtype=torch.float64))

    def embed(self, states_FD: Tensor) -> Tensor:
        """What is compared: frames of length one, (F, D)."""
        return F.normalize(precise(self.head(states_FD)), dim=1, eps=1e-8)

    def forward(self, views: Views, whole: Shares) -> Outcome:
        """The four terms, each with its weight, summed over utterances."""
        del whole
        config, both, frames = self.config, views.twins, views.twin_frames
        assert both is not None
        assert frames is not None
        lengths = list(frames.lengths)
        parts = torch.split(self.embed(both.output), lengths)
        firsts, seconds, trained = parts[0::2], parts[1::2], parts
        if config.partner == "frozen":
            assert views.anchors is not None
            seconds, trained = torch.split(self.embed(views.anchors.output), lengths)[1::2], firsts
        with torch.autocast(both.output.device.type, enabled=False):
            divergence_B = soft_dtw_divergence(firsts, seconds, config.gamma, radius=config.radius)
            sizes_B = divergence_B.new_tensor([n + m for n, m in zip(lengths[0::2], lengths[1::2], strict=True)])
            terms = {"divergence": divergence_B.sum(), "divergence_per_frame": (divergence_B / sizes_B).sum()}
            for name, function in (("repulsion", repulsion), ("repulsion_relative", repulsion_relative)):
                if getattr(config, name):
                    rows = [function(z_ND, config.margin, config.window) for z_ND in trained]
                    terms[name] = torch.stack(rows).sum()
        loss = torch.stack([getattr(config, name) * term for name, term in terms.items()]).sum()
        return Outcome(loss, terms, second_moments(torch.cat(trained)))

    def watch(self) -> dict[str, float]:
        """How alike frames are on average, and over how many directions they are spread."""
        return {
            "mean_cosine": float(mean_cosine(self.window)),
            "effective_rank": float(effective_rank(self.window)),
        }
