"""The step `pretrain`."""

from sonorant.config import PretrainConfig
from sonorant.steps.step import In, Metrics, Out, Scratch, step


@step
def pretrain(config: PretrainConfig, *, corpus: In, units: In, encoder: Out, scratch: Scratch) -> Metrics:
    """Train the shared encoder with the tasks that the recipe gives a weight."""
    import copy
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
            if engine.teacher is not None:
                teaching = copy.deepcopy(student)
                teaching.context = engine.teacher.context
                save_file(
                    to_transformers(teaching), encoder / "teacher.safetensors", metadata={"format": "pt"}
                )
            heads = {
                f"{name}.{key}": value.contiguous().cpu()
                for name, task in tasks.items()
                for key, value in task.state_dict().items()
                if key != "window"
            }
            if engine.quantizer is not None:
                heads |= {f"quantizer.{key}": value.cpu() for key, value in engine.quantizer.state_dict().items()}
            save_file(heads, encoder / "heads.safetensors")
            shutil.copy(scratch / "journal.jsonl", encoder / "journal.jsonl")
    return metrics
