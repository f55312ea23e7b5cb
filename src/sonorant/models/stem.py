"""The stem: seven unpadded convolutions from samples to frames, on packed batches without padding.

A convolution with stride S and at most 2S taps is two matrix products on views of one channels-last buffer: the first
S taps of all windows lie end to end, and so do the others, one window later. A few dozen frames at a time go through
all seven, so that what passes between them stays in the cache. Training keeps what comes before the non-linearities
from the second convolution on (with `checkpointing` nothing) and goes back the same way, chunk by chunk.

Shapes: N samples, F frames, R rows of a buffer, C channels in, O channels out, K kernel taps, U utterances.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sonorant.data.frames import HOP_SAMPLES, STEM_KERNELS, STEM_STRIDES, WINDOW_SAMPLES, Ragged

LEVELS = len(STEM_KERNELS)
NORM_EPS = 1e-5
CPU_CHUNK_FRAMES = 64
"""Frames that go through all convolutions at once: measured (LOG.md)."""
CPU_HALF_CHUNK_FRAMES = 128
"""The same in bfloat16, which takes half the room and half the time: likewise."""
CHUNK_FRAMES = 4_096
"""The same elsewhere, where only memory counts."""


class Stem(nn.Module):
    """Seven unpadded convolutions from samples to frames, as matrix products on channels-last buffers.

    One pass over the packed buffer serves all utterances: a frame that would straddle two of them is computed
    and dropped, and no statistic mixes them.
    """

    def __init__(self, widths: Sequence[int], norm: str, bias: bool = False) -> None:
        super().__init__()
        shapes = zip(widths, (1, *widths), STEM_KERNELS, strict=False)
        self.weights = nn.ParameterList(nn.init.kaiming_normal_(torch.empty(shape)) for shape in shapes)
        self.biases = nn.ParameterList(torch.zeros(width) for width in widths if bias)
        self.per_utterance = norm == "group"
        normed = widths[:1] if self.per_utterance else widths
        self.norms = nn.ModuleList(nn.LayerNorm(width, NORM_EPS) for width in normed)
        self.checkpointing = False
        """Whether training computes everything twice rather than keep it."""

    def arrange(self) -> None:
        """Lay the weights in memory so that the taps taken of them are views: for inference; their values stay."""
        for weight in self.weights:
            weight.data = weight.data.permute(2, 1, 0).contiguous().permute(2, 1, 0)

    def forward(
        self, waves_N: Tensor, num_samples: Sequence[int], moments: Sequence[FirstMoments | None] | None = None
    ) -> Tensor:
        """Packed waves (N,) of utterances with so many samples each, to (F, C).

        A norm over time goes by an utterance's own moments, or by those given for it.
        """
        device = waves_N.device.type
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        starts = np.cumsum([0, *(-(-n // HOP_SAMPLES) for n in num_samples)])[:-1].tolist()
        with torch.autocast(device, enabled=False):
            taps = [weight.permute(2, 1, 0).flatten(0, 1) for weight in self.weights]
            if self.per_utterance:
                places = [(start * HOP_SAMPLES, count) for start, count in zip(starts, num_samples, strict=True)]
                first_UKO = self._normalised_taps(
                    [
                        FirstMoments.of(waves_N[start : start + count]) if given is None else given
                        for (start, count), given in zip(places, moments or [None] * len(places), strict=True)
                    ]
                )
                norms: list[Tensor] = []
            else:
                bias = self.biases[0] if len(self.biases) else torch.zeros_like(taps[0][0])
                first_UKO = torch.cat([taps[0], bias[None]])[None]
                places = [(0, len(waves_N))]
                norms = [part for norm in self.norms for part in norm.parameters()]
            halved = (cast or self.weights[-1].dtype) == torch.bfloat16
            chunk_frames = CPU_HALF_CHUNK_FRAMES if halved else CPU_CHUNK_FRAMES
            plan = Plan(
                [slice(start // STEM_STRIDES[0], first_rows(start + count)) for start, count in places],
                max(0, (len(waves_N) - WINDOW_SAMPLES) // HOP_SAMPLES + 1),
                chunk_frames if device == "cpu" else CHUNK_FRAMES,
                bool(len(self.biases)),
                self.checkpointing,
            )
            waves_N = waves_N.to(cast or self.weights[0].dtype)
            others: list[Tensor] = [*taps[1:], *[*self.biases][1:], *norms]
            tensors = [first_UKO.to(waves_N.dtype), *(t if cast is None else t.to(cast) for t in others)]
            if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (waves_N, *tensors)):
                slots_FC: Tensor = Convolutions.apply(plan, waves_N, *tensors)  # type: ignore[no-untyped-call]
            else:
                # In training the same bits are made with a gradient and without.
                by_pairs = not self.training and torch.is_inference_mode_enabled()
                by_pairs = by_pairs and device == "cpu" and tensors[1].dtype == waves_N.dtype
                slots_FC = Pass(plan, waves_N, tensors, by_pairs).forward()
        lengths = Ragged.of_samples(num_samples).lengths
        kept = np.concatenate([start + np.arange(n) for start, n in zip(starts, lengths, strict=True)])
        return slots_FC[torch.from_numpy(kept).to(slots_FC.device)]

    def _normalised_taps(self, moments: Sequence[FirstMoments]) -> Tensor:
        """The first convolution with the norm over each utterance's time folded in: (U, K + 1, O), last the bias.

        A channel's mean and variance over time follow from those of the windows, which are ten numbers each.
        """
        norm = self.norms[0]
        assert isinstance(norm, nn.LayerNorm)
        taps_KO = self.weights[0][:, 0].T.double()
        bias_O = self.biases[0] if len(self.biases) else torch.zeros_like(norm.bias)
        folded = []
        for mean_K, covariance_KK in moments:
            scale_O = norm.weight * torch.rsqrt(((covariance_KK @ taps_KO) * taps_KO).sum(0) + norm.eps)
            shift_O = norm.bias + (bias_O - (mean_K @ taps_KO + bias_O)) * scale_O
            folded.append(torch.cat([taps_KO * scale_O, shift_O[None]]))
        return torch.stack(folded)


class FirstMoments(NamedTuple):
    """Mean (K,) and covariance (K, K) over an utterance's time of what the first convolution sees, in float64."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, wave_N: Tensor) -> FirstMoments:
        """Of one utterance, measured."""
        windows_RK = wave_N.double().unfold(0, STEM_KERNELS[0], STEM_STRIDES[0])
        mean_K = windows_RK.mean(0)
        centred_RK = windows_RK - mean_K
        return cls(mean_K, centred_RK.T @ centred_RK / len(windows_RK))


