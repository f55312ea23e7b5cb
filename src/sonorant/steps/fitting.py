"""What the steps that train have in common: from data and an encoder to a trained encoder on disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from sonorant.config import AlignConfig, GroundConfig, TrainConfig
from sonorant.data.batching import Loader
from sonorant.data.corpus import Utterance, read_corpus
from sonorant.data.pairs import Pictures
from sonorant.data.units import UnitStore
from sonorant.models.encoder import Encoder
from sonorant.models.grounding import save_grounder
from sonorant.models.huggingface import save_encoder, to_transformers
from sonorant.steps.pictures import open_pictures
from sonorant.training.distributed import Ranks
from sonorant.training.engine import Engine, build_engine
from sonorant.training.loop import train


def fit(
    config: TrainConfig, encoder: Encoder, corpus: Path, units: Path | None, out: Path, scratch: Path, ranks: Ranks
) -> dict[str, float]:
    """Train an encoder on a corpus and write it to `out`; returns the last journal entry's numbers.

    Raises ValueError where a task lacks what it needs of the corpus or the units.
    """
    utterances = read_corpus(corpus, split="train")
    store = UnitStore(units) if units is not None else None
    engine = build_engine(config, encoder, store.num_units if store else 0)
    tasks = {name: engine.task(name) for name in engine.tasks}
    wishing = sorted(name for name, task in tasks.items() if task.needs_units)
    if wishing and store is None:
        raise ValueError(
            f"{config.step}: found no units, wanted some for the task {wishing[0]}: give --units or set its weight to 0"
        )
    loader = Loader(
        utterances,
        store if wishing else None,
        config.batching,
        config.masking,
        config.seed,
        rank=ranks.rank,
        num_ranks=ranks.count,
        perturbation=config.perturbation,
        halves=config.utterance if "utterance" in tasks else None,
        twins=config.alignment if isinstance(config, AlignConfig) and "alignment" in tasks else None,
        pictures=pictures_for(config, engine, utterances, scratch, ranks),
        is_standardised=encoder.config.standardised,
        pin=ranks.device.type == "cuda",
    )
    metrics = train(config, engine, loader, scratch, ranks)
    if ranks.is_first:
        write_trained(config, engine, out)
        shutil.copy(scratch / "journal.jsonl", out / "journal.jsonl")
    return metrics


def pictures_for(
    config: TrainConfig, engine: Engine, utterances: list[Utterance], scratch: Path, ranks: Ranks
) -> Pictures | None:
    """The utterances' images as the recipe's image side reads them; None where no task looks at any."""
    if not isinstance(config, GroundConfig) or engine.grounder is None:
        return None
    pictures = open_pictures(utterances, config.grounding.image, scratch if ranks.is_first else None)
    if not len(pictures):
        raise ValueError(
            f"ground: found no image among {len(utterances)} training utterances, wanted some: prepare a source "
            "with images, or take the encoder as it is (takes.publish: encoder)"
        )
    return pictures


def write_trained(config: TrainConfig, engine: Engine, out: Path) -> None:
    """The encoder in transformers' format, the tasks' heads, and a teacher and a side of images where there are any."""
    save_encoder(engine.encoder, out)
    parts: dict[str, Any] = {name: engine.task(name) for name in engine.tasks}
    if engine.quantizer is not None:
        parts["quantizer"] = engine.quantizer
    heads = {f"{name}.{key}": value for name, part in parts.items() for key, value in state_of(part)}
    save_file(heads, out / "heads.safetensors")
    if engine.grounder is not None:
        save_grounder(engine.grounder, out)
    if engine.teacher is not None:
        engine.teacher.take_over(engine.encoder, config.num_updates)
        save_file(to_transformers(engine.encoder), out / "teacher.safetensors", metadata={"format": "pt"})


def state_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a head is made of, without what it only watched."""
    for name, value in chain(module.named_parameters(), module.named_buffers()):
        if name != "window":
            yield name, value.detach().contiguous().cpu()
