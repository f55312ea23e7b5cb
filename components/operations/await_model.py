"""Waiting for a service as a Kubeflow component."""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def await_model(limits: dict, url: str, digest: str):
    """Wait until the service reports the model."""
    from sonorant.release.canary import await_model

    await_model(limits, url, digest)
