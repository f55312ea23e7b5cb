"""The canary's exit handler as a Kubeflow component."""

from kfp import dsl
from kfp.dsl import PipelineTaskFinalStatus

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def end_canary(store: str, pipeline: str, run: str, status: PipelineTaskFinalStatus):
    """Let the canary follow production again, and say how the run ended."""
    from sonorant.release.canary import end

    end(status, store, pipeline, run)
