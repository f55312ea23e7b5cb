"""The step `align`."""

from sonorant.config import AlignConfig
from sonorant.steps.step import In, Metrics, Out, Scratch, step


@step
def align(
    config: AlignConfig, *, corpus: In, encoder: In, units: In | None = None, aligned: Out, scratch: Scratch
) -> Metrics:
    """Fine-tune the top layers until an utterance and its perturbed copy say the same, frame by frame."""
    import torch

    from sonorant.models.grounding import carry_grounder
    from sonorant.models.huggingface import load_encoder
    from sonorant.steps.fitting import fit
    from sonorant.training.distributed import joined_ranks

    with joined_ranks() as ranks:
        torch.manual_seed(config.seed)
        student = load_encoder(encoder)[0]
        # Twins whose layers were dropped apart would differ by that.
        student.context.layer_drop = 0.0
        num_still = student.config.num_layers - (config.num_trained_layers or student.config.num_layers)
        if ranks.is_first:
            carry_grounder(encoder, aligned, num_still)
        return fit(config, student, corpus, units, aligned, scratch, ranks)
