"""The publish step as a Kubeflow component."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def publish(
    config: dict,
    corpus: Input[Dataset],
    encoder: Input[Model],
    model: Output[Model],
    metrics: Output[Metrics],
):
    """Choose a layer, fit its codebook, and write one folder that serves, measures and opens in
    transformers."""
    from sonorant.steps import publish
    from sonorant.steps.component import run

    run(publish, config, metrics, corpus=corpus, encoder=encoder, model=model)
