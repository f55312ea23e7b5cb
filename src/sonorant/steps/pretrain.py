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
    from sonorant.models.encoder import Encoder
    from sonorant.models.huggingface import save_encoder, to_transformers
    from sonorant.models.teacher import Teacher
    from sonorant.tasks import build_tasks
    from sonorant.training.distributed import joined_ranks
    from sonorant.training.engine import Engine
    from sonorant.training.loop import train

    with joined_ranks() as ranks:
        torch.manual_seed(config.seed)
        utterances = read_corpus(corpus, split="train")
        store = UnitStore(units)
        student = Encoder(config.encoder)
        tasks = build_tasks(config, store.num_units)
        has_teacher = any("teacher" in task.views for task in tasks.values())
        engine = Engine(student, tasks, Teacher(student.context, config.teacher) if has_teacher else None)
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
            }
            save_file(heads, encoder / "heads.safetensors")
            shutil.copy(scratch / "journal.jsonl", encoder / "journal.jsonl")
    return metrics
