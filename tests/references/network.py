"""The network of pretraining.md §0 once more, from its text alone: float64, one utterance at a time, no padding.

Written in elementary operations (no convolution, normalisation or attention function of torch's), so that what is
compared with it shares neither code nor layout. Parameters come by the name the encoder and the teacher give them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

STEM = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))
Parameters = Mapping[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """What the parameters do not say of themselves."""

    depth: int
    groups: int
    num_layers: int
    num_heads: int


def gelu(x: Tensor) -> Tensor:
    """x Φ(x)."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Each row to mean 0 and variance 1, eps 1e-5, then scale and shift."""
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return normed if weight is None or bias is None else normed * weight + bias


def linear(x: Tensor, parameters: Parameters, name: str) -> Tensor:
    """x Wᵀ + b."""
    return x @ parameters[f"{name}.weight"].T + parameters[f"{name}.bias"]


def stem(wave: Tensor, parameters: Parameters) -> Tensor:
    """(S,) to (T, C): convolution, LayerNorm over channels, GELU, seven times."""
    x = wave[:, None]
    for index, (kernel, stride) in enumerate(STEM):
        weight = parameters[f"encoder.stem.weights.{index}"]
        rows = []
        for start in range(0, len(x) - kernel + 1, stride):
            window = x[start : start + kernel]
            rows.append((weight * window.T).sum((1, 2)))
        norm = f"encoder.stem.norms.{index}"
        x = gelu(layer_norm(torch.stack(rows), parameters[f"{norm}.weight"], parameters[f"{norm}.bias"]))
    return x


def position(x: Tensor, parameters: Parameters, where: str, depth: int, groups: int) -> Tensor:
    """Stacked grouped convolutions that see as far as the utterance goes, each with LayerNorm and GELU."""
    for index in range(depth):
        weight, bias = parameters[f"{where}.position.weights.{index}"], parameters[f"{where}.position.biases.{index}"]
        width, kernel = weight.shape[1], weight.shape[2]
        rows = []
        for t in range(len(x)):
            parts = []
            for group in range(groups):
                channels = slice(group * width, (group + 1) * width)
                total = bias[channels]
                for tap in range(kernel):
                    source = t + tap - kernel // 2
                    if 0 <= source < len(x):
                        total = total + weight[channels, :, tap] @ x[source, channels]
                parts.append(total)
            rows.append(torch.cat(parts))
        x = gelu(layer_norm(torch.stack(rows)))
    return x


def attention(x: Tensor, parameters: Parameters, layer: str, num_heads: int) -> Tensor:
    """softmax(q kᵀ / √E) v for each head."""
    q, k, v = linear(x, parameters, f"{layer}.qkv").chunk(3, dim=1)
    width = x.shape[1] // num_heads
    mixed = []
    for head in range(num_heads):
        part = slice(head * width, (head + 1) * width)
        scores = torch.exp(q[:, part] @ k[:, part].T / math.sqrt(width))
        mixed.append(scores / scores.sum(1, keepdim=True) @ v[:, part])
    return linear(torch.cat(mixed, dim=1), parameters, f"{layer}.attention_out")


def context(z: Tensor, parameters: Parameters, where: str, shape: Shape) -> tuple[Tensor, list[Tensor]]:
    """Post-norm transformer: the last layer's frames, and each layer's second feed-forward product."""
    x = z + position(z, parameters, where, shape.depth, shape.groups)
    x = layer_norm(x, parameters[f"{where}.norm.weight"], parameters[f"{where}.norm.bias"])
    products = []
    for index in range(shape.num_layers):
        layer = f"{where}.layers.{index}"
        x = x + attention(x, parameters, layer, shape.num_heads)
        x = layer_norm(x, parameters[f"{layer}.attention_norm.weight"], parameters[f"{layer}.attention_norm.bias"])
        product = linear(gelu(linear(x, parameters, f"{layer}.ffn_in")), parameters, f"{layer}.ffn_out")
        products.append(product)
        x = layer_norm(x + product, parameters[f"{layer}.ffn_norm.weight"], parameters[f"{layer}.ffn_norm.bias"])
    return x, products


def project(wave: Tensor, parameters: Parameters) -> Tensor:
    """(S,) to un-masked z (T, D): stem, LayerNorm, linear."""
    norm = "encoder.stem_norm"
    features = layer_norm(stem(wave, parameters), parameters[f"{norm}.weight"], parameters[f"{norm}.bias"])
    return linear(features, parameters, "encoder.projection")


def student(z: Tensor, mask: Tensor, parameters: Parameters, shape: Shape) -> Tensor:
    """The last layer's frames (T, D) of z with the mask embedding at masked frames."""
    hidden = torch.stack([parameters["encoder.mask_embedding"] if m else z[t] for t, m in enumerate(mask.tolist())])
    return context(hidden, parameters, "encoder.context", shape)[0]


def teacher(z: Tensor, parameters: Parameters, shape: Shape) -> list[Tensor]:
    """Each layer's second feed-forward product, every channel to mean 0 and variance 1 over time; no gradient."""
    with torch.no_grad():
        _, products = context(z.detach(), parameters, "teacher.context", shape)
        centred = [product - product.mean(0) for product in products]
        return [x / (x.pow(2).mean(0) + 1e-5).sqrt() for x in centred]
