"""The exit handler as a Kubeflow component."""

from kfp import dsl
from kfp.dsl import PipelineTaskFinalStatus

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def conclude(pipeline: str, run: str, status: PipelineTaskFinalStatus):
    """Say how the run ended, on one JSON line and to $SONORANT_WEBHOOK."""
    from sonorant.release.announcement import conclude

    conclude(status, pipeline, run)
