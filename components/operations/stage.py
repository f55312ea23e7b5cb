"""The canary's candidate as a Kubeflow component."""

from kfp import dsl
from kfp.dsl import Model, Output

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def stage(store: str, candidate: str, model: Output[Model]) -> str:
    """Fetch the candidate, see that it works, and show it to the canary; its digest."""
    from pathlib import Path

    from sonorant.release.canary import stage

    return stage(store, candidate, Path(model.path))