def first_rows(num_samples: int) -> int:
    """Rows that so many samples leave after the first convolution."""
    return (num_samples - STEM_KERNELS[0]) // STEM_STRIDES[0] + 1


@dataclass(frozen=True)
class Plan:
    """How one pass is cut up.

    places: the first convolution's rows that each set of its taps serves; num_frames: in all, with those to be
    dropped; chunk_frames: so many of them at once; biased: whether the other convolutions have biases; recompute:
    whether nothing is kept for the way back.
    """

    places: Sequence[slice]
    num_frames: int
    chunk_frames: int
    biased: bool
    recompute: bool

    def chunks(self) -> Iterator[tuple[slice, list[int]]]:
        """Of each chunk: its frames, and how many rows each convolution makes of it."""
        count = -(-self.num_frames // self.chunk_frames)
        edges = [index * self.num_frames // count for index in range(count + 1)] if count else []
        for start, stop in pairwise(edges):
            rows = [stop - start]
            for kernel, stride in zip(STEM_KERNELS[:0:-1], STEM_STRIDES[:0:-1], strict=True):
                rows.insert(0, (rows[0] - 1) * stride + kernel)
            yield slice(start, stop), rows


class Parts(NamedTuple):
    """The tensors of a pass, or sums as large as they are.

    taps: (U, K + 1, O) of the first convolution, last its bias, then (K · C, O) of the others; biases: none or those
    of the others; norms: none, or scale and shift of all.
    """

    taps: Sequence[Tensor]
    biases: Sequence[Tensor]
    norms: Sequence[Tensor]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], biased: bool) -> Parts:
        """Sorted out."""
        end = 2 * LEVELS - 1 if biased else LEVELS
        return cls(tensors[:LEVELS], tensors[LEVELS:end], tensors[end:])


