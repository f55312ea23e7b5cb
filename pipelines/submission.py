"""Starting a run of a compiled pipeline on a Kubeflow Pipelines host, now or by the clock."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kfp
import kfp_server_api

from pipelines.connection import connected

RIGHTS = "check --experiment, --namespace and the token's rights"
FIELDS = re.compile(r"[A-Za-z0-9*/,?#LW-]+")


def check_image(image: str, may_be_unpinned: bool) -> None:
    """ValueError where the pods' image has no digest: what a tag names may be another thing tomorrow."""
    if "@sha256:" not in image and not may_be_unpinned:
        raise ValueError(
            f"$SONORANT_IMAGE: found {image}, wanted an image by digest, NAME@sha256:…: set it to what your registry "
            "shows for the image that `make images` built, or add --unpinned"
        )


def submit_run(
    package: Path,
    parameters: dict[str, Any],
    *,
    host: str,
    experiment: str,
    name: str | None = None,
    namespace: str | None = None,
    token: str | None = None,
    account: str | None = None,
    seconds: float = 60,
) -> str:
    """Start a run of a compiled pipeline in an experiment, made if need be; the run's id.

    Raises ValueError where the host cannot be reached, refuses, or has not answered after `seconds`.
    """
    with connected(
        host, wanted="a new run", advice=RIGHTS, namespace=namespace, token=token, seconds=seconds
    ) as client:
        run = client.create_run_from_pipeline_package(
            str(package),
            arguments=parameters,
            run_name=name,
            experiment_name=experiment,
            namespace=namespace,
            service_account=account,
        )
    return run.run_id


def schedule_runs(
    package: Path,
    parameters: dict[str, Any],
    cron: str,
    *,
    host: str,
    experiment: str,
    name: str,
    namespace: str | None = None,
    token: str | None = None,
    account: str | None = None,
) -> str:
    """Start runs whenever `cron` says, one at a time and none for times that were missed; the schedule's id.

    Raises ValueError where there is a schedule of that name, and as submit_run does.
    """
    expression = with_seconds(cron)
    with connected(host, wanted="a new schedule", advice=RIGHTS, namespace=namespace, token=token) as client:
        if any(schedule.display_name == name for schedule in every_schedule(client, namespace)):
            raise ValueError(f"--name {name}: found a schedule of that name, wanted a new name: --delete {name} first")
        schedule = client.create_recurring_run(
            client.create_experiment(experiment, namespace=namespace).experiment_id,
            name,
            cron_expression=expression,
            max_concurrency=1,
            no_catchup=True,
            params=parameters,
            pipeline_package_path=str(package),
            service_account=account,
        )
    return schedule.recurring_run_id


def list_schedules(
    *, host: str, namespace: str | None = None, token: str | None = None
) -> list[kfp_server_api.V2beta1RecurringRun]:
    """Every schedule on the host."""
    with connected(host, wanted="its schedules", advice=RIGHTS, namespace=namespace, token=token) as client:
        return list(every_schedule(client, namespace))


def change_schedule(
    change: str, name: str, *, host: str, namespace: str | None = None, token: str | None = None
) -> None:
    """Delete, disable or enable the schedule of that name; ValueError where there is none."""
    with connected(host, wanted=f"to {change} {name}", advice=RIGHTS, namespace=namespace, token=token) as client:
        schedules = {schedule.display_name: schedule for schedule in every_schedule(client, namespace)}
        if name not in schedules:
            raise ValueError(f"schedule {name}: found only {sorted(schedules)}, wanted one of these: see --list")
        getattr(client, f"{change}_recurring_run")(schedules[name].recurring_run_id)


def every_schedule(client: kfp.Client, namespace: str | None) -> Iterator[kfp_server_api.V2beta1RecurringRun]:
    """The schedules, page by page."""
    page = ""
    while page is not None:
        answer = client.list_recurring_runs(page_token=page, page_size=100, namespace=namespace)
        yield from answer.recurring_runs or []
        page = answer.next_page_token or None


def with_seconds(cron: str) -> str:
    """A time as Kubeflow takes it, whose first field is the second: five fields get 0 for it."""
    fields = cron.split()
    if len(fields) not in (5, 6) or not all(FIELDS.fullmatch(field) for field in fields):
        raise ValueError(
            f"--cron: found {cron!r}, wanted minute, hour, day of the month, month and day of the week, such as "
            "'0 3 * * 1' (Mondays at 3:00, in the cluster's time zone): correct it"
        )
    return " ".join(["0", *fields][-6:])
