"""Our encoder in transformers' own format and back: config.json and model.safetensors that `AutoModel` opens.

One weight-normalised positional convolution is a HubertModel, stacked ones are a Data2VecAudioModel.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sonorant.config import EncoderConfig
from sonorant.data.frames import SAMPLE_RATE, STEM_KERNELS, STEM_STRIDES
from sonorant.models.encoder import Encoder

LAYER_NAMES = {
    "attention_out": "attention.out_proj",
    "attention_norm": "layer_norm",
    "ffn_in": "feed_forward.intermediate_dense",
    "ffn_out": "feed_forward.output_dense",
    "ffn_norm": "final_layer_norm",
}


def save_encoder(encoder: Encoder, folder: Path, **about: Any) -> None:
    """Write config.json, model.safetensors and preprocessor_config.json; `about` goes into the config."""
    config = encoder.config
    stacked = config.position_depth > 1
    described = {
        "architectures": ["Data2VecAudioModel" if stacked else "HubertModel"],
        "model_type": "data2vec-audio" if stacked else "hubert",
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.ffn_dim,
        "hidden_act": "gelu",
        "feat_extract_activation": "gelu",
        "feat_extract_norm": config.stem_norm,
        "feat_proj_layer_norm": True,
        "feat_proj_dropout": 0.0,
        "conv_dim": list(config.stem_widths),
        "conv_kernel": list(STEM_KERNELS),
        "conv_stride": list(STEM_STRIDES),
        "conv_bias": False,
        "num_feat_extract_layers": len(STEM_KERNELS),
        "num_conv_pos_embeddings": config.position_depth if stacked else config.position_kernel,
        "num_conv_pos_embedding_groups": config.position_groups,
        "do_stable_layer_norm": config.pre_norm,
        "hidden_dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "activation_dropout": config.ffn_dropout,
        "layerdrop": config.layer_drop,
        "layer_norm_eps": 1e-5,
        "apply_spec_augment": False,
        "torch_dtype": "float32",
        "sonorant": {"encoder": config.model_dump(mode="json"), **about},
    }
    if stacked:
        described["conv_pos_kernel_size"] = config.position_kernel
    preprocessor = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": SAMPLE_RATE,
        "do_normalize": True,
        "padding_value": 0.0,
        "padding_side": "right",
        "return_attention_mask": True,
    }
    (folder / "config.json").write_text(json.dumps(described, indent=1, sort_keys=True) + "\n")
    (folder / "preprocessor_config.json").write_text(
        json.dumps(preprocessor, indent=1, sort_keys=True) + "\n"
    )
    save_file(to_transformers(encoder), folder / "model.safetensors", metadata={"format": "pt"})


def load_encoder(folder: Path) -> tuple[Encoder, dict[str, Any]]:
    """The encoder that `save_encoder` wrote, in evaluation mode, and what was said about it.

    Raises ValueError where the folder holds no such model.
    """
    try:
        described = json.loads((folder / "config.json").read_text())
        about = described["sonorant"]
        encoder = Encoder(EncoderConfig.model_validate(about["encoder"]))
        names = dict(encoder.named_parameters())
        encoder.load_state_dict(from_transformers(load_file(folder / "model.safetensors"), list(names)))
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"model {folder}: found no encoder that sonorant wrote ({type(error).__name__}: {reason}), "
            "wanted config.json and model.safetensors: run `sonorant pretrain` or `sonorant publish` first"
        ) from None
    return encoder.eval(), about


def to_transformers(encoder: Encoder) -> dict[str, Tensor]:
    """Our parameters under transformers' names."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in encoder.named_parameters():
        value = parameter.detach().float().cpu()
        theirs = transformers_names(name)
        for their_name, part in zip(theirs, value.chunk(len(theirs)), strict=True):
            tensors[their_name] = part.contiguous().clone()
    return tensors


def from_transformers(tensors: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """Transformers' tensors as the state of an encoder whose parameters have `names`."""
    return {name: torch.cat([tensors[theirs] for theirs in transformers_names(name)]) for name in names}


def transformers_names(name: str) -> list[str]:
    """What transformers calls our parameter; three names where ours is q, k and v in one."""
    parts = name.split(".")
    match parts:
        case ["stem", "weights", index]:
            return [f"feature_extractor.conv_layers.{index}.conv.weight"]
        case ["stem", "norms", index, kind]:
            return [f"feature_extractor.conv_layers.{index}.layer_norm.{kind}"]
        case ["stem_norm", kind]:
            return [f"feature_projection.layer_norm.{kind}"]
        case ["projection", kind]:
            return [f"feature_projection.projection.{kind}"]
        case ["mask_embedding"]:
            return ["masked_spec_embed"]
        case ["context", "norm", kind]:
            return [f"encoder.layer_norm.{kind}"]
        case ["context", "layers", index, "qkv", kind]:
            return [f"encoder.layers.{index}.attention.{part}_proj.{kind}" for part in "qkv"]
        case ["context", "layers", index, part, kind]:
            return [f"encoder.layers.{index}.{LAYER_NAMES[part]}.{kind}"]
        case ["context", "position", *rest]:
            return [f"encoder.pos_conv_embed.{position_name(rest)}"]
    raise AssertionError(f"no name for {name}")


def position_name(rest: list[str]) -> str:
    """What transformers calls a parameter of the positional convolution."""
    match rest:
        case ["magnitude"]:
            return "conv.parametrizations.weight.original0"
        case ["weight"]:
            return "conv.parametrizations.weight.original1"
        case ["bias"]:
            return "conv.bias"
        case ["weights", index]:
            return f"layers.{index}.conv.weight"
        case ["biases", index]:
            return f"layers.{index}.conv.bias"
    raise AssertionError(f"no name for {rest}")
