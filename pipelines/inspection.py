"""What became of a run: its state, its tasks, their times and faults."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime

import kfp_server_api

from pipelines.connection import connected, flatten

ENDED = {"SUCCEEDED": 0, "SKIPPED": 0, "FAILED": 1, "CANCELED": 1}
"""States that a run stays in, and the exit status that tells them."""
GOING_ON = 3
"""The exit status of a run that has not ended."""
INNER = ("root", "executor")
"""What Kubeflow lists beside the tasks: the graph itself and the pods of its own, which also end in -driver."""
MAX_FAULTS = 5

Run = kfp_server_api.V2beta1Run


def find_run(run: str, *, host: str, namespace: str | None = None, token: str | None = None) -> Run:
    """The run of that id, or the `latest` one; ValueError where there is none."""
    advice = "check the id, --namespace and the token's rights"
    with connected(host, wanted=f"the run {run}", advice=advice, namespace=namespace, token=token) as client:
        if run != "latest":
            return client.get_run(run)
        found = client.list_runs(page_size=1, sort_by="created_at desc", namespace=namespace).runs
        if not found:
            raise ValueError(f"--host {host}: found no run, wanted one: `submit` starts one")
        return client.get_run(found[0].run_id)


def await_run(
    run: str, seconds: float, every: float, *, host: str, namespace: str | None = None, token: str | None = None
) -> Run:
    """The run when it has ended, or as it is after so many seconds; asked `every` so many.

    A host that is away for a moment is asked again; ValueError where it stays away.
    """
    deadline, num_faults = time.monotonic() + seconds, 0
    while True:
        try:
            found = find_run(run, host=host, namespace=namespace, token=token)
        except ValueError:
            num_faults += 1
            if num_faults == MAX_FAULTS or time.monotonic() > deadline:
                raise
        else:
            # The latest run of now, not of then.
            run, num_faults = found.run_id, 0
            if found.state in ENDED or time.monotonic() > deadline:
                return found
        time.sleep(every)


def describe_run(run: Run) -> Iterator[str]:
    """The run on one line, and one for each of its tasks."""
    yield " ".join(f"{run.display_name}, {run.run_id}: {tell(run)}".split())
    tasks = (run.run_details.task_details if run.run_details else None) or []
    shown = [task for task in tasks if task.state == "FAILED" or not is_inner(task.display_name)]
    width = max((len(task.display_name) for task in shown), default=0)
    for task in sorted(shown, key=lambda task: task.start_time or datetime.max.replace(tzinfo=UTC)):
        yield f"  {task.display_name:{width}}  {tell(task)}"


def is_inner(name: str) -> bool:
    """Whether Kubeflow listed the task for itself."""
    return name in INNER or name.endswith("-driver")


def tell(item: Run | kfp_server_api.V2beta1PipelineTaskDetail) -> str:
    """State, duration, and where it failed the fault or the pod whose log tells it."""
    is_run = isinstance(item, Run)
    start, end = (item.created_at, item.finished_at) if is_run else (item.start_time, item.end_time)
    words = [item.state or "PENDING"]
    # Kubeflow writes 1970 for times that have not come.
    if start and start.year > 1970:
        ended = end if end and end >= start else datetime.now(UTC)
        words.append(show_seconds((ended - start).total_seconds()))
    if item.error and item.error.message:
        words.append(flatten(item.error.message))
    elif item.state == "FAILED" and not is_run:
        pods = [task.pod_name for task in item.child_tasks or [] if task.pod_name]
        pod = item.pod_name or (pods[-1] if pods else None)
        words.append(f"see kubectl logs {pod}" if pod else "see its log")
    return ", ".join(words)


def show_seconds(seconds: float) -> str:
    """Hours, minutes and seconds, the first two where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = ((hours, "h"), (minutes, "min"), (rest, "s"))
    return " ".join(f"{count} {unit}" for count, unit in parts if count) or "0 s"
