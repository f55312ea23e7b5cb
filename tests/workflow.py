"""The workflow as the steps' signatures make it: the oracle that dvc.yaml and the compiled pipelines are held to."""

from __future__ import annotations

from dataclasses import dataclass

from sonorant.steps import STEPS

ROUND = ("cluster", "pretrain")


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
