"""The step `pretrain`."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sonorant.config import PretrainConfig
from sonorant.steps.step import In, Metrics, Out, Scratch, step

if TYPE_CHECKING:
    from torch import Tensor, nn


@step
def pretrain(config: PretrainConfig, *, corpus: In, units: In, encoder: Out, scratch: Scratch) -> Metrics:
    """Train the shared encoder with the tasks that the recipe gives a weight."""
    import shutil

    import torch
    from safetensors.torch import save_file

    from sonorant.data.batching import Loader
    from sonorant.data.corpus import read_corpus
    from sonorant.data.units import UnitStore
    from sonorant.models.huggingface import save_encoder, to_transformers
    from sonorant.training.distributed import joined_ranks
    from sonorant.training.engine import build_engine
    from sonorant.training.loop import train

    with joined_ranks() as ranks:
        torch.manual_seed(config.seed)
        utterances = read_corpus(corpus, split="train")
        store = UnitStore(units)
        engine = build_engine(config, store.num_units)
        student, tasks = engine.encoder, {name: engine.task(name) for name in engine.tasks}
        labels = store if any(task.needs_units for task in tasks.values()) else None
        loader = Loader(
            utterances,
            labels,
            config.batching,
            config.masking,
            config.seed,
            rank=ranks.rank,
            num_ranks=ranks.count,
            perturbation=config.perturbation,
            halves=config.utterance if "utterance" in tasks else None,
            pin=ranks.device.type == "cuda",
        )
        metrics = train(config, engine, loader, scratch, ranks)
        if ranks.is_first:
            save_encoder(student, encoder)
            heads = {f"{name}.{key}": value for name, task in tasks.items() for key, value in state_of(task)}
            if engine.quantizer is not None:
                heads |= {f"quantizer.{key}": value for key, value in state_of(engine.quantizer)}
            save_file(heads, encoder / "heads.safetensors")
            if engine.teacher is not None:
                engine.teacher.take_over(student, config.num_updates)
                save_file(to_transformers(student), encoder / "teacher.safetensors", metadata={"format": "pt"})
            shutil.copy(scratch / "journal.jsonl", encoder / "journal.jsonl")
    return metrics


def state_of(module: "nn.Module") -> "Iterator[tuple[str, Tensor]]":
    """What a head is made of, without what it only watched."""
    from itertools import chain

    for name, value in chain(module.named_parameters(), module.named_buffers()):
        if name != "window":
            yield name, value.detach().contiguous().cpu()
