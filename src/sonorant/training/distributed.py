"""Ranks: one process a GPU (or a CPU share) under torchrun; alone, everything here does nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many, on which device."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes what all share."""
        return self.rank == 0

    def total(self, values: list[float]) -> list[float]:
        """Sums over ranks."""
        if self.count == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        totals: list[float] = tensor.tolist()
        return totals

    def sum(self, tensor: Tensor) -> Tensor:
        """A tensor's sum over ranks; the tensor itself is used up."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, shares: Mapping[str, tuple[Tensor, ...]]) -> dict[str, list[tuple[Tensor, ...]]]:
        """Every rank's tensors by name, in order of ranks, without gradient; first dimensions may differ."""
        gathered: dict[str, list[tuple[Tensor, ...]]] = {}
        for name, tensors in shares.items():
            columns = [self._gather(tensor.detach()) for tensor in tensors]
            gathered[name] = list(zip(*columns, strict=True))
        return gathered

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        if self.count == 1:
            return [tensor]
        lengths = torch.zeros(self.count, dtype=torch.int64, device=tensor.device)
        lengths[self.rank] = len(tensor)
        dist.all_reduce(lengths)
        longest = int(lengths.max())
        padded = tensor.new_zeros(longest, *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        received = [torch.empty_like(padded) for _ in range(self.count)]
        dist.all_gather(received, padded)
        return [part[:length] for part, length in zip(received, lengths.tolist(), strict=True)]

    def wait(self) -> None:
        """Until every rank is here."""
        if self.count > 1:
            dist.barrier()


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The process group that torchrun's environment describes, for as long as the context lasts."""
    count, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if count > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(int(os.environ.get("RANK", "0")), count, device)
    finally:
        if count > 1:
            dist.destroy_process_group()


def spread_over_ranks(engine: nn.Module, ranks: Ranks) -> nn.Module:
    """The engine as one over all ranks, everything on it equal to the first rank's from the start."""
    if ranks.count == 1:
        return engine
    for tensor in engine.state_dict().values():
        dist.broadcast(tensor, 0)
    # Buffers are the tasks' own: they change by what all ranks have summed, never by what one rank saw.
    return DistributedDataParallel(engine, find_unused_parameters=True, broadcast_buffers=False)


def without_exchange(model: nn.Module) -> AbstractContextManager[None]:
    """Backward passes in here add up gradients on this rank alone."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def gradient_norm(model: nn.Module) -> float:
    """Of all gradients together."""
    return float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
