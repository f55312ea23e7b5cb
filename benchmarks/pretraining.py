"""Our packed encoder and training step against transformers' HubertModel (sdpa) of the same shape and weights.

    python benchmarks/pretraining.py                      # HuBERT base and a small one: about twelve minutes on a core
    python benchmarks/pretraining.py --sizes small --rounds 5
    python benchmarks/pretraining.py --memory             # peak memory of a base-size DinoSR step on 87 s of audio
    python benchmarks/pretraining.py --device cuda --precision bfloat16 --sizes base --seconds 175 --rounds 9

Each size runs in one process and one thread, the contenders in turn, so that they share the machine's moods. A ratio
is a peer's CPU time (on a GPU, wall time) over ours, median of rounds. The peers: a padded batch, and (`..._vs_single`)
one utterance at a time with gradients summed, which is what perfect length buckets come to. The batch is ragged as a
random batch of 2 to 16 s is: 44 % of the padded one is padding. The last line is one JSON object.

forward_*: no gradient, all layers; train_*: masked, forward and backward of all parameters; dinosr_step*: student
forward and backward, teacher forward, codebooks, AdamW, moving average. The peer's step is put together the usual way:
a second model for the teacher, each with its own stem, cdist and one-hot codebooks, AdamW and moving average
parameter by parameter.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sonorant.config import MaskingConfig, PretrainConfig
from sonorant.data.batching import Batch
from sonorant.data.frames import SAMPLE_RATE, STEM_KERNELS, STEM_STRIDES, Ragged, num_frames, pack_waves
from sonorant.data.masking import span_mask
from sonorant.models.encoder import Encoder
from sonorant.models.huggingface import to_transformers, transformers_names
from sonorant.tasks.codebooks import Codebooks
from sonorant.training.engine import Engine, build_engine
from sonorant.training.optim import build_optimizer

SECONDS = (2.9, 4.8, 7.2, 12.0)
"""Of the utterances of a random batch."""
SHAPES: dict[str, dict[str, Any]] = {
    "base": {"stem_channels": 512, "dim": 768, "num_layers": 12, "num_heads": 12, "ffn_dim": 3072},
    "small": {"stem_channels": 256, "dim": 384, "num_layers": 6, "num_heads": 6, "ffn_dim": 1536},
}
SHARED = {"stem_norm": "group", "pre_norm": False, "position_depth": 1, "position_kernel": 128, "position_groups": 16}
QUIET = {"dropout": 0.0, "attention_dropout": 0.0, "ffn_dropout": 0.0, "layer_drop": 0.0}
NUM_CODES, CODE_DECAY, TEACHER_DECAY = 256, 0.9, 0.999
VARIANTS = ("ours", "ours_checkpointed", "single", "padded")


def recipe(size: str) -> PretrainConfig:
    """DinoSR on an encoder of this size, without dropout, so that the contenders compute the same."""
    return PretrainConfig.model_validate(
        {
            "phases": [{"weights": {"codebooks": 1.0}}],
            "encoder": {**SHAPES[size], **SHARED, **QUIET},
            "teacher": {"num_layers": 8 if size == "base" else 4, "start_decay": TEACHER_DECAY, "ramp_updates": 0},
            "codebooks": {"num_codes": NUM_CODES, "decay": CODE_DECAY},
        }
    )


def draw_batch(seconds: float) -> Batch:
    """Utterances of noise of varying loudness, at least so many seconds in all, masked as DinoSR does."""
    rng = np.random.default_rng(0)
    waves: list[Any] = []
    while not waves or sum(map(len, waves)) < seconds * SAMPLE_RATE:
        for length in SECONDS:
            count = int(length * SAMPLE_RATE)
            loudness = np.exp(rng.normal(size=count // 4_000 + 1)).repeat(4_000)[:count]
            wave = loudness * rng.standard_normal(count)
            waves.append(((wave - wave.mean()) / wave.std()).astype(np.float32))
            if sum(map(len, waves)) >= seconds * SAMPLE_RATE:
                break
    lengths = tuple(len(wave) for wave in waves)
    mask = np.concatenate([span_mask(num_frames(n), MaskingConfig(share=0.8, length=10), rng) for n in lengths])
    return Batch(torch.from_numpy(pack_waves(waves)), lengths, torch.from_numpy(mask), seeds=tuple(range(len(lengths))))


# -------------------------------------------------------------------------------------------------- contenders


class Ours:
    """sonorant, as the step `pretrain` runs it."""

    def __init__(self, size: str, batch: Batch, device: str = "cpu", precision: str = "float32") -> None:
        torch.manual_seed(0)
        self.config, self.batch = recipe(size), batch.to(torch.device(device))
        self.device, self.precision = device, precision
        self.engine: Engine = build_engine(self.config, Encoder(self.config.encoder), 0).to(device)
        self.encoder: Encoder = self.engine.encoder
        self.frames = Ragged.of_samples(batch.num_samples)
        self.direction_FD = torch.randn(self.frames.total, self.config.encoder.dim).to(device)
        self.optimizer: torch.optim.Optimizer | None = None
        self.update = 0

    def autocast(self) -> torch.autocast:
        """What stands around the forward pass."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bfloat16")

    def forward(self) -> Tensor:
        """The last layer of the clean view, (F, D)."""
        self.engine.eval()
        with torch.inference_mode(), self.autocast():
            return self.encoder(self.batch.waves, self.batch.num_samples).output

    def train(self) -> float:
        """A loss on masked frames and every gradient."""
        self.engine.train()
        self.engine.zero_grad(set_to_none=True)
        with self.autocast():
            z_FD = self.encoder.project(self.batch.waves, self.batch.num_samples)
            output_FD = self.encoder.context(self.encoder.mask(z_FD, self.batch.mask), self.frames).output
        loss = (output_FD * self.direction_FD)[self.batch.mask].sum()
        loss.backward()
        return float(loss.detach())

    def dinosr_step(self) -> float:
        """One update."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.engine, self.config.optim)
        self.engine.train()
        self.optimizer.zero_grad(set_to_none=True)
        weight = 1 / float(self.batch.mask.sum())
        with self.autocast():
            loss, _ = self.engine(self.batch, {"codebooks": weight}, self.update)
        loss.backward()
        self.optimizer.step()
        self.update += 1
        self.engine.after_update(self.update)
        return float(loss.detach())


class Peer:
    """transformers, on padded batches or one utterance at a time; both share the models."""

    def __init__(self, ours: Ours) -> None:
        from transformers import HubertConfig, HubertModel

        encoder = ours.config.encoder
        config = HubertConfig(
            hidden_size=encoder.dim,
            num_hidden_layers=encoder.num_layers,
            num_attention_heads=encoder.num_heads,
            intermediate_size=encoder.ffn_dim,
            conv_dim=list(encoder.stem_widths),
            conv_kernel=list(STEM_KERNELS),
            conv_stride=list(STEM_STRIDES),
            feat_extract_norm="group",
            num_conv_pos_embeddings=encoder.position_kernel,
            num_conv_pos_embedding_groups=encoder.position_groups,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            feat_proj_dropout=0.0,
            layerdrop=0.0,
            mask_time_prob=0.05,
            attn_implementation="sdpa",
        )
        self.model: Any = HubertModel(config)
        self.model.load_state_dict(to_transformers(ours.encoder))
        self.model.to(ours.device)
        self.autocast = ours.autocast
        self.num_targets = ours.config.teacher.num_layers
        self.device = ours.device
        batch, starts = ours.batch, np.cumsum([0, *(-(-n // 320) * 320 for n in ours.batch.num_samples)])
        self.waves = [batch.waves[s : s + n] for s, n in zip(starts, batch.num_samples, strict=False)]
        slices = ours.frames.slices()
        self.masks = [batch.mask[rows] for rows in slices]
        self.directions = [ours.direction_FD[rows] for rows in slices]
        codebooks = ours.engine.task("codebooks")
        assert isinstance(codebooks, Codebooks)
        self.heads = copy.deepcopy(codebooks.heads)
        self.state = codebooks.state.clone()
        self.teacher: Any = None
        self.optimizer: torch.optim.Optimizer | None = None

    def batches(self, padded: bool) -> list[list[int]]:
        """Which utterances are computed together."""
        together = list(range(len(self.waves)))
        return [together] if padded else [[row] for row in together]

    def inputs(self, rows: Sequence[int]) -> dict[str, Tensor | None]:
        """Waves and attention mask, which a single utterance does not need."""
        waves = [self.waves[row] for row in rows]
        mask = pad_sequence([torch.ones(len(w), dtype=torch.long, device=w.device) for w in waves], batch_first=True)
        return {
            "input_values": pad_sequence(waves, batch_first=True),
            "attention_mask": mask if len(rows) > 1 else None,
        }

    def run(self, rows: Sequence[int], masked: bool) -> list[Tensor]:
        """The last layer of each utterance."""
        times = pad_sequence([self.masks[row] for row in rows], batch_first=True) if masked else None
        found = self.model(**self.inputs(rows), mask_time_indices=times).last_hidden_state
        return [x[: len(self.masks[row])] for x, row in zip(found, rows, strict=True)]

    def forward(self, padded: bool) -> Tensor:
        """The last layer of the clean view, (F, D)."""
        self.model.eval()
        with torch.inference_mode(), self.autocast():
            return torch.cat([x for rows in self.batches(padded) for x in self.run(rows, masked=False)])

    def train(self, padded: bool) -> float:
        """A loss on masked frames and every gradient."""
        self.model.train()
        self.model.zero_grad(set_to_none=True)
        total = 0.0
        for rows in self.batches(padded):
            with self.autocast():
                found = self.run(rows, masked=True)
            parts = zip(found, rows, strict=True)
            loss = torch.stack([(x * self.directions[row])[self.masks[row]].sum() for x, row in parts]).sum()
            loss.backward()
            total += float(loss.detach())
        return total

    def dinosr_step(self, padded: bool) -> float:
        """One update, put together the usual way."""
        if self.optimizer is None:
            self.teacher = copy.deepcopy(self.model).requires_grad_(False).eval()
            parameters = [*self.model.parameters(), *self.heads.parameters()]
            self.optimizer = torch.optim.AdamW(parameters, 5e-4, (0.9, 0.98), 1e-6, 0.01)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        num_masked = sum(int(mask.sum()) for mask in self.masks)
        sums = torch.zeros_like(self.state)
        total = 0.0
        for rows in self.batches(padded):
            with self.autocast():
                targets = [frames_MD.float() for frames_MD in self.targets(rows)]
                found = self.run(rows, masked=True)
            outputs = torch.cat([x[self.masks[row]] for x, row in zip(found, rows, strict=True)])
            losses = []
            for book, (head, frames_MD) in enumerate(zip(self.heads, targets, strict=True)):
                codewords = self.state[book, :, :-1] / self.state[book, :, -1:]
                codes = torch.cdist(frames_MD, codewords).argmin(1)
                one_hot = F.one_hot(codes, NUM_CODES).float()
                sums[book] += torch.cat([one_hot.T @ frames_MD, one_hot.sum(0)[:, None]], 1)
                with self.autocast():
                    logits = head(outputs)
                losses.append(F.cross_entropy(logits.float(), codes, reduction="sum"))
            loss = torch.stack(losses).sum() / len(losses) / num_masked
            loss.backward()
            total += float(loss.detach())
        self.optimizer.step()
        with torch.no_grad():
            hit = sums[..., -1:] > 0
            self.state = torch.where(hit, CODE_DECAY * self.state + (1 - CODE_DECAY) * sums, self.state)
            for mine, theirs in zip(self.teacher.parameters(), self.model.parameters(), strict=True):
                mine.mul_(TEACHER_DECAY).add_(theirs, alpha=1 - TEACHER_DECAY)
        return total

    @torch.no_grad()
    def targets(self, rows: Sequence[int]) -> list[Tensor]:
        """Of each target layer: the teacher's instance-normalised feed-forward outputs at masked frames."""
        layers = self.teacher.encoder.layers[-self.num_targets :]
        caught: list[Tensor] = []
        hooks = [layer.feed_forward.register_forward_hook(lambda _m, _i, out: caught.append(out)) for layer in layers]
        self.teacher(**self.inputs(rows))
        for hook in hooks:
            hook.remove()
        return [
            torch.cat(
                [
                    F.instance_norm(out[: len(self.masks[row])].T[None])[0].T[self.masks[row]]
                    for out, row in zip(outs, rows, strict=True)
                ]
            )
            for outs in caught
        ]


