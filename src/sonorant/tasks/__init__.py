"""What pulls on the encoder: one file per task."""

from __future__ import annotations

from collections.abc import Callable

from sonorant.config import PretrainConfig
from sonorant.tasks.task import Task
from sonorant.tasks.teacher import Regression
from sonorant.tasks.units import Units


def build_tasks(config: PretrainConfig, num_units: int) -> dict[str, Task]:
    """A task for every name that has a weight above zero in some phase."""
    dim = config.encoder.dim
    builders: dict[str, Callable[[], Task]] = {
        "units": lambda: Units(dim, num_units, config.units),
        "teacher": lambda: Regression(dim, config.teacher),
    }
    used = {name for phase in config.phases for name, weight in phase.weights.items() if weight}
    return {name: build() for name, build in builders.items() if name in used}
