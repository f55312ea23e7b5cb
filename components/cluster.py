"""The cluster step as a Kubeflow component."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def cluster(
    config: dict,
    corpus: Input[Dataset],
    units: Output[Dataset],
    metrics: Output[Metrics],
    encoder: Input[Model] | None = None,
):
    """Assign one of `num_units` k-means units to every frame."""
    from sonorant.steps import cluster
    from sonorant.steps.component import run

    run(cluster, config, metrics, corpus=corpus, units=units, encoder=encoder)
