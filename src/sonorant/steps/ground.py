"""The step `ground`."""

from sonorant.config import GroundConfig
from sonorant.steps.step import In, Metrics, Out, Scratch, step


@step
def ground(
    config: GroundConfig,
    *,
    corpus: In,
    encoder: In | None = None,
    units: In | None = None,
    grounded: Out,
    scratch: Scratch,
) -> Metrics:
    """Bring speech and the images it speaks of into one space, with the tasks of pretraining or without."""
    import torch

    from sonorant.models.encoder import Encoder
    from sonorant.models.huggingface import load_encoder
    from sonorant.steps.fitting import fit
    from sonorant.training.distributed import joined_ranks

    with joined_ranks() as ranks:
        torch.manual_seed(config.seed)
        if encoder is not None and config.encoder is None:
            student = load_encoder(encoder)[0]
        elif encoder is None and config.encoder is not None:
            student = Encoder(config.encoder)
        else:
            found, move = ("neither", "give") if encoder is None else ("both", "leave out")
            raise ValueError(
                f"ground: found {found} of --encoder and ground.encoder, wanted one, a trained encoder or the shape of "
                f"a new one: {move} one of them"
            )
        return fit(config, student, corpus, units, grounded, scratch, ranks)
