"""The convert step as a Kubeflow component."""

from kfp import dsl
from kfp.dsl import Dataset, Metrics, Output

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def convert(config: dict, share: Output[Dataset], metrics: Output[Metrics]):
    """Check and resample the speech of one part of all rows, for `prepare` to join."""
    from sonorant.steps import convert
    from sonorant.steps.component import run

    run(convert, config, metrics, share=share)
