"""The release as a Kubeflow component."""

from kfp import dsl
from kfp.dsl import Artifact, Input, Model

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def release(store: str, alias: str, model: Input[Model], report: Input[Artifact]) -> str:
    """Put a model and its report into the store under an alias; its digest."""
    from pathlib import Path

    from sonorant.release.service import release

    return release(store, alias, Path(model.path), Path(report.path))