# ---------------------------------------------------------------------------------------------------- measures


def differences(ours: Ours, peer: Peer) -> dict[str, float]:
    """How far our outputs and gradients (over the largest of each parameter) are from the peer's without padding."""
    alone = peer.forward(padded=False)
    found = {
        "output": float((ours.forward() - alone).abs().max()),
        "output of theirs, padded": float((peer.forward(padded=True) - alone).abs().max()),
    }
    ours.train()
    peer.train(padded=False)
    theirs = {name: parameter.grad for name, parameter in peer.model.named_parameters()}
    worst = 0.0
    for name, parameter in ours.encoder.named_parameters():
        wanted = torch.cat([theirs[their_name] for their_name in transformers_names(name)])
        assert parameter.grad is not None
        # Of q, k and v each for itself: a key's bias has no gradient but rounding, which is left out.
        for mine, other in zip(parameter.grad.chunk(3), wanted.chunk(3), strict=True):
            if float(other.abs().max()) > 1e-4 * float(wanted.abs().max()):
                worst = max(worst, float((mine - other).abs().max() / other.abs().max()))
    found["gradient, relative"] = worst
    peer.model.zero_grad(set_to_none=True)
    ours.engine.zero_grad(set_to_none=True)
    return found


def seconds_of(work: Callable[[], Any], device: str) -> float:
    """Process CPU time of a call; on a GPU, wall time until it is done."""
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def compare(
    size: str, batch: Batch, rounds: int, rows: Sequence[str], device: str, precision: str
) -> dict[str, float]:
    """Print the table of one size and return its ratios."""
    ours = Ours(size, batch, device, precision)
    peer = Peer(ours)
    shown = ", ".join(f"{name} {value:.1e}" for name, value in differences(ours, peer).items())
    print(f"\n{size}: largest differences to transformers without padding: {shown}", flush=True)
    ratios: dict[str, float] = {}
    clock = "CPU s" if device == "cpu" else "s"
    print(f"{'':>20} {'ours':>9} {'padded':>9} {'single':>9}  {clock};   ours audio-s/s;  ratios (each round)")
    for row in rows:
        contenders: dict[str, Callable[[], Any]] = {
            "ours": getattr(ours, row),
            "padded": lambda row=row: getattr(peer, row)(padded=True),
            "single": lambda row=row: getattr(peer, row)(padded=False),
        }
        if row == "dinosr_step":
            # Optimizer and teacher are made in the first one. Both teachers are still their students there.
            first = ours.dinosr_step(), peer.dinosr_step(padded=False)
            print(f"{'':>20} first DinoSR loss: ours {first[0]:.6f}, theirs {first[1]:.6f}")
        times: dict[str, list[float]] = {name: [] for name in contenders}
        if device != "cpu":
            for work in contenders.values():
                work()
        for _ in range(rounds):
            for name, work in contenders.items():
                times[name].append(seconds_of(work, device))
        medians = {name: statistics.median(values) for name, values in times.items()}
        label = row if (row, size) == ("dinosr_step", "base") else f"{row}_{size}"
        line = f"{label:>20} " + " ".join(f"{medians[name]:9.{2 if device == 'cpu' else 4}f}" for name in contenders)
        line += f"          {batch.seconds / medians['ours']:6.2f}        "
        for name, suffix in (("padded", ""), ("single", "_vs_single")):
            each = [theirs / mine for mine, theirs in zip(times["ours"], times[name], strict=True)]
            ratios[label + suffix] = round(statistics.median(each), 2)
            line += f" {ratios[label + suffix]:.2f} ({', '.join(f'{ratio:.2f}' for ratio in each)})"
        print(line, flush=True)
        for module in (ours.engine, peer.model):
            module.zero_grad(set_to_none=True)
    return ratios


