"""Encoders in transformers' own format, both ways: a folder of config.json and model.safetensors.

We open what is a HubertModel, Wav2Vec2Model, Data2VecAudioModel or WavLMModel, with or without a head, and write what
`AutoModel` opens. The tables say which of our settings is which of theirs, and which of our tensors is which of theirs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sonorant.config import EncoderConfig
from sonorant.data.frames import SAMPLE_RATE, STEM_KERNELS, STEM_STRIDES
from sonorant.models.encoder import Encoder

CONFIG, WEIGHTS, SHARDS, PREPROCESSOR = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "preprocessor_config.json",
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Family:
    """One of transformers' models: its class, what its heads call it, and what its settings mean.

    settings: our name to theirs and the value that theirs has where it is not given. fixed: what it cannot vary.
    """

    architecture: str
    prefix: str
    settings: Mapping[str, tuple[str, Any]]
    fixed: Mapping[str, Any] = field(default_factory=dict)


COMMON: dict[str, tuple[str, Any]] = {
    "stem_channels": ("conv_dim", [512] * 7),
    "stem_bias": ("conv_bias", False),
    "dim": ("hidden_size", 768),
    "num_layers": ("num_hidden_layers", 12),
    "num_heads": ("num_attention_heads", 12),
    "ffn_dim": ("intermediate_size", 3072),
    "position_groups": ("num_conv_pos_embedding_groups", 16),
    "dropout": ("hidden_dropout", 0.1),
    "attention_dropout": ("attention_dropout", 0.1),
    "ffn_dropout": ("activation_dropout", 0.1),
    "layer_drop": ("layerdrop", 0.1),
}
ONE_POSITION: dict[str, tuple[str, Any]] = {
    **COMMON,
    "stem_norm": ("feat_extract_norm", "group"),
    "pre_norm": ("do_stable_layer_norm", False),
    "position_kernel": ("num_conv_pos_embeddings", 128),
}
FAMILIES = {
    "hubert": Family(
        "HubertModel",
        "hubert.",
        {**ONE_POSITION, "projection_norm": ("feat_proj_layer_norm", True)},
        {"position_depth": 1},
    ),
    "wav2vec2": Family("Wav2Vec2Model", "wav2vec2.", ONE_POSITION, {"position_depth": 1}),
    "wavlm": Family(
        "WavLMModel",
        "wavlm.",
        {
            **ONE_POSITION,
            "relative_buckets": ("num_buckets", 320),
            "relative_max_distance": ("max_bucket_distance", 800),
        },
        {"position_depth": 1},
    ),
    "data2vec-audio": Family(
        "Data2VecAudioModel",
        "data2vec_audio.",
        {
            **COMMON,
            "position_depth": ("num_conv_pos_embeddings", 5),
            "position_kernel": ("conv_pos_kernel_size", 19),
        },
        {"stem_norm": "layer", "pre_norm": False},
    ),
}
ONLY: dict[str, tuple[Any, str]] = {
    "conv_kernel": (list(STEM_KERNELS), "the frame grid is fixed"),
    "conv_stride": (list(STEM_STRIDES), "the frame grid is fixed"),
    "hidden_act": ("gelu", "there is no other activation"),
    "feat_extract_activation": ("gelu", "there is no other activation"),
    "layer_norm_eps": (1e-5, "every norm has this one"),
    "conv_pos_batch_norm": (False, "the positional convolution is weight-normalised"),
    "add_adapter": (False, "there are no adapters"),
    "adapter_attn_dim": (None, "there are no adapters"),
    "quantization_config": (None, "weights are floats"),
}
"""Their settings that have one value here (also where they are not given), and why."""

NAMES: dict[str, list[str]] = {
    "mask_embedding": ["masked_spec_embed"],
    "stem.weights.{}": ["feature_extractor.conv_layers.{}.conv.weight"],
    "stem.biases.{}": ["feature_extractor.conv_layers.{}.conv.bias"],
    "stem.norms.{}": ["feature_extractor.conv_layers.{}.layer_norm"],
    "stem_norm": ["feature_projection.layer_norm"],
    "projection": ["feature_projection.projection"],
    "context.position.magnitude": ["encoder.pos_conv_embed.conv.parametrizations.weight.original0"],
    "context.position.weight": ["encoder.pos_conv_embed.conv.parametrizations.weight.original1"],
    "context.position.bias": ["encoder.pos_conv_embed.conv.bias"],
    "context.position.weights.{}": ["encoder.pos_conv_embed.layers.{}.conv.weight"],
    "context.position.biases.{}": ["encoder.pos_conv_embed.layers.{}.conv.bias"],
    "context.norm": ["encoder.layer_norm"],
    "context.relative": ["encoder.layers.0.attention.rel_attn_embed"],
    "context.layers.{}.qkv": [f"encoder.layers.{{}}.attention.{part}_proj" for part in "qkv"],
    "context.layers.{}.gate": ["encoder.layers.{}.attention.gru_rel_pos_linear"],
    "context.layers.{}.gate_scale": ["encoder.layers.{}.attention.gru_rel_pos_const"],
    "context.layers.{}.attention_out": ["encoder.layers.{}.attention.out_proj"],
    "context.layers.{}.attention_norm": ["encoder.layers.{}.layer_norm"],
    "context.layers.{}.ffn_in": ["encoder.layers.{}.feed_forward.intermediate_dense"],
    "context.layers.{}.ffn_out": ["encoder.layers.{}.feed_forward.output_dense"],
    "context.layers.{}.ffn_norm": ["encoder.layers.{}.final_layer_norm"],
}
"""Our parameters and modules, and what transformers calls them: three where q, k and v are one here."""
SPELLINGS = {
    "conv.weight_g": "conv.parametrizations.weight.original0",
    "conv.weight_v": "conv.parametrizations.weight.original1",
}
"""What older versions of transformers call a weight norm."""
PARTS = ("feature_extractor.", "feature_projection.", "encoder.")
"""Theirs that are an encoder's; all else is a head's."""


# ------------------------------------------------------------------------------------------------------ write


def save_encoder(encoder: Encoder, folder: Path, **about: Any) -> None:
    """Write config.json, model.safetensors and preprocessor_config.json; `about` goes into the config."""
    config = encoder.config
    name = "data2vec-audio" if config.position_depth > 1 else "wavlm" if config.relative_buckets else "hubert"
    family = FAMILIES[name]
    values = {**config.model_dump(mode="json"), "stem_channels": list(config.stem_widths)}
    described = {
        "architectures": [family.architecture],
        "model_type": name,
        **{theirs: wanted for theirs, (wanted, _) in ONLY.items() if wanted is not None},
        **{theirs: values[ours] for ours, (theirs, _) in family.settings.items()},
        "num_feat_extract_layers": len(STEM_KERNELS),
        "feat_proj_dropout": 0.0,
        "apply_spec_augment": False,
        "torch_dtype": "float32",
        "sonorant": {"encoder": config.model_dump(mode="json"), **about},
    }
    preprocessor = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": SAMPLE_RATE,
        "do_normalize": config.standardised,
        "padding_value": 0.0,
        "padding_side": "right",
        "return_attention_mask": True,
    }
    for file, content in ((CONFIG, described), (PREPROCESSOR, preprocessor)):
        (folder / file).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    save_file(to_transformers(encoder), folder / WEIGHTS, metadata={"format": "pt"})


def to_transformers(encoder: Encoder) -> dict[str, Tensor]:
    """Our parameters under transformers' names."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in encoder.named_parameters():
        value = parameter.detach().float().cpu()
        theirs = transformers_names(name)
        for their_name, part in zip(theirs, value.chunk(len(theirs)), strict=True):
            tensors[their_name] = part.contiguous().clone()
    return tensors


