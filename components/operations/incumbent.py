"""The model in service as a Kubeflow component."""

from kfp import dsl
from kfp.dsl import Model, Output

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def incumbent(store: str, reference: str, model: Output[Model]):
    """The model in service, or an artifact that says there is none."""
    from pathlib import Path

    from sonorant.release.service import find_incumbent

    model.metadata["digest"] = find_incumbent(store, reference, Path(model.path))