class Pass:
    """One pass over a packed buffer, forth or back; its buffers serve one chunk after the other.

    Forth, taps may have fewer digits than waves and result: what lies between two convolutions has those of the second.
    """

    def __init__(self, plan: Plan, waves_N: Tensor, tensors: Sequence[Tensor], by_pairs: bool = False) -> None:
        self.plan, self.waves_N, self.parts = plan, waves_N, Parts.of(tensors, plan.biased)
        self.buffers: dict[tuple[str, int], Tensor] = {}
        self.by_pairs = by_pairs
        """Whether convolutions are made by pairs of results: fewer products, but rounded otherwise than in training."""

    def forward(self, kept: list[Tensor] | None = None) -> Tensor:
        """All convolutions: (F, O). `kept` takes what comes before the non-linearities but the first."""
        found_FO = self.waves_N.new_empty(self.plan.num_frames, self.parts.taps[-1].shape[-1])
        for frames, rows in self.plan.chunks():
            x_RC = None
            for level in range(LEVELS):
                last = level == LEVELS - 1
                after = found_FO[frames] if last else self._buffer("after", level, rows)
                # Without a norm or a way back the non-linearity needs no second buffer.
                here = kept is None and not self.parts.norms and after.dtype == self.parts.taps[level].dtype
                before = after[: rows[level]] if here else self._before(level, rows, kept)
                self._convolve(level, x_RC, frames, before)
                self._activate(level, before, after[: rows[level]])
                x_RC = after
        return found_FO

    def backward(self, gradient_FO: Tensor, kept: Sequence[Tensor], sums: Parts, waves_sum_N: Tensor | None) -> None:
        """Every gradient, added to `sums` and `waves_sum_N`, from that of the result and what `forward` kept."""
        for index, (frames, rows) in enumerate(self.plan.chunks()):
            befores = [self._before(0, rows, None)]
            if not self.plan.recompute:
                befores += kept[index * (LEVELS - 1) : (index + 1) * (LEVELS - 1)]
            x_RC = None
            for level in range(LEVELS):
                if level == len(befores):
                    befores.append(self._before(level, rows, None))
                if level == 0 or self.plan.recompute:
                    self._convolve(level, x_RC, frames, befores[level])
                if level < LEVELS - 1:
                    x_RC = self._buffer("after", level, rows)
                    self._activate(level, befores[level], x_RC[: rows[level]])
            change_RO = gradient_FO[frames]
            for level in reversed(range(LEVELS)):
                change_RO = self._undo_activation(level, change_RO, befores[level], sums)
                if level:
                    change_RO = self._undo_convolution(level, change_RO, rows, sums)
                else:
                    self._undo_first(change_RO, frames, sums, waves_sum_N)

    def _buffer(self, name: str, level: int, rows: Sequence[int]) -> Tensor:
        """A level's rows, with room for a window more of the next level than it has: see `split_windows`."""
        room = (rows[level + 1] + 1) * STEM_STRIDES[level + 1] if level < LEVELS - 1 else rows[level]
        width = self.parts.taps[level].shape[-1]
        found = self.buffers.get((name, level))
        if found is None or len(found) < room:
            reader = level if name == "before" else level + 1
            found = self.buffers[name, level] = self.parts.taps[reader].new_empty(room, width)
        return found[:room]

    def _before(self, level: int, rows: Sequence[int], kept: list[Tensor] | None) -> Tensor:
        """Where a level's convolution is to be written."""
        if kept is None or level == 0:
            return self._buffer("before", level, rows)[: rows[level]]
        kept.append(self.parts.taps[level].new_empty(rows[level], self.parts.taps[level].shape[-1]))
        return kept[-1]

    def _convolve(self, level: int, x_RC: Tensor | None, frames: slice, out_RO: Tensor) -> None:
        taps = self.parts.taps[level]
        if x_RC is None:
            windows_RK = self._first_windows(frames, len(out_RO))
            if len(self.plan.places) > 1:
                # What lies in no utterance is dropped in the end, but must be a number until then.
                out_RO.zero_()
            for index, part in self._first_parts(frames, len(out_RO)):
                torch.mm(windows_RK[part], taps[index], out=out_RO[part])
            return
        if self.by_pairs and STEM_KERNELS[level] == 3:
            self._convolve_pairs(level, x_RC, out_RO)
            return
        head, rest = split_windows(x_RC, len(out_RO), STEM_KERNELS[level], STEM_STRIDES[level])
        split = head.shape[1]
        if self.plan.biased:
            torch.addmm(self.parts.biases[level - 1], head, taps[:split], out=out_RO)
        else:
            torch.mm(head, taps[:split], out=out_RO)
        if rest.shape[1]:
            out_RO.addmm_(rest, taps[split:])

    def _convolve_pairs(self, level: int, x_RC: Tensor, out_RO: Tensor) -> None:
        """Three taps in steps of two, five products for two results instead of six (Winograd 1980).

        Of the even rows E two results need E₀a + E₁c and E₁a + E₂c, which are (E₀ - E₁)a and (E₂ - E₁)c, each with
        E₁(a + c) added to it.
        """
        count, channels = out_RO.shape[0], x_RC.shape[1]
        first_CO, middle_CO, last_CO = self.parts.taps[level].view(3, channels, -1)
        rows = x_RC[: 2 * (count + 1)].view(count + 1, 2, channels)
        even_RC, odd_RC = rows[:, 0], rows[:count, 1]
        if self.plan.biased:
            torch.addmm(self.parts.biases[level - 1], odd_RC, middle_CO, out=out_RO)
        else:
            torch.mm(odd_RC, middle_CO, out=out_RO)
        pairs = count // 2
        even_0, even_1, even_2 = (even_RC[start : start + 2 * pairs - 1 : 2] for start in range(3))
        out_P2O = out_RO[: 2 * pairs].view(pairs, 2, -1)
        out_P2O += torch.mm(even_1, first_CO + last_CO)[:, None]
        out_P2O[:, 0].addmm_(even_0 - even_1, first_CO)
        out_P2O[:, 1].addmm_(even_2 - even_1, last_CO)
        if count % 2:
            out_RO[-1:].addmm_(even_RC[-2:-1], first_CO).addmm_(even_RC[-1:], last_CO)

    def _activate(self, level: int, before_RO: Tensor, out_RO: Tensor) -> None:
        if self.parts.norms:
            scale, shift = self.parts.norms[2 * level : 2 * level + 2]
            before_RO = torch.layer_norm(before_RO, scale.shape, scale, shift, NORM_EPS)
        if before_RO.dtype == out_RO.dtype:
            torch.ops.aten.gelu.out(before_RO, out=out_RO)
        else:
            out_RO.copy_(torch.ops.aten.gelu.out(before_RO, out=before_RO))

    def _undo_activation(self, level: int, change_RO: Tensor, before_RO: Tensor, sums: Parts) -> Tensor:
        changed: Tensor
        if not self.parts.norms:
            changed = torch.ops.aten.gelu_backward(change_RO, before_RO)
            return changed
        scale, shift = self.parts.norms[2 * level : 2 * level + 2]
        normed_RO, *moments = torch.native_layer_norm(before_RO, scale.shape, scale, shift, NORM_EPS)
        changed = torch.ops.aten.gelu_backward(change_RO, normed_RO)
        changed, *of_norm = torch.ops.aten.native_layer_norm_backward(
            changed, before_RO, scale.shape, *moments, scale, shift, [True, True, True]
        )
        for total, part in zip(sums.norms[2 * level : 2 * level + 2], of_norm, strict=True):
            total += part
        return changed

    def _undo_convolution(self, level: int, change_RO: Tensor, rows: Sequence[int], sums: Parts) -> Tensor:
        """From the gradient of a level's convolution to that of its input, whose rows `forward` left behind."""
        taps, total = self.parts.taps[level], sums.taps[level]
        kernel, stride, count = STEM_KERNELS[level], STEM_STRIDES[level], rows[level]
        if self.plan.biased:
            sums.biases[level - 1].add_(change_RO.sum(0))
        gradient_RC = self._buffer("gradient", level - 1, rows)
        gradient_RC[count * stride :].zero_()
        head, rest = split_windows(self._buffer("after", level - 1, rows), count, kernel, stride)
        head_gradient, rest_gradient = split_windows(gradient_RC, count, kernel, stride)
        split = head.shape[1]
        add_product(total[:split], head.T, change_RO)
        torch.mm(change_RO, taps[:split].T, out=head_gradient)
        if rest.shape[1]:
            add_product(total[split:], rest.T, change_RO)
            rest_gradient.addmm_(change_RO, taps[split:].T)
        return gradient_RC[: rows[level - 1]]

    def _undo_first(self, change_RO: Tensor, frames: slice, sums: Parts, waves_sum_N: Tensor | None) -> None:
        windows_RK = self._first_windows(frames, len(change_RO))
        stride, taps_UKO = STEM_STRIDES[0], self.parts.taps[0]
        for index, part in self._first_parts(frames, len(change_RO)):
            add_product(sums.taps[0][index], windows_RK[part].T, change_RO[part])
            if waves_sum_N is not None:
                count = part.stop - part.start
                gradient_RK = change_RO[part] @ taps_UKO[index, :-1].T
                start = frames.start * HOP_SAMPLES + part.start * stride
                # Every sample lies in two windows: they overlap by half.
                waves_sum_N[start : start + count * stride].view(count, stride).add_(gradient_RK[:, :stride])
                start += stride
                waves_sum_N[start : start + count * stride].view(count, stride).add_(gradient_RK[:, stride:])

    def _first_windows(self, frames: slice, count: int) -> Tensor:
        """The windows of the first convolution, and a one for its bias: (R, K + 1)."""
        kernel, stride = STEM_KERNELS[0], STEM_STRIDES[0]
        start = frames.start * HOP_SAMPLES
        windows_RK = self.waves_N.new_ones(count, kernel + 1)
        windows_RK[:, :kernel] = self.waves_N[start : start + (count - 1) * stride + kernel].unfold(0, kernel, stride)
        return windows_RK

    def _first_parts(self, frames: slice, count: int) -> Iterator[tuple[int, slice]]:
        """Which of the first convolution's taps serve which of a chunk's rows."""
        first = frames.start * HOP_SAMPLES // STEM_STRIDES[0]
        for index, place in enumerate(self.plan.places):
            part = slice(max(0, place.start - first), min(count, place.stop - first))
            if part.start < part.stop:
                yield index, part