# ------------------------------------------------------------------------------------------------------- read


def load_encoder(folder: Path) -> tuple[Encoder, dict[str, Any]]:
    """The encoder of a folder that we or transformers wrote, in evaluation mode, and what we said about it.

    A mask embedding that was never stored is drawn anew, the same one every time. Raises ValueError where the folder
    holds no encoder or one that cannot be represented here exactly.
    """
    described = read_json(folder, CONFIG)
    about = described.get("sonorant")
    config = foreign_config(folder, described) if about is None else own_config(folder, about)
    family = FAMILIES.get(str(described.get("model_type")))
    tensors = read_tensors(folder, family.prefix if family else "")
    if about is None:
        drawn = torch.rand(config.dim, generator=torch.Generator().manual_seed(0))
        tensors.setdefault("masked_spec_embed", drawn)
    # Not on the meta device: to draw nothing there, torch imports its compiler, which takes longer than drawing.
    with torch.random.fork_rng(devices=[]):
        encoder = Encoder(config)
    try:
        check_tensors(encoder, tensors)
    except ValueError as error:
        raise ValueError(f"model {folder}: {error}") from None
    state = from_transformers(tensors, [name for name, _ in encoder.named_parameters()])
    encoder.load_state_dict(state, assign=True)
    return encoder.eval(), about or {}


def own_config(folder: Path, about: Any) -> EncoderConfig:
    """What `save_encoder` wrote of an encoder's configuration."""
    try:
        return EncoderConfig.model_validate(about["encoder"])
    except (KeyError, TypeError, ValidationError) as error:
        raise ValueError(
            f"model {folder}: found no valid encoder in {CONFIG} ({one_line(error)}), wanted what sonorant wrote: "
            "run `sonorant pretrain` or `sonorant publish` again"
        ) from None


