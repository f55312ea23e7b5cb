"""A study: arms that differ in what is named, and what a paper says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from sonorant.config.measure import EvaluateConfig
from sonorant.config.prepare import PrepareConfig
from sonorant.config.section import Section


class Arm(Section):
    """What one arm changes of the parameters that all have in common."""

    title: str = Field("", description="as the page calls it; empty: as its key")
    recipe: Path | None = Field(None, description="a parameter file laid over the common ones, beside the study's file")
    params: dict[str, Any] = Field({}, description="sections laid over that, key by key")


class Claim(Section):
    """Of two arms one is better."""

    says: str
    better: str
    than: str
    by: tuple[str, ...] = Field(min_length=1, description="scores, as metrics.json calls them; the first one decides")


class StudyConfig(Section):
    """What is asked, which arms answer it, and what is to be looked at."""

    question: str
    paper: str = Field("", description="whose claim it is")
    begins: Literal["pretrain", "ground"] = Field("pretrain", description="the step that trains from nothing")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0, 1, 2), min_length=1)
    arms: dict[str, Arm] = Field(min_length=1)
    measures: tuple[str, ...] = Field(min_length=1, description="columns of the table")
    claims: tuple[Claim, ...] = Field(min_length=1)
    published: dict[str, dict[str, float]] = Field({}, description="by arm, the paper's numbers under their names")

    @model_validator(mode="after")
    def _arms_are_there(self) -> Self:
        named = {name for claim in self.claims for name in (claim.better, claim.than)} | set(self.published)
        if unknown := sorted(named - set(self.arms)):
            raise ValueError(f"found the arms {unknown} in claims or published, wanted some of {sorted(self.arms)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"found the seeds {self.seeds}, wanted each once")
        return self


class ElsewhereConfig(Section):
    """Another corpus, on which every model of a study is measured too."""

    prepare: PrepareConfig
    evaluate: EvaluateConfig = EvaluateConfig()
