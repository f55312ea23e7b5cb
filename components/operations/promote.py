"""The promotion as a Kubeflow component."""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def promote(limits: dict, store: str, digest: str, url: str):
    """Put the model into production and wait until it serves; take it back where it does not."""
    from sonorant.release.canary import promote

    promote(limits, store, digest, url)
