"""The prepare step as a Kubeflow component."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Output

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def prepare(
    config: dict,
    corpus: Output[Dataset],
    metrics: Output[Metrics],
    shares: Input[list[Dataset]] | None = None,
):
    """Check and resample the speech of all sources, and write a corpus in splits, speakers or images apart."""
    from sonorant.steps import prepare
    from sonorant.steps.component import run

    run(prepare, config, metrics, corpus=corpus, shares=shares)