def show_padding() -> None:
    """Print what padding costs utterances of 2 to 16 s, by how batches are made."""
    lengths = np.random.default_rng(0).uniform(2, 16, 32_768)

    def waste(ordered: Any, size: int) -> float:
        batches = ordered.reshape(-1, size)
        return float(1 - batches.sum() / (batches.max(1) * size).sum())

    pools = np.sort(lengths.reshape(-1, 1024), axis=1)
    for size in (4, 8, 32):
        print(
            f"padding, batches of {size}: {waste(lengths, size):.1%} at random, {waste(pools, size):.1%} of sorted "
            "pools of 1024, none packed"
        )


def peak_gib(variant: str, seconds: float) -> None:
    """Make one base-size DinoSR update after another and print the process' peak memory."""
    batch = draw_batch(seconds)
    ours = Ours("base", batch)
    start = time.process_time()
    if variant.startswith("ours"):
        ours.encoder.checkpointing = variant == "ours_checkpointed"
        for _ in range(2):
            ours.dinosr_step()
    else:
        peer = Peer(ours)
        del ours
        for _ in range(2):
            peer.dinosr_step(padded=variant == "padded")
    # Not getrusage: a child inherits its parent's maximum.
    (line,) = re.findall(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    peak = int(line) / 2**20
    print(f"{variant:>18}: {peak:.2f} GiB, {(time.process_time() - start) / 2:.1f} CPU s an update", flush=True)


def show_memory(variants: Sequence[str], seconds: float) -> None:
    """Print the peak memory of a process that makes base-size updates, for each of the variants."""
    found = draw_batch(seconds).seconds
    print(f"peak memory of a base-size DinoSR update, {found:.1f} s of audio, AdamW and teacher included", flush=True)
    for variant in variants:
        subprocess.run([sys.executable, __file__, "--child", variant, "--seconds", str(seconds)], check=True)


def run_apart(sizes: Sequence[str]) -> None:
    """Each size in a process of its own, in which no larger one has left memory behind; then one line of all ratios."""
    given = [word for word in sys.argv[1:] if word not in ("--sizes", *sizes)]
    ratios: dict[str, float] = {}
    for size in sizes:
        command = [sys.executable, "-u", __file__, *given, "--sizes", size]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    ratios |= json.loads(line)["ratios"]
                else:
                    print(line, end="", flush=True)
        if process.returncode:
            raise SystemExit(process.returncode)
    print(json.dumps({"benchmark": "pretraining", "ratios": ratios}))


def main() -> None:
    """Run the contenders in turn and print the tables and the JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=sorted(SHAPES), default=["base", "small"])
    parser.add_argument("--rows", nargs="+", choices=("forward", "train", "dinosr_step"), default=None)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=None, help="of audio in a batch, at least; default 26")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--memory", action="store_true", help="peak memory alone, on 87 s; each in a child process")
    parser.add_argument("--only", choices=VARIANTS, nargs="+", help="with --memory: these; default all of ours")
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        peak_gib(options.child, options.seconds)
        return
    if options.memory:
        show_memory(options.only or VARIANTS[:2], options.seconds or 86.0)
        return
    if len(options.sizes) > 1:
        run_apart(options.sizes)
        return
    batch = draw_batch(options.seconds or 26.0)
    longest = max(batch.num_samples) * len(batch.num_samples) / SAMPLE_RATE
    print(
        f"torch {torch.__version__}, one thread, {options.device}, {options.precision}; "
        f"{len(batch.num_samples)} utterances, {batch.seconds:.1f} s, "
        f"{longest:.1f} s padded ({1 - batch.seconds / longest:.0%} padding); medians of {options.rounds} rounds"
    )
    show_padding()
    ratios: dict[str, float] = {}
    (size,) = options.sizes
    rows = options.rows or ["forward", "train", *(["dinosr_step"] if size == "base" else [])]
    ratios |= compare(size, batch, options.rounds, rows, options.device, options.precision)
    if size == "base" and not options.rows and options.device == "cpu":
        print()
        show_memory(VARIANTS, options.seconds or 26.0)
    print(json.dumps({"benchmark": "pretraining", "ratios": ratios}))


if __name__ == "__main__":
    main()
