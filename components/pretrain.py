"""The pretrain step as a Kubeflow component."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def pretrain(
    config: dict,
    corpus: Input[Dataset],
    units: Input[Dataset],
    encoder: Output[Model],
    metrics: Output[Metrics],
):
    """Train the shared encoder with the tasks that the recipe gives a weight."""
    from sonorant.steps import pretrain
    from sonorant.steps.component import run

    run(pretrain, config, metrics, corpus=corpus, units=units, encoder=encoder)
