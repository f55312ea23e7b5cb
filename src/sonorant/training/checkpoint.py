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


def save_checkpoint(
    run: Path,
    update: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    about: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write checkpoint-<update>, unless it is there, and remove all but the newest `keep`."""
    final = run / f"checkpoint-{update:08d}"
    if final.exists():
        return final
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": value for name, value in state.items()}
    staged = run / f".{final.name}.partial"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    save_file(
        {name: value.detach().contiguous().cpu() for name, value in tensors.items()},
        staged / "state.safetensors",
    )
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
    model.load_state_dict(
        {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")}
    )
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            _, index, key = name.split("/")
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    about: dict[str, Any] = json.loads((path / "about.json").read_text())
    return about
