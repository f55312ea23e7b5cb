"""The step `pretrain`."""

from sonorant.config import PretrainConfig
from sonorant.steps.step import In, Metrics, Out, Scratch, step


@step
def pretrain(config: PretrainConfig, *, corpus: In, units: In, encoder: Out, scratch: Scratch) -> Metrics:
    """Train the shared encoder with the tasks that the recipe gives a weight."""
    import torch

    from sonorant.models.encoder import Encoder
    from sonorant.steps.fitting import fit
    from sonorant.training.distributed import joined_ranks

    with joined_ranks() as ranks:
        torch.manual_seed(config.seed)
        return fit(config, Encoder(config.encoder), corpus, units, encoder, scratch, ranks)
