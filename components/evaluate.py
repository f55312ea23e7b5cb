"""The evaluate step as a Kubeflow component."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Dataset, Input, Metrics, Model, Output

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate(
    config: dict,
    corpus: Input[Dataset],
    model: Input[Model],
    report: Output[Artifact],
    metrics: Output[Metrics],
    page: Output[HTML],
    previous: Input[Model] | None = None,
):
    """Measure the published model against its baselines."""
    from sonorant.steps import evaluate
    from sonorant.steps.component import run

    run(evaluate, config, metrics, corpus=corpus, model=model, report=report, previous=previous, page=page)
