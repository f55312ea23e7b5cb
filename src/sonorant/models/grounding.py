"""Speech and images in one space (FaST-VGS's coarse path, Peng & Harwath 2022; grounding.md §1.1).

The speech side reads one layer of the shared encoder, whose input is led by a learned vector; the side of images is a
network of ours or a transformers vision model. What belongs together shall lie near each other.

Shapes: B utterances, F frames (the leading ones among them), T frames of the longest utterance, C channels, D the
encoder's width, E that of the common space, I images.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sonorant.config import GroundingConfig
from sonorant.data.frames import Ragged
from sonorant.models.huggingface import CONFIG, one_line, read_json
from sonorant.models.images import Foreign, Regions, SmallViT, load_foreign, plain_layer

ABOUT, WEIGHTS, IMAGE_ENCODER = "grounding.json", "grounding.safetensors", "image_encoder"
IMAGE_SIDE = "image_side."
FOREIGN = "image_side.eye.model."
"""How the parameters of the side of images begin, and those of a transformers model, which has files of its own."""
KERNEL = 9  # frames, of the branch's convolutions


def two_layers(before: int, after: int) -> nn.Sequential:
    """One hidden layer, twice as wide, with GELU."""
    return nn.Sequential(nn.Linear(before, 2 * before), nn.GELU(), nn.Linear(2 * before, after))


class Residual(nn.Module):
    """Two convolutions over time with a shortcut; a stride of 2 halves the length.

    The original normalises over the batch; here each frame is normalised over its channels, so that an utterance's
    vector depends on nothing else, and two ranks make what one does.
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.first = nn.Conv1d(before, after, KERNEL, stride, padding=KERNEL // 2)
        self.second = nn.Conv1d(after, after, KERNEL, padding=KERNEL // 2)
        self.shortcut = nn.Conv1d(before, after, 1, stride)
        self.first_norm, self.second_norm, self.shortcut_norm = (nn.LayerNorm(after) for _ in range(3))

    def forward(self, x_BCT: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Frames (B, C, T), zero beyond an utterance's end, and their numbers (B,) to the same of the next block."""
        after_B = (lengths_B + self.stride - 1) // self.stride
        hidden = within(F.relu(over_channels(self.first_norm, self.first(x_BCT))), after_B)
        sum_BCT = over_channels(self.second_norm, self.second(hidden))
        sum_BCT = sum_BCT + over_channels(self.shortcut_norm, self.shortcut(x_BCT))
        return within(F.relu(sum_BCT), after_B), after_B


def over_channels(norm: nn.Module, x_BCT: Tensor) -> Tensor:
    """A norm of the last dimension, on channels."""
    normed: Tensor = norm(x_BCT.transpose(1, 2)).transpose(1, 2)
    return normed


def within(x_BCT: Tensor, lengths_B: Tensor) -> Tensor:
    """Zero beyond each utterance's end."""
    places_T = torch.arange(x_BCT.shape[2], device=x_BCT.device)
    return x_BCT * (places_T < lengths_B[:, None])[:, None]


class SpeechSide(nn.Module):
    """From an utterance's states, the leading one first, to its vector: convolutions, then a layer that the leading
    state looks through, or the largest value of each channel over time."""

    def __init__(self, dim: int, config: GroundingConfig) -> None:
        super().__init__()
        widths = config.branch_widths or (dim,)
        self.entry, self.entry_norm = nn.Linear(dim, widths[0]), nn.LayerNorm(widths[0])
        stages = list(zip((widths[0], *widths), config.branch_widths, strict=False))
        self.blocks = nn.ModuleList(
            block for before, after in stages for block in (Residual(before, after, 2), Residual(after, after, 1))
        )
        self.exit = nn.Linear(widths[-1], dim)
        self.is_led = config.pooling == "lead"
        if self.is_led:
            self.lead = two_layers(dim, dim)
            self.layer = plain_layer(dim, config.branch_heads, 4 * dim, pre_norm=False)
        self.out = nn.Linear(dim, config.dim)

    def forward(self, states_FD: Tensor, frames: Ragged) -> Tensor:
        """States (F, D) to vectors (B, E)."""
        parts = self.shortened([states_FD[rows.start + 1 : rows.stop] for rows in frames.slices()])
        if not self.is_led:
            largest: Tensor = self.out(torch.stack([part.amax(0) for part in parts]))
            return largest
        leads_BD = self.lead(states_FD[list(frames.offsets)])
        led = Ragged(tuple(len(part) + 1 for part in parts))
        packed = torch.cat([row for lead, part in zip(leads_BD, parts, strict=True) for row in (lead[None], part)])
        mixed_FD, _ = self.layer(packed, led)
        vectors: Tensor = self.out(mixed_FD[list(led.offsets)])
        return vectors

    def shortened(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Each utterance's frames (T, D) after the convolutions, where there are any."""
        lengths = [len(part) for part in parts]
        entered_FC = F.relu(self.entry_norm(self.entry(torch.cat(list(parts)))))
        if not self.blocks:
            return list(torch.split(self.exit(entered_FC), lengths))
        entered = torch.split(entered_FC, lengths)
        x_BCT = nn.utils.rnn.pad_sequence(list(entered), batch_first=True).transpose(1, 2)
        counts_B = torch.tensor(lengths, device=x_BCT.device)
        for block in self.blocks:
            x_BCT, counts_B = block(x_BCT, counts_B)
        return [self.exit(row[:, :count].T) for row, count in zip(x_BCT, counts_B.tolist(), strict=True)]


class ImageSide(nn.Module):
    """From a picture to its vector."""

    def __init__(self, config: GroundingConfig) -> None:
        super().__init__()
        image = config.image
        # Where a network does not change, `Pictures` keeps what it has made of each image, not the network.
        self.eye: nn.Module = nn.Identity()
        if image.kind == "transformers":
            assert image.path is not None
            foreign = load_foreign(image.path)
            self.eye = foreign if image.trained else self.eye
        else:
            self.eye = SmallViT(image) if image.kind == "small" else Regions(image)
        self.out = two_layers(foreign.dim if image.kind == "transformers" else image.dim, config.dim)

    def forward(self, pictures: Sequence[Tensor]) -> Tensor:
        """What `Pictures` read, to vectors (I, E)."""
        vectors: Tensor = self.out(self.eye(*pictures))
        return vectors


class Grounder(nn.Module):
    """Both sides, and the vector that leads the encoder's input; the side of images is not needed to search."""

    def __init__(self, dim: int, num_layers: int, config: GroundingConfig, with_images: bool = True) -> None:
        """For an encoder of that width and depth.

        Raises ValueError where the width cannot be divided among the heads.
        """
        super().__init__()
        if config.pooling == "lead" and dim % config.branch_heads:
            raise ValueError(
                f"grounding.branch_heads: found {config.branch_heads}, wanted a divisor of the encoder's dim {dim}: "
                "change it"
            )
        self.config = config
        self.layer = config.layer or round(2 * num_layers / 3)
        self.cls = nn.Parameter(0.02 * torch.randn(dim))
        self.speech_side = SpeechSide(dim, config)
        self.image_side = ImageSide(config) if with_images else None

    def prepend(self, z_FD: Tensor, frames: Ragged) -> tuple[Tensor, Ragged]:
        """Projected frames (F, D) with the leading vector before each utterance's."""
        lead = self.cls[None].to(z_FD.dtype)
        led = torch.cat([part for rows in frames.slices() for part in (lead, z_FD[rows])])
        return led, Ragged(tuple(length + 1 for length in frames.lengths))

    def speech(self, states_FD: Tensor, frames: Ragged) -> Tensor:
        """States (F, D) of `layer`, led as by `prepend`, to vectors (B, E)."""
        return self.compared(self.speech_side(states_FD, frames))

    def image(self, pictures: Sequence[Tensor]) -> Tensor:
        """What `Pictures` read, to vectors (I, E)."""
        assert self.image_side is not None
        return self.compared(self.image_side(pictures))

    def compared(self, vectors: Tensor) -> Tensor:
        """At length one, where the angle alone counts."""
        return F.normalize(vectors.float(), dim=1, eps=1e-8) if self.config.similarity == "cosine" else vectors.float()


def save_grounder(grounder: Grounder, folder: Path) -> None:
    """Write grounding.json and grounding.safetensors, and a transformers model that looks at the images."""
    config, side = grounder.config, grounder.image_side
    values = config.model_dump(mode="json")
    if config.image.path is not None:
        # The path of another machine says nothing here.
        values["image"]["path"] = IMAGE_ENCODER
        if side is not None:
            foreign = side.eye if isinstance(side.eye, Foreign) else load_foreign(config.image.path)
            foreign.save(folder / IMAGE_ENCODER)
    about = {"dim": len(grounder.cls), "grounding": {**values, "layer": grounder.layer}}
    (folder / ABOUT).write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")
    kept = {name: value for name, value in grounder.state_dict().items() if not name.startswith(FOREIGN)}
    save_file({name: value.detach().contiguous().cpu() for name, value in kept.items()}, folder / WEIGHTS)


def load_grounder(folder: Path, with_images: bool = False) -> Grounder | None:
    """What `save_grounder` wrote, in evaluation mode; None where it wrote nothing.

    Raises ValueError where it is damaged.
    """
    if not (folder / ABOUT).exists():
        return None
    about = read_json(folder, ABOUT)
    try:
        values = about["grounding"]
        if values["image"]["path"] is not None:
            values["image"]["path"] = folder / IMAGE_ENCODER
        config = GroundingConfig.model_validate(values)
        # To load is not to draw.
        with torch.random.fork_rng(devices=[]):
            grounder = Grounder(about["dim"], values["layer"], config, with_images)
        stored = load_file(folder / WEIGHTS)
        if not with_images:
            stored = {name: value for name, value in stored.items() if not name.startswith(IMAGE_SIDE)}
        missing, unexpected = grounder.load_state_dict(stored, strict=False)
        if strange := [*(name for name in missing if not name.startswith(FOREIGN)), *unexpected]:
            raise KeyError(strange[0])
    except (OSError, SafetensorError, KeyError, TypeError, RuntimeError, ValidationError) as error:
        raise ValueError(
            f"model {folder}: found {ABOUT} and {WEIGHTS} that do not go together ({one_line(error)}), wanted both as "
            "`sonorant ground` wrote them: copy them again"
        ) from None
    return grounder.eval()


def carry_grounder(source: Path, target: Path, num_still: int) -> None:
    """Copy what `save_grounder` wrote, if anything, to an encoder whose lowest `num_still` layers are the same.

    Raises ValueError where it is damaged, or speech is read from a layer above them: it would no longer be what images
    were compared to.
    """
    if (grounder := load_grounder(source)) is None:
        return
    if grounder.layer > num_still:
        raise ValueError(
            f"align: found an encoder grounded on layer {grounder.layer} of which the lowest {num_still} stand still, "
            "wanted that layer among them: lower num_trained_layers, or ground on a lower one (ground.grounding.layer)"
        )
    for name in (ABOUT, WEIGHTS):
        shutil.copy(source / name, target / name)
    if (source / IMAGE_ENCODER / CONFIG).exists():
        shutil.copytree(source / IMAGE_ENCODER, target / IMAGE_ENCODER)
