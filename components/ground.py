"""The ground step as a Kubeflow component."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def ground(
    config: dict,
    corpus: Input[Dataset],
    grounded: Output[Model],
    metrics: Output[Metrics],
    encoder: Input[Model] | None = None,
    units: Input[Dataset] | None = None,
):
    """Bring speech and the images it speaks of into one space, with the tasks of pretraining or without."""
    from sonorant.steps import ground
    from sonorant.steps.component import run

    run(ground, config, metrics, corpus=corpus, encoder=encoder, units=units, grounded=grounded)
