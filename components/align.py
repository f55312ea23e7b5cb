"""The align step as a Kubeflow component."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def align(
    config: dict,
    corpus: Input[Dataset],
    encoder: Input[Model],
    aligned: Output[Model],
    metrics: Output[Metrics],
    units: Input[Dataset] | None = None,
):
    """Fine-tune the top layers until an utterance and its perturbed copy say the same, frame by frame."""
    from sonorant.steps import align
    from sonorant.steps.component import run

    run(align, config, metrics, corpus=corpus, encoder=encoder, units=units, aligned=aligned)
