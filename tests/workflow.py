"""The workflow as the steps' signatures make it: the oracle that dvc.yaml and the compiled pipelines are held to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from sonorant.config import Takes
from sonorant.steps import STEPS

ROUND = ("cluster", "pretrain")
TINY = [
    "prepare.sources=[{kind: synthetic, num_utterances: 36, num_speakers: 9, voice: tones,"
    " dev_share: 0.25, test_share: 0.35}]",
    "cluster.num_units=8",
    "cluster.num_restarts=1",
    "pretrain.num_updates=2",
    "pretrain.encoder={stem_channels: 16, dim: 32, num_layers: 3, num_heads: 2, ffn_dim: 64}",
    "pretrain.batching={batch_seconds: 4.0, crop_seconds: 2.0}",
    "ground.num_updates=2",
    "ground.batching={batch_seconds: 8.0, crop_seconds: 2.0}",
    "align.num_updates=2",
    "align.batching={batch_seconds: 4.0, crop_seconds: 2.0}",
    "publish.num_units=8",
    "publish.num_restarts=1",
    "evaluate.num_examples=1",
]
"""What makes params.yaml a workflow of seconds."""
ALL = Takes(align="grounded", publish="aligned")
"""As params.yaml has it: every step runs."""


class Made(NamedTuple):
    """An artifact, and the task that wrote it."""

    step: str
    round: int
    artifact: str


@dataclass(frozen=True)
class Task:
    """A step in a round, and what it takes for each of its inputs."""

    step: str
    round: int
    reads: dict[str, Made]


def workflow(num_rounds: int, takes: Takes = ALL) -> list[Task]:
    """All tasks in their order: each reads what was written last under the names of its inputs, but for whose encoder
    `takes` gives it."""
    idle = {"ground", "align"} - set(takes.steps)
    order = [name for name in STEPS if name not in idle]
    chosen = takes.model_dump()
    first, last = order.index(ROUND[0]), order.index(ROUND[-1]) + 1
    assert tuple(order[first:last]) == ROUND
    rounds = [(name, number) for number in range(1, num_rounds + 1) for name in ROUND]
    made: dict[str, Made] = {}
    tasks = []
    for name, number in [*((n, 1) for n in order[:first]), *rounds, *((n, 1) for n in order[last:])]:
        step = STEPS[name]
        wanted = {given: chosen.get(name, given) if given == "encoder" else given for given in step.inputs}
        tasks.append(Task(name, number, {given: made[a] for given, a in wanted.items() if a in made}))
        assert set(step.inputs) - step.optional <= set(tasks[-1].reads)
        made |= {artifact: Made(name, number, artifact) for artifact in step.outputs}
    return tasks
