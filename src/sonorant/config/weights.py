"""How hard each task pulls, and when."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from sonorant.config.section import Section, Share

TaskName = Literal[
    "units",
    "teacher",
    "codebooks",
    "contrast",
    "diversity",
    "magnitude",
    "waveform",
    "spectrum",
    "utterance",
    "grounding",
    "alignment",
]
NonNegative = Annotated[float, Field(ge=0)]


class LinearWeight(Section):
    """A weight that goes from `start` to `end` over its phase."""

    start: NonNegative
    end: NonNegative

    def weight(self, done: float) -> float:
        """The weight when this share of the phase is done."""
        return self.start + done * (self.end - self.start)


class StepWeight(Section):
    """A weight that jumps: values[i + 1] holds from share `at[i]` of its phase on."""

    values: tuple[NonNegative, ...] = Field(min_length=2)
    at: tuple[Share, ...]

    @model_validator(mode="after")
    def _is_a_staircase(self) -> Self:
        if len(self.values) != len(self.at) + 1 or list(self.at) != sorted(self.at):
            raise ValueError(
                f"weight has values {self.values} at {self.at}, wanted rising shares and one value more: change one"
            )
        return self

    def weight(self, done: float) -> float:
        """The weight when this share of the phase is done."""
        return self.values[sum(done >= share for share in self.at)]


def kind_of_weight(value: Any) -> str:
    """Which of the three a value is meant to be, so that its faults alone are told."""
    if isinstance(value, LinearWeight | StepWeight):
        return "line" if isinstance(value, LinearWeight) else "steps"
    return "number" if not isinstance(value, dict) else "steps" if {"values", "at"} & set(value) else "line"


Weight = Annotated[
    Annotated[NonNegative, Tag("number")] | Annotated[LinearWeight, Tag("line")] | Annotated[StepWeight, Tag("steps")],
    Discriminator(kind_of_weight),
]


class Phase(Section):
    """A share of the updates with one row of task weights. A weight of zero turns a task off."""

    share: float = Field(1.0, gt=0, le=1)
    weights: dict[TaskName, Weight]
    reset_optimizer: bool = Field(
        False, description="at its start the optimizer forgets, and the learning rate's schedule begins again"
    )

    @model_validator(mode="after")
    def _trains_something(self) -> Self:
        if not self.tasks:
            raise ValueError(f"weights {self.weights} are all zero: give at least one task a weight above 0")
        # Between its start and its jumps a weight is zero throughout or nowhere, but for where a line ends.
        jumps = {at for weight in self.weights.values() if isinstance(weight, StepWeight) for at in weight.at}
        if not all(any(self.weights_at(done).values()) for done in {0.0, *jumps} - {1.0}):
            raise ValueError("weights are all zero for a part of the phase: end the phase there or raise one")
        return self

    @property
    def tasks(self) -> frozenset[str]:
        """Those with a weight above zero at some time."""
        peaks = {
            name: max(weight.start, weight.end)
            if isinstance(weight, LinearWeight)
            else max(weight.values)
            if isinstance(weight, StepWeight)
            else weight
            for name, weight in self.weights.items()
        }
        return frozenset(name for name, peak in peaks.items() if peak)

    def weights_at(self, done: float) -> dict[str, float]:
        """Every task's weight when this share of the phase is done."""
        return {
            name: weight if isinstance(weight, float | int) else weight.weight(done)
            for name, weight in self.weights.items()
        }


class BalanceConfig(Section):
    """Weights rescaled so that each says how hard its task pulls on the shared encoder: norm of weight · gradient."""

    at: int | None = Field(None, ge=1, description="once after so many updates; None: never")
    every: int = Field(0, ge=0, description="and again after every so many; 0: only once")
