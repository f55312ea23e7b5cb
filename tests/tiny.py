"""Things small enough to test with: an encoder, a batch, an engine, a corpus and its units."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from sonorant.artifacts import digest_folder, write_record
from sonorant.config import EncoderConfig, PretrainConfig, Split, UtteranceConfig
from sonorant.data.batching import Batch, split_in_halves
from sonorant.data.corpus import Row, Taken, write_corpus
from sonorant.data.frames import HOP_SAMPLES, SAMPLE_RATE, frame_centres, num_frames, pack_waves
from sonorant.data.units import write_units
from sonorant.inference import Codebook, Speech
from sonorant.models.encoder import Encoder
from sonorant.models.huggingface import save_encoder
from sonorant.training.engine import Engine, build_engine

POST_NORM = {"position_depth": 3, "position_kernel": 5, "pre_norm": False}
"""Data2VecAudio's layout, which is MT4SSL's."""
PRE_NORM = {"position_depth": 1, "position_kernel": 8, "pre_norm": True}
GROUP_NORM = {"position_depth": 1, "position_kernel": 7, "pre_norm": False, "stem_norm": "group"}
LAYOUTS: dict[str, dict[str, Any]] = {"post": POST_NORM, "pre": PRE_NORM, "group": GROUP_NORM}


def encoder_config(**changes: Any) -> EncoderConfig:
    """16 stem channels, 2 layers of 32, no dropout."""
    tiny = {"stem_channels": 16, "dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 64, "position_groups": 4}
    quiet = {"dropout": 0.0, "attention_dropout": 0.0, "layer_drop": 0.0}
    return EncoderConfig.model_validate({**tiny, **quiet, **PRE_NORM, **changes})


def shaken(module: nn.Module, seed: int = 0, size: float = 0.05) -> nn.Module:
    """The module with every parameter moved a little, so that no bias is zero and no scale one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return module


def make_encoder(seed: int = 0, **changes: Any) -> Encoder:
    """A random encoder in evaluation mode."""
    torch.manual_seed(seed)
    encoder = Encoder(encoder_config(**changes))
    shaken(encoder, seed)
    return encoder.eval()


TASK_SECTIONS: dict[str, Any] = {
    "teacher": {"num_layers": 2, "start_decay": 0.9, "end_decay": 0.99, "ramp_updates": 4},
    "codebooks": {"num_codes": 6},
    "contrast": {"dim": 8, "num_negatives": 5},
    "quantiser": {"num_groups": 2, "num_codes": 4, "dim": 8},
    "waveform": {"channels": 8},
    "spectrum": {"hidden_dim": 16},
    "utterance": {"dim": 8},
}
"""Heads to match the tiny encoder."""
ALL_TASKS = ("units", "teacher", "codebooks", "contrast", "diversity", "magnitude", "waveform", "spectrum", "utterance")


