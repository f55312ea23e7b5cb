"""Checkpoints: a folder each in the run directory, written whole or not at all, never pickled."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sonorant.training.distributed import divided_like, whole


def save_checkpoint(
    run: Path,
    update: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    about: Mapping[str, Any],
    keep: int,
    is_first: bool = True,
) -> Path:
    """Write checkpoint-<update>, unless it is there, and remove all but the newest `keep`.

    Called on all ranks: what is divided among them is brought together, and the first one writes.
    """
    final = run / f"checkpoint-{update:08d}"
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": value for name, value in state.items()}
    complete: dict[str, Tensor] = {}
    for name, value in tensors.items():
        together = whole(value.detach())
        if is_first:
            complete[name] = together.contiguous().cpu()
    if final.exists() or not is_first:
        return final
    staged = run / f".{final.name}.partial"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    save_file(complete, staged / "state.safetensors")
    (staged / "about.json").write_text(json.dumps({"update": update, **about}, indent=1) + "\n")
    for path in staged.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    staged.rename(final)
    for old in sorted(run.glob("checkpoint-*"))[:-keep]:
        shutil.rmtree(old)
    return final


def latest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run directory."""
    return max(run.glob("checkpoint-*"), default=None)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore model and optimizer in place and return what else was noted."""
    tensors = load_file(path / "state.safetensors")
    own = model.state_dict()
    stored = {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")}
    model.load_state_dict({name: divided_like(t, own[name]) if name in own else t for name, t in stored.items()})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            _, index, key = name.split("/")
            # A parameter's moments are divided as it is; its step count is a number of its own.
            tensor = divided_like(tensor, parameters[int(index)]) if tensor.ndim else tensor
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    about: dict[str, Any] = json.loads((path / "about.json").read_text())
    return about
