"""What is done with a model once it is measured, as Kubeflow components, one file an operation."""

from components.operations.await_model import await_model
from components.operations.check import check
from components.operations.conclude import conclude
from components.operations.end_canary import end_canary
from components.operations.incumbent import incumbent
from components.operations.judge import judge
from components.operations.promote import promote
from components.operations.release import release
from components.operations.resolve import resolve
from components.operations.stage import stage

__all__ = [
    "await_model",
    "check",
    "conclude",
    "end_canary",
    "incumbent",
    "judge",
    "promote",
    "release",
    "resolve",
    "stage",
]