def split_windows(x_RC: Tensor, count: int, kernel: int, stride: int) -> tuple[Tensor, Tensor]:
    """Views of the first `stride` taps of each window and of the others: (count, S · C) and (count, (K - S) · C).

    The buffer has (count + 1) · stride rows; those behind the last window may hold anything.
    """
    width = x_RC.shape[1]
    head = x_RC[: count * stride].view(count, stride * width)
    rest = x_RC[stride : (count + 1) * stride].view(count, stride * width)
    return head, rest[:, : (kernel - stride) * width]


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where the total may have more digits."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


class Convolutions(torch.autograd.Function):
    """A pass with a gradient."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, waves_N: Tensor, *tensors: Tensor) -> Tensor:
        """(N,) to (F, O)."""
        kept: list[Tensor] = []
        found_FO = Pass(plan, waves_N, tensors).forward(None if plan.recompute else kept)
        ctx.plan, ctx.num_tensors = plan, len(tensors)
        ctx.save_for_backward(waves_N, *tensors, *kept)
        return found_FO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Of the waves, where asked for, and of all tensors."""
        waves_N, *saved = ctx.saved_tensors
        tensors, kept = saved[: ctx.num_tensors], saved[ctx.num_tensors :]

        def zeros(tensor: Tensor) -> Tensor:
            # Sums over chunks keep at least float32's digits.
            return torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))

        sums = [zeros(tensor) for tensor in tensors]
        waves_sum_N = zeros(waves_N) if ctx.needs_input_grad[1] else None
        Pass(ctx.plan, waves_N, tensors).backward(
            gradients[0].contiguous(), kept, Parts.of(sums, ctx.plan.biased), waves_sum_N
        )
        waves_gradient_N = None if waves_sum_N is None else waves_sum_N.to(waves_N.dtype)
        return None, waves_gradient_N, *(total.to(tensor.dtype) for total, tensor in zip(sums, tensors, strict=True))
