"""The quality gate as a Kubeflow component."""

from kfp import dsl
from kfp.dsl import Artifact, Input, Metrics, Output

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def judge(limits: dict, report: Input[Artifact], metrics: Output[Metrics]) -> str:
    """Say "pass" where the model is not worse than the one in service, else "fail"."""
    from pathlib import Path

    from sonorant.release.gate import judge

    verdict = judge(limits, Path(report.path))
    metrics.metadata.update({"verdict": verdict.word, "reason": verdict.reason, **verdict.scores})
    return verdict.word
