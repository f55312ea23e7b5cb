"""Ranks: one process a GPU (or a CPU share) under torchrun; alone, everything here does nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from sonorant.config import TrainConfig
from sonorant.training.engine import Engine

SILENCE = timedelta(seconds=45)
"""How long a rank may keep the others waiting in the middle of an update before it counts as lost."""
PATIENCE = timedelta(minutes=30)
"""The same where one rank alone has work to do: reading the corpus, writing a checkpoint."""


@dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many, on which device."""

    rank: int
    count: int
    device: torch.device
    patient: dist.ProcessGroup | None = None
    """All ranks, where one may take its time."""

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
        """Until every rank is here, however long it takes."""
        if self.count > 1:
            dist.barrier(self.patient)


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The process group that torchrun's environment describes, for as long as the context lasts.

    Raises ValueError, from one rank alone, where another is lost: it has died, or been silent for too long.
    """
    count, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        sum_in_order()
    if count == 1:
        yield Ranks(0, 1, device)
        return
    store, rank, _ = next(rendezvous("env://", timeout=PATIENCE))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=SILENCE)
    ranks = Ranks(rank, count, device, dist.new_group(backend="gloo", timeout=PATIENCE))
    try:
        yield ranks
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        # torchrun is about to end everyone: first say why.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # Whoever notices first speaks; the store outlives the ranks, for torchrun itself keeps it.
        if store.add("lost", 1) > 1:
            raise SystemExit(1) from None
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"ranks: found one of {count} lost ({reason}…), wanted all: run the same command again, on as many ranks "
            "as there are; it goes on from the last checkpoint"
        ) from None
    else:
        dist.destroy_process_group()


def sum_in_order() -> None:
    """Have a GPU make the same bits each time: whatever sums does so in one order, no kernel is chosen by its speed.

    Torch refuses what it cannot do so. Before the first matrix product, for cuBLAS reads its room then.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether a rank could not be reached, told by what gloo, NCCL and the store say."""
    said = str(error).lower()
    words = ("connection closed", "connection reset", "connection refused", "broken pipe", "timed out", "timeout")
    return isinstance(error, dist.DistError) or ("gloo" in said and any(word in said for word in words))


def spread_over_ranks(engine: Engine, ranks: Ranks, config: TrainConfig) -> nn.Module:
    """The engine as one over all ranks, everything on it equal to the first rank's from the start."""
    if ranks.count == 1:
        return engine
    # Whoever read the corpus first waits here, not in a collective that takes silence for a loss.
    ranks.wait()
    for tensor in engine.state_dict().values():
        dist.broadcast(tensor, 0)
    if config.sharding == "none":
        # Buffers are the tasks' own: they change by what all ranks have summed, never by what one rank saw.
        is_idle = has_idle_parameters(config, engine.encoder.config.layer_drop)
        return DistributedDataParallel(engine, find_unused_parameters=is_idle, broadcast_buffers=False)
    if engine.teacher is not None:
        # Sharding writes into buffers that inference mode would have claimed for itself.
        engine.teacher.without_gradient = torch.no_grad
    mesh = init_device_mesh(ranks.device.type, (ranks.count,))
    contexts = [engine.encoder.context, *([engine.teacher.context] if engine.teacher is not None else [])]
    for layer in (layer for context in contexts for layer in context.layers):
        fully_shard(layer, mesh=mesh)
    fully_shard(engine, mesh=mesh)
    register_fsdp_forward_method(engine, "shares")
    return engine


def has_idle_parameters(config: TrainConfig, layer_drop: float) -> bool:
    """Whether some update may leave a parameter without gradient.

    A dropped layer, a frozen stem, a task at zero, an output that no task reads, codewords that none chooses between.
    """
    (first, *others), tasks = config.phases, config.tasks
    is_constant = not others and all(isinstance(weight, float | int) for weight in first.weights.values())
    readers = {"units", "teacher", "contrast", *(["codebooks"] if config.codebooks.reads == "last" else [])}
    has_idle_codes = "diversity" in tasks and "contrast" not in tasks
    changes = layer_drop or config.stem.freeze == "freeze" or not is_constant
    # A part of an update may have no image.
    return bool(changes or not tasks & readers or has_idle_codes or "grounding" in tasks)


def gather_parameters(engine: nn.Module) -> None:
    """Make every rank hold all parameters again, which sharding has divided."""
    for module in engine.modules():
        if isinstance(module, FSDPModule):
            module.unshard()


@contextmanager
def without_exchange(model: nn.Module) -> Iterator[None]:
    """Backward passes in here add up gradients on this rank alone."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)
    else:
        yield


def gradient_norm(model: nn.Module) -> float:
    """Of all gradients together, over all shards."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return float(whole(norm))


def whole(tensor: Tensor) -> Tensor:
    """A tensor, brought together from all ranks where it was divided among them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def divided_like(tensor: Tensor, example: Tensor) -> Tensor:
    """A whole tensor, divided among the ranks as the example is."""
    if isinstance(example, DTensor):
        return distribute_tensor(tensor.to(example.device), example.device_mesh, example.placements)
    return tensor