def foreign_config(folder: Path, described: Mapping[str, Any]) -> EncoderConfig:
    """Our configuration of a model that transformers describes."""
    if (kind := str(described.get("model_type"))) not in FAMILIES:
        raise ValueError(
            f"model {folder}: found model_type {kind} in {CONFIG}, wanted one of {', '.join(FAMILIES)}: "
            "choose such a model"
        )
    for name, (wanted, reason) in ONLY.items():
        if (found := described.get(name, wanted)) != wanted:
            raise ValueError(
                f"model {folder}: found {name} {found!r} in {CONFIG}, wanted {wanted!r}, for {reason}: "
                "choose another model"
            )
    family = FAMILIES[kind]
    values = {ours: described.get(theirs, default) for ours, (theirs, default) in family.settings.items()}
    standardised = True
    if (folder / PREPROCESSOR).exists():
        standardised = read_json(folder, PREPROCESSOR).get("do_normalize", True)
    try:
        return EncoderConfig.model_validate({**values, **family.fixed, "standardised": standardised})
    except ValidationError as error:
        raise ValueError(
            f"model {folder}: found a {CONFIG} that describes no possible encoder ({one_line(error)}), wanted one "
            "that transformers opens: download it again"
        ) from None


def read_json(folder: Path, file: str) -> dict[str, Any]:
    """A JSON object from the folder; ValueError where it is none, or the folder holds only a pickle."""
    path = folder / file
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        refuse_pickles(folder)
        raise ValueError(
            f"model {folder}: found no readable {file} ({one_line(error)}), wanted a folder with {CONFIG} and "
            f"{WEIGHTS}: name one that `sonorant pretrain`, `sonorant publish` or transformers' save_pretrained wrote"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"model {folder}: found no object in {file}, wanted settings by name: download it again")
    return content


def refuse_pickles(folder: Path) -> None:
    """ValueError where all that is there to be read is a pickle."""
    given = [folder] if folder.is_file() else sorted(folder.glob("*"))
    if pickles := [path.name for path in given if path.suffix in PICKLES]:
        raise ValueError(
            f"model {folder}: found {pickles[0]}, a pickle, which can run code when it is read, wanted {WEIGHTS}: open "
            "it with transformers where you trust it and write it anew with model.save_pretrained(folder)"
        )


def read_tensors(folder: Path, prefix: str) -> dict[str, Tensor]:
    """The encoder's tensors from one file or several, without `prefix`, under today's names."""
    files = [WEIGHTS]
    if not (folder / WEIGHTS).exists() and (folder / SHARDS).exists():
        shards = read_json(folder, SHARDS).get("weight_map")
        files = list(shards.values()) if isinstance(shards, dict) else []
        if not files or any(not isinstance(file, str) or Path(file).name != file for file in files):
            raise ValueError(f"model {folder}: found no files of its own in {SHARDS}, wanted some: download it again")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(files)):
        try:
            tensors |= load_file(folder / file)
        except (OSError, SafetensorError) as error:
            refuse_pickles(folder)
            raise ValueError(
                f"model {folder}: found no readable {file} ({one_line(error)}), wanted all weights as safetensors: "
                "copy or download it again"
            ) from None
    named = {}
    for name, tensor in tensors.items():
        for old, new in SPELLINGS.items():
            name = name.replace(old, new)
        named[name.removeprefix(prefix)] = tensor
    return {name: tensor for name, tensor in named.items() if name.startswith(PARTS) or name == "masked_spec_embed"}


def check_tensors(encoder: Encoder, tensors: Mapping[str, Tensor]) -> None:
    """ValueError where a tensor is missing, has another shape, or is not the encoder's."""
    wanted = {
        name: part.shape
        for ours, parameter in encoder.named_parameters()
        for name, part in zip(transformers_names(ours), parameter.chunk(len(transformers_names(ours))), strict=True)
    }
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise ValueError(
            f"found no tensor {missing[0]} ({len(missing)} of {len(wanted)} are missing), wanted all that {CONFIG} "
            "promises: copy or download it again"
        )
    if strange := sorted(tensors.keys() - wanted.keys()):
        raise ValueError(
            f"found a tensor {strange[0]} that {CONFIG} does not speak of ({len(strange)} such), wanted a model whose "
            "two files belong together: copy or download it again"
        )
    for name, shape in wanted.items():
        if tensors[name].shape != shape or not tensors[name].is_floating_point():
            raise ValueError(
                f"found tensor {name} of {tensors[name].dtype} and shape {tuple(tensors[name].shape)}, wanted floats "
                f"of shape {tuple(shape)} as {CONFIG} says: copy or download it again"
            )


def from_transformers(tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Transformers' tensors as the state of an encoder whose parameters have `names`, in float32."""
    return {name: torch.cat([tensors[theirs].float() for theirs in transformers_names(name)]) for name in names}


def transformers_names(name: str) -> list[str]:
    """What transformers calls our parameter."""
    pattern, numbers = re.sub(r"\d+", "{}", name), re.findall(r"\d+", name)
    module, _, kind = pattern.rpartition(".")
    theirs = NAMES[pattern] if pattern in NAMES else [f"{part}.{kind}" for part in NAMES[module]]
    return [part.format(*numbers) for part in theirs]


def one_line(error: Exception) -> str:
    """The error's kind and message, however it was broken into lines."""
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
