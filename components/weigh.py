"""The weigh step as a Kubeflow component."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Input, Metrics, Output

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def weigh(
    config: dict,
    reports: Input[list[Artifact]],
    findings: Output[Artifact],
    metrics: Output[Metrics],
    page: Output[HTML],
    before: Input[Artifact] | None = None,
):
    """Lay the reports of a study's arms and seeds side by side and say of each claim what they show."""
    from sonorant.steps import weigh
    from sonorant.steps.component import run

    run(weigh, config, metrics, reports=reports, findings=findings, before=before, page=page)
