"""The workflow as the steps' signatures make it: the oracle that dvc.yaml and the compiled pipelines are held to."""

from __future__ import annotations

from dataclasses import dataclass

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
    "publish.num_units=8",
    "publish.num_restarts=1",
    "evaluate.num_examples=1",
]
"""What makes params.yaml a workflow of seconds."""


@dataclass(frozen=True)
class Task:
    """A step in a round, and which task wrote each artifact that it reads."""

    step: str
    round: int
    reads: dict[str, tuple[str, int]]


def workflow(num_rounds: int) -> list[Task]:
    """All tasks in their order: each reads what was written last under the names of its inputs."""
    order = list(STEPS)
    first, last = order.index(ROUND[0]), order.index(ROUND[-1]) + 1
    assert tuple(order[first:last]) == ROUND
    rounds = [(name, number) for number in range(1, num_rounds + 1) for name in ROUND]
    writers: dict[str, tuple[str, int]] = {}
    tasks = []
    for name, number in [*((n, 1) for n in order[:first]), *rounds, *((n, 1) for n in order[last:])]:
        step = STEPS[name]
        tasks.append(Task(name, number, {a: writers[a] for a in step.inputs if a in writers}))
        assert set(step.inputs) - step.optional <= set(tasks[-1].reads)
        writers |= dict.fromkeys(step.outputs, (name, number))
    return tasks