def make_engine(
    seed: int = 0,
    num_units: int = 5,
    unmasked_weight: float = 0.0,
    tasks: Sequence[str] = ("units", "teacher"),
    sections: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Engine:
    """Tasks on a random encoder whose teacher is not quite the student; `changes` go to the encoder."""
    torch.manual_seed(seed)
    weights = dict.fromkeys(tasks, 1.0)
    config = pretrain_config(
        phases=[{"weights": weights}],
        encoder=encoder_config(**changes).model_dump(mode="json"),
        **{"units": {"unmasked_weight": unmasked_weight}, **(sections or {})},
    )
    engine = build_engine(config, Encoder(config.encoder), num_units).eval()
    shaken(engine.encoder, seed)
    for part in (*engine.tasks.values(), engine.teacher, engine.quantizer):
        if part is not None:
            shaken(part, seed + 1)
    return engine


def noise(num_samples: int, seed: int = 0) -> NDArray[np.float32]:
    """Standard normal samples, (S,)."""
    return np.random.default_rng(seed).standard_normal(num_samples).astype(np.float32)


def make_batch(lengths: Sequence[int], num_units: int = 5, seed: int = 0) -> Batch:
    """Noise of so many samples each; about half of the frames masked, at least one an utterance; random units."""
    rng = np.random.default_rng(seed)
    masks, units = [], []
    for length in lengths:
        mask = rng.random(num_frames(length)) < 0.5
        mask[0] = True
        masks.append(mask)
        units.append(rng.integers(num_units, size=len(mask)))
    waves = [noise(length, seed + index) for index, length in enumerate(lengths)]
    halves = [half for wave in waves for half in split_in_halves(wave, UtteranceConfig(), rng)]
    return Batch(
        torch.from_numpy(pack_waves(waves)),
        tuple(lengths),
        torch.from_numpy(np.concatenate(masks)),
        torch.from_numpy(np.concatenate(units)),
        tuple(int(n) for n in rng.integers(2**62, size=len(lengths))),
        torch.arange(len(lengths)) // 2,
        torch.arange(len(lengths)) // 3,
        torch.from_numpy(pack_waves(halves)),
        tuple(len(half) for half in halves),
    )


def alone(batch: Batch) -> list[Batch]:
    """Each utterance of a batch as a batch of its own."""
    assert batch.units is not None
    assert batch.speakers is not None
    assert batch.sources is not None
    parts, sample, frame, half = [], 0, 0, 0
    for row, length in enumerate(batch.num_samples):
        frames, samples = slice(frame, frame + num_frames(length)), slice(sample, sample + grid(length))
        lengths = batch.half_samples[2 * row : 2 * row + 2]
        halves = slice(half, half + sum(grid(n) for n in lengths))
        part = Batch(
            batch.waves[samples][:length], (length,), batch.mask[frames], batch.units[frames],
            batch.seeds[row : row + 1], batch.speakers[row : row + 1], batch.sources[row : row + 1],
            None if batch.halves is None else batch.halves[halves], lengths,
        )  # fmt: skip
        parts.append(part)
        sample, frame, half = samples.stop, frames.stop, halves.stop
    return parts


def grid(num_samples: int) -> int:
    """Samples that a wave takes up in a packed batch."""
    return math.ceil(num_samples / HOP_SAMPLES) * HOP_SAMPLES


# ---------------------------------------------------------------------------------------------------- corpus

TONES = (300.0, 700.0, 1300.0, 2500.0)  # Hz: one tone a unit
TONE_SECONDS = 0.4  # 20 frames, so that most masked spans lie within what is seen of a tone


def tones(rng: np.random.Generator, num_samples: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """A sequence of noisy tones, (S,), and which one sounds at each frame's centre, (T,)."""
    hold = round(TONE_SECONDS * SAMPLE_RATE)
    which = rng.integers(len(TONES), size=num_samples // hold + 1).repeat(hold)[:num_samples]
    wave = np.sin(2 * np.pi * np.asarray(TONES)[which] * np.arange(num_samples) / SAMPLE_RATE)
    wave = 0.3 * wave + 0.03 * rng.standard_normal(num_samples)
    return wave.astype(np.float32), which[(frame_centres(num_frames(num_samples)) * SAMPLE_RATE).astype(int)]


def write_tone_corpus(
    folder: Path, num_utterances: int = 12, seconds: tuple[float, float] = (0.8, 1.6), seed: int = 0
) -> tuple[Path, Path]:
    """The artifacts corpus and units below `folder`: tones, and which tone each frame is."""
    rng = np.random.default_rng(seed)
    raw, corpus, units = (folder / name for name in ("raw", "corpus", "units"))
    for path in (raw, corpus, units):
        path.mkdir(parents=True)
    taken, labels = [], []
    for index in range(num_utterances):
        wave, units_T = tones(rng, int(rng.uniform(*seconds) * SAMPLE_RATE))
        path = raw / f"{index:02d}.flac"
        soundfile.write(path, wave, SAMPLE_RATE)
        split = "train" if index < num_utterances - 2 else "dev"
        row = Row(id=f"u{index:02d}", source="tones", speaker=f"s{index}", path=path, split=split)
        taken.append(Taken(row, split, f"{index}", len(wave), path, None))
        labels.append((row.id, len(wave), units_T))
    write_corpus(corpus, taken, [], {"tones": {"kind": "synthetic"}})
    write_units(units, labels, len(TONES))
    for path in (corpus, units):
        write_record(path, {"step": "test", "artifact": path.name, "digest": digest_folder(path)})
    return corpus, units


def write_pairs_corpus(folder: Path, num_utterances: int = 24, seed: int = 0) -> tuple[Path, Path]:
    """The artifacts corpus and units below `folder`: sequences of tones, and of each that begins with the same tone one
    of two images of one colour."""
    rng = np.random.default_rng(seed)
    raw, corpus, units = (folder / name for name in ("raw", "corpus", "units"))
    for path in (raw, corpus, units):
        path.mkdir(parents=True)
    taken, labels = [], []
    for index in range(num_utterances):
        wave, units_T = tones(rng, int(rng.uniform(0.8, 1.6) * SAMPLE_RATE))
        first = int(units_T[0])
        path, image = raw / f"{index:02d}.flac", raw / f"{first}-{index % 2}.png"
        soundfile.write(path, wave, SAMPLE_RATE)
        Image.new("RGB", (24, 24), (60 * first, 255 - 60 * first, 100 * (index % 2))).save(image)
        split: Split = "train" if index < num_utterances - 6 else "dev" if index % 2 else "test"
        row = Row(id=f"u{index:02d}", source="tones", speaker=f"s{index}", path=path, split=split, text=f"tone {first}")
        taken.append(Taken(row, split, f"{index}", len(wave), path, image))
        labels.append((row.id, len(wave), units_T))
    write_corpus(corpus, taken, [], {"tones": {"kind": "synthetic"}})
    write_units(units, labels, len(TONES))
    for path in (corpus, units):
        write_record(path, {"step": "test", "artifact": path.name, "digest": digest_folder(path)})
    return corpus, units


def write_model(folder: Path, seed: int = 0) -> Path:
    """The artifact model: a random encoder, its units the nearest of eight of its frames of noise."""
    folder.mkdir(parents=True)
    encoder = make_encoder(seed)
    save_encoder(encoder, folder, layer=2)
    centroids = Speech(encoder, 2).embed([noise(SAMPLE_RATE, seed)])[0][::6][:8].copy()
    dim = centroids.shape[1]
    Codebook(centroids, np.zeros(dim, np.float32), np.ones(dim, np.float32)).save(folder / "codebook.safetensors")
    write_record(folder, {"step": "test", "artifact": "model", "inputs": {}, "digest": digest_folder(folder)})
    return folder


def pretrain_values(**changes: Any) -> dict[str, Any]:
    """A `pretrain` section for the tone corpus, as params.yaml would hold it."""
    values: dict[str, Any] = {
        "num_updates": 6,
        "phases": [{"weights": {"units": 1.0, "teacher": 1.0}}],
        "encoder": encoder_config().model_dump(mode="json"),
        **TASK_SECTIONS,
        "optim": {"learning_rate": 0.002, "warmup_share": 0.1, "decay_share": 0.3},
        "batching": {"batch_seconds": 4.0, "crop_seconds": 1.0},
        "log_every": 1,
        "checkpoint_every": 2,
    }
    return with_changes(values, changes)


def pretrain_config(**changes: Any) -> PretrainConfig:
    """The same, parsed."""
    return PretrainConfig.model_validate(pretrain_values(**changes))


def with_changes(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `changes` laid over them, section by section."""
    return {
        **values,
        **{
            key: {**values[key], **change} if isinstance(change, dict) and isinstance(values.get(key), dict) else change
            for key, change in changes.items()
        },
    }
