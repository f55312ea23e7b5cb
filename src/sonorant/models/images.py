"""The side of images: networks that make a vector of a picture, or of the regions that a detector found in it.

Shapes: I images, S pixels of a side, P patches, R regions, D width.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from sonorant.config import EncoderConfig, ImageConfig
from sonorant.data.frames import Ragged
from sonorant.models.huggingface import CONFIG, PREPROCESSOR, one_line, read_json, refuse_pickles
from sonorant.models.layers import Layer

Colours = tuple[float, ...]
HALF: Colours = (0.5, 0.5, 0.5)
"""What our own network takes from pixels in [0, 1], and divides by."""


def plain_layer(dim: int, num_heads: int, ffn_dim: int, pre_norm: bool, dropout: float = 0.0) -> Layer:
    """A transformer layer of that shape."""
    shape: dict[str, Any] = {"dim": dim, "num_heads": num_heads, "ffn_dim": ffn_dim, "pre_norm": pre_norm}
    return Layer(
        EncoderConfig(**shape, position_depth=1, position_groups=1, dropout=dropout, attention_dropout=dropout)
    )


def through(layers: nn.ModuleList, x_ITD: Tensor) -> Tensor:
    """Sequences of one length through transformer layers."""
    frames, x = Ragged((x_ITD.shape[1],) * len(x_ITD)), x_ITD.flatten(0, 1)
    for layer in layers:
        x, _ = layer(x, frames)
    return x.view_as(x_ITD)


class SmallViT(nn.Module):
    """A ViT for small pictures: patches, learned places, the mean of what becomes of them (Beyer et al. 2022).

    From scratch on a few thousand pairs a leading vector sees too little of the picture at first: both sides collapse.
    """

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.patch, self.dim = config.patch, config.dim
        self.entry = nn.Linear(3 * config.patch**2, config.dim)
        self.places = nn.Parameter(0.02 * torch.randn((config.side // config.patch) ** 2, config.dim))
        shape = (config.dim, config.num_heads, config.ffn_dim, True, config.dropout)
        self.layers = nn.ModuleList(plain_layer(*shape) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, pixels_I3SS: Tensor) -> Tensor:
        """Bytes (I, 3, S, S) to vectors (I, D)."""
        patches_IPX = F.unfold(normed(pixels_I3SS, HALF, HALF), self.patch, stride=self.patch).transpose(1, 2)
        x_IPD = through(self.layers, self.entry(patches_IPX) + self.places)
        vectors: Tensor = self.norm(x_IPD).mean(1)
        return vectors


class Regions(nn.Module):
    """What a detector found, and where: features and boxes, a leading vector, post-norm layers (grounding.md §1.1)."""

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.dim, self.dropout = config.dim, config.dropout
        self.features, self.boxes = nn.Linear(config.region_dim, config.dim), nn.Linear(4, config.dim)
        self.features_norm, self.boxes_norm = nn.LayerNorm(config.dim), nn.LayerNorm(config.dim)
        self.lead = nn.Parameter(0.02 * torch.randn(config.dim))
        shape = (config.dim, config.num_heads, config.ffn_dim, False, config.dropout)
        self.layers = nn.ModuleList(plain_layer(*shape) for _ in range(config.num_layers))

    def forward(self, features_IRX: Tensor, boxes_IR4: Tensor) -> Tensor:
        """Features (I, R, ·) and boxes (I, R, 4) in [0, 1] to vectors (I, D)."""
        x_IRD = (self.features_norm(self.features(features_IRX)) + self.boxes_norm(self.boxes(boxes_IR4))) / 2
        x_IRD = F.dropout(x_IRD, self.dropout, self.training)
        led = torch.cat([self.lead.expand(len(x_IRD), 1, -1), x_IRD], dim=1)
        return through(self.layers, led)[:, 0]


class Foreign(nn.Module):
    """A transformers vision model: what it pools, else its leading vector. It looks at squares of `side` pixels."""

    def __init__(self, model: nn.Module, side: int, mean: Colours, spread: Colours) -> None:
        super().__init__()
        self.model, self.side, self.mean, self.spread = model, side, mean, spread
        self.dim = int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]

    def forward(self, pixels_I3SS: Tensor) -> Tensor:
        """Bytes (I, 3, S, S) to vectors (I, D)."""
        out = self.model(pixel_values=normed(pixels_I3SS, self.mean, self.spread))
        pooled: Tensor | None = getattr(out, "pooler_output", None)
        vectors: Tensor = out.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)
        return vectors

    def save(self, folder: Path) -> None:
        """Write the model and what it takes of pixels, as `load_foreign` reads them."""
        self.model.save_pretrained(folder)  # type: ignore[operator]
        size = {"height": self.side, "width": self.side}
        seen = {"do_normalize": True, "image_mean": self.mean, "image_std": self.spread, "size": size}
        (folder / PREPROCESSOR).write_text(json.dumps(seen, indent=1, sort_keys=True) + "\n")


def normed(pixels_I3SS: Tensor, mean: Colours, spread: Colours) -> Tensor:
    """Bytes to [0, 1], less the mean, by the spread of each colour."""
    shift, scale = (torch.tensor(values, device=pixels_I3SS.device)[:, None, None] for values in (mean, spread))
    return (pixels_I3SS.float() / 255 - shift) / scale


def load_foreign(folder: Path) -> Foreign:
    """A transformers vision model, in evaluation mode.

    Raises ValueError where the folder holds none, or nothing but a pickle.
    """
    described = read_json(folder, CONFIG)
    if not any(folder.glob("*.safetensors")):
        refuse_pickles(folder)
    seen = read_json(folder, PREPROCESSOR) if (folder / PREPROCESSOR).exists() else {}
    size = seen.get("crop_size") if seen.get("do_center_crop") else seen.get("size")
    size = size.get("height", size.get("shortest_edge")) if isinstance(size, dict) else size
    from transformers import AutoModel

    try:
        model, found = AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        # What is not there is drawn at random: a classifier's folder has no pooler, whose vector then leads.
        if lost := sorted(name for name in found["missing_keys"] if not name.startswith("pooler.")):
            raise KeyError(f"no {lost[0]}")
        if found["missing_keys"]:
            model.pooler = None
        is_normed = seen.get("do_normalize", True)
        mean = tuple(map(float, seen.get("image_mean", HALF))) if is_normed else (0.0, 0.0, 0.0)
        spread = tuple(map(float, seen.get("image_std", HALF))) if is_normed else (1.0, 1.0, 1.0)
        return Foreign(model.eval(), int(size or described["image_size"]), mean, spread)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"model {folder}: found no vision model that transformers opens ({one_line(error)}), wanted a ViT or the "
            f"like whose {CONFIG} has an image_size: name another folder"
        ) from None
