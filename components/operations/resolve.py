"""What a reference stands for, as a Kubeflow component."""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def resolve(store: str, reference: str) -> str:
    """The digest that a reference such as model@production stands for, or nothing."""
    from sonorant.release.service import resolve

    return resolve(store, reference)
