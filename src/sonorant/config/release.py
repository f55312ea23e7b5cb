"""When a model may go into service: against the one that is there, measured and then tried out."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sonorant.config.section import Section, Share


class GateConfig(Section):
    """How much worse than the model in service a new one may measure and still replace it.

    The defaults are twice the standard deviation over seeds of one recipe (PNMI .004, ABX error .005, LOG.md): what
    differs by less may have been the seed's luck. `evidence` is of the luck of the test's utterances.
    """

    max_pnmi_loss: Share = Field(0.01, description="by how much PNMI may be lower")
    max_abx_rise: Share = Field(0.01, description="by how much each ABX error may be higher")
    evidence: Literal["interval", "value"] = Field(
        "interval",
        description="what it takes to fail. interval: all of the interval of 95 % of the difference, over draws of the "
        "utterances that both were measured on, is worse than that; few utterances show little, so little fails. "
        "value: the difference itself is",
    )


class CanaryConfig(Section):
    """What the canary must stand before production gets its model."""

    num_requests: int = Field(30, ge=1, le=10_000, description="to each of the two services, one at a time")
    max_seconds: float = Field(30.0, gt=0, le=600, description="audio of one request; longer utterances are left out")
    min_equal_units: Share = Field(
        0.999,
        description="of the units the model makes of the same audio here: other cores, other rounding",
    )
    max_slowdown: float = Field(1.5, ge=1, description="times production's 95th percentile of latency")
    slack_ms: float = Field(50.0, ge=0, description="of latency beyond that: networks and neighbours are restless")
    wait_seconds: float = Field(600.0, gt=0, le=86_400, description="for a service to report the model it was given")
    num_reports: int = Field(
        5, ge=1, le=1000, description="answers in a row that must name the model: a service may have several pods"
    )
