"""The canary's trial as a Kubeflow component."""

from kfp import dsl
from kfp.dsl import Input, Metrics, Model, Output

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def check(
    limits: dict,
    speech: str,
    model: Input[Model],
    canary: str,
    production: str,
    incumbent: str,
    metrics: Output[Metrics],
):
    """Send the same speech to the canary and to production, and compare."""
    from pathlib import Path

    from sonorant.release.canary import check

    metrics.metadata.update(check(limits, Path(speech), Path(model.path), canary, production, incumbent))
