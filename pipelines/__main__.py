"""`python -m pipelines`: compile the workflow, run it here, submit or schedule it, see what became of it; roll a model
out."""

import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from kfp import compiler, local

from components.image import IMAGE
from pipelines.canary import CANARY_URL, PRODUCTION_URL, serve_canary
from pipelines.inspection import ENDED, GOING_ON, await_run, describe_run, find_run
from pipelines.placing import every_task
from pipelines.study import graph_for_study
from pipelines.submission import change_schedule, check_image, list_schedules, schedule_runs, submit_run
from pipelines.train import graph_for
from sonorant.config.release import CanaryConfig
from sonorant.params import check_params, parse_section, read_params

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
canary = typer.Typer(no_args_is_help=True, help="Roll a model out: into the canary, tried out there, into production.")
app.add_typer(canary, name="canary")

Config = Annotated[list[Path], typer.Option(help="YAML with a section per step; repeat to override")]
Overrides = Annotated[list[str], typer.Option("--set", help="section.key=value, overrides the files")]
Root = Annotated[Path, typer.Option(help="where artifacts go")]
Local = Annotated[bool, typer.Option("--local", help="one process a task, no cluster")]
Cache = Annotated[bool, typer.Option(help="reuse results of equal configuration and inputs")]
Host = Annotated[str, typer.Option(help="address of Kubeflow Pipelines", envvar="KF_PIPELINES_ENDPOINT")]
Experiment = Annotated[str, typer.Option(help="made where it does not exist")]
Name = Annotated[str | None, typer.Option(help="the run's; default: the pipeline's and the time")]
Namespace = Annotated[str | None, typer.Option(help="yours, where Kubeflow has many users")]
Account = Annotated[str | None, typer.Option(help="the service account of the run's pods; default: Kubeflow's")]
Unpinned = Annotated[bool, typer.Option("--unpinned", help="let a tag name the image: what it is may change")]
Token = Annotated[str | None, typer.Option(envvar="KFP_TOKEN", help="better in the environment")]

Corpus = Annotated[str, typer.Option(help="address of a corpus to import instead of preparing one")]
Shares = Annotated[int, typer.Option(min=1, max=10_000, help="pods that prepare the corpus, a part of the rows each")]
Store = Annotated[str, typer.Option(help="s3://BUCKET/PREFIX: a model that passes the gate is released there")]
Alias = Annotated[str, typer.Option(help="under which it is released: services that follow it take it up")]

Study = Annotated[Path | None, typer.Option(help="of recipes/studies: its arms and seeds instead of the training")]

Candidate = Annotated[str, typer.Option(help="model@sha256:DIGEST or model@ALIAS")]
StoreUrl = Annotated[str, typer.Option(help="s3://BUCKET or s3://BUCKET/PREFIX", envvar="SONORANT_STORE")]
Speech = Annotated[str, typer.Option(help="a corpus or a folder of audio, where the pod sees it: below /runs")]
CanaryUrl = Annotated[str, typer.Option(help="of the service that follows model@canary")]
ProductionUrl = Annotated[str, typer.Option(help="of the service that follows model@production")]
Limits = Annotated[list[str], typer.Option("--set", help="canary.key=value, see src/sonorant/config/release.py")]
PARAMS = [Path("params.yaml")]
NONE: list[str] = []


@app.command("compile")
def compile_pipeline(
    config: Config = PARAMS,
    overrides: Overrides = NONE,
    corpus: Corpus = "",
    shares: Shares = 1,
    store: Store = "",
    alias: Alias = "production",
    study: Study = None,
    output: Annotated[Path, typer.Option(help="where the pipeline's IR goes")] = Path("build/train.yaml"),
) -> None:
    """Write the pipeline's IR YAML, with the parameters as defaults."""
    compile_graph(*graph_asked(config, overrides, corpus, shares, store, alias, study), output)


@app.command()
def run(
    config: Config = PARAMS,
    overrides: Overrides = NONE,
    corpus: Corpus = "",
    shares: Shares = 1,
    store: Store = "",
    alias: Alias = "production",
    study: Study = None,
    root: Root = Path("build/local"),
    on_this_machine: Local = False,
    cache: Cache = False,
) -> None:
    """Run the very same graph on this machine."""
    graph, parameters = graph_asked(config, overrides, corpus, shares, store, alias, study)
    run_here(graph, parameters, root, on_this_machine, cache)


@app.command()
def submit(
    host: Host,
    config: Config = PARAMS,
    overrides: Overrides = NONE,
    corpus: Corpus = "",
    shares: Shares = 1,
    store: Store = "",
    alias: Alias = "production",
    study: Study = None,
    experiment: Experiment = "sonorant",
    name: Name = None,
    namespace: Namespace = None,
    token: Token = None,
    service_account: Account = None,
    unpinned: Unpinned = False,
    cache: Cache = True,
) -> None:
    """Start a run on a cluster and print its id."""
    check_image(IMAGE, unpinned)
    graph, parameters = graph_asked(config, overrides, corpus, shares, store, alias, study)
    with tempfile.TemporaryDirectory() as folder:
        package = write_package(graph, parameters, Path(folder) / "sonorant-train.yaml", cache)
        access = {"host": host, "namespace": namespace, "token": token}
        typer.echo(submit_run(package, parameters, experiment=experiment, name=name, account=service_account, **access))


@app.command()
def schedule(
    host: Host,
    cron: Annotated[str | None, typer.Option(help="minute hour day month weekday, in the cluster's time zone")] = None,
    name: Annotated[str, typer.Option(help="the schedule's")] = "sonorant-train",
    listing: Annotated[bool, typer.Option("--list", help="print all schedules")] = False,
    delete: Annotated[str | None, typer.Option(metavar="NAME", help="end a schedule")] = None,
    pause: Annotated[str | None, typer.Option(metavar="NAME", help="start no runs until --resume")] = None,
    resume: Annotated[str | None, typer.Option(metavar="NAME", help="start runs again, not those missed")] = None,
    config: Config = PARAMS,
    overrides: Overrides = NONE,
    corpus: Corpus = "",
    shares: Shares = 1,
    store: Store = "",
    alias: Alias = "production",
    experiment: Experiment = "sonorant",
    namespace: Namespace = None,
    token: Token = None,
    service_account: Account = None,
    unpinned: Unpinned = False,
    cache: Cache = True,
) -> None:
    """Start a run whenever the clock says, one at a time; or see to such schedules."""
    access = {"host": host, "namespace": namespace, "token": token}
    changes = {"delete": delete, "disable": pause, "enable": resume}
    asked = [verb for verb, schedule_name in changes.items() if schedule_name]
    if (cron is not None) + listing + len(asked) != 1:
        raise ValueError(
            "schedule: found none or several of --cron, --list, --delete, --pause and --resume, wanted one: choose"
        )
    if listing:
        for found in list_schedules(**access):
            time = found.trigger.cron_schedule.cron if found.trigger and found.trigger.cron_schedule else "-"
            typer.echo(f"{found.display_name}\t{time}\t{(found.status or 'unknown').lower()}\t{found.recurring_run_id}")
    for verb in asked:
        change_schedule(verb, changes[verb], **access)
    if cron is not None:
        check_image(IMAGE, unpinned)
        graph, parameters = graph_asked(config, overrides, corpus, shares, store, alias)
        with tempfile.TemporaryDirectory() as folder:
            package = write_package(graph, parameters, Path(folder) / "sonorant-train.yaml", cache)
            made = {"experiment": experiment, "name": name, "account": service_account}
            typer.echo(schedule_runs(package, parameters, cron, **made, **access))


@app.command()
def status(
    run_id: Annotated[str, typer.Argument(metavar="RUN_ID|latest")],
    host: Host,
    wait: Annotated[bool, typer.Option("--wait", help="until the run has ended")] = False,
    timeout: Annotated[float, typer.Option(min=0, help="seconds to wait")] = 24 * 3600,
    every: Annotated[float, typer.Option(min=0.1, help="seconds between two looks")] = 10,
    namespace: Namespace = None,
    token: Token = None,
) -> None:
    """Print a run's state and its tasks'; exit 0 where it succeeded, 1 where it failed, 3 where it goes on."""
    access = {"host": host, "namespace": namespace, "token": token}
    found = await_run(run_id, timeout, every, **access) if wait else find_run(run_id, **access)
    for line in describe_run(found):
        typer.echo(line)
    raise typer.Exit(ENDED.get(found.state, GOING_ON))


@canary.command("compile")
def compile_canary(
    output: Annotated[Path, typer.Option(help="where the pipeline's IR goes")] = Path("build/canary.yaml"),
) -> None:
    """Write the rollout's IR YAML; its parameters are given when it runs."""
    compile_graph(serve_canary, {}, output)


@canary.command("run")
def run_canary(
    candidate: Candidate,
    store: StoreUrl,
    speech: Speech,
    canary_url: CanaryUrl = CANARY_URL,
    production_url: ProductionUrl = PRODUCTION_URL,
    limits: Limits = NONE,
    root: Root = Path("build/local"),
    on_this_machine: Local = False,
) -> None:
    """Roll a model out from this machine, which must reach the store and both services."""
    parameters = canary_parameters(candidate, store, speech, canary_url, production_url, limits)
    run_here(serve_canary, parameters, root, on_this_machine)


@canary.command("submit")
def submit_canary(
    host: Host,
    candidate: Candidate,
    store: StoreUrl,
    speech: Speech,
    canary_url: CanaryUrl = CANARY_URL,
    production_url: ProductionUrl = PRODUCTION_URL,
    limits: Limits = NONE,
    experiment: Experiment = "sonorant",
    name: Name = None,
    namespace: Namespace = None,
    token: Token = None,
    service_account: Account = None,
    unpinned: Unpinned = False,
) -> None:
    """Roll a model out from the cluster and print the run's id."""
    check_image(IMAGE, unpinned)
    parameters = canary_parameters(candidate, store, speech, canary_url, production_url, limits)
    with tempfile.TemporaryDirectory() as folder:
        package = write_package(serve_canary, parameters, Path(folder) / "sonorant-serve-canary.yaml")
        access = {"host": host, "namespace": namespace, "token": token}
        typer.echo(submit_run(package, parameters, experiment=experiment, name=name, account=service_account, **access))


def graph_asked(
    config: list[Path],
    overrides: list[str],
    corpus: str,
    shares: int,
    store: str,
    alias: str,
    study: Path | None = None,
) -> tuple[Any, dict[str, Any]]:
    """The training graph, or a study's, and its parameters, these found valid for every step."""
    params = read_params(config, overrides)
    if study is not None:
        if corpus or store or shares > 1:
            raise ValueError(
                "--study: found --corpus, --shares or --store beside it, wanted none of them: a study prepares its "
                "corpora and releases nothing"
            )
        return graph_for_study(study, params)
    check_params(params)
    return graph_for(params, corpus=corpus, num_shares=shares, store=store, alias=alias)


def canary_parameters(
    candidate: str, store: str, speech: str, canary_url: str, production_url: str, overrides: list[str]
) -> dict[str, Any]:
    """The rollout's parameters, its limits found valid."""
    given = read_params([], overrides)
    if set(given) - {"canary"}:
        raise ValueError(f"--set: found the sections {sorted(given)}, wanted canary alone: write canary.key=value")
    limits = parse_section("canary", CanaryConfig, given.get("canary", {}))
    return {
        "candidate": candidate,
        "store": store,
        "speech": speech,
        "canary": canary_url,
        "production": production_url,
        "limits": limits.model_dump(mode="json"),
    }


def compile_graph(graph: Any, parameters: dict[str, Any], output: Path) -> None:
    """Write a pipeline's IR and print where."""
    if output.suffix not in (".yaml", ".yml"):
        raise ValueError(f"--output: found {output}, wanted a name ending in .yaml: rename it")
    typer.echo(write_package(graph, parameters, output))


def write_package(graph: Any, parameters: dict[str, Any], path: Path, cache: bool = True) -> Path:
    """Compile a pipeline with its parameters as defaults; where it lies."""
    if not cache:
        # kfp's own switch reaches the outermost tasks only.
        for task in every_task(graph):
            task.caching_options.enable_cache = False
    path.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(graph, str(path), pipeline_parameters=parameters)
    return path


def run_here(graph: Any, parameters: dict[str, Any], root: Path, on_this_machine: bool, cache: bool = False) -> None:
    """Run a pipeline's tasks as processes of this machine."""
    if not on_this_machine:
        raise ValueError("run: found no --local, wanted it: add --local, or use `submit` for a cluster")
    # kfp says of each resource and of the image that they have no effect here.
    warnings.simplefilter("ignore", RuntimeWarning)
    warnings.simplefilter("ignore", UserWarning)
    runner = local.SubprocessRunner(use_venv=False)
    local.init(runner, pipeline_root=str(root.resolve()), enable_caching=cache)
    # A cluster needs time to replace a lost machine; here the wait would only hide the fault.
    for task in every_task(graph):
        task.retry_policy.backoff_duration.FromSeconds(1)
    try:
        graph(**parameters)
    except RuntimeError as error:
        # kfp colours its messages.
        plain = re.sub(r"\x1b\[\d+m", "", str(error)).rstrip(".")
        raise ValueError(f"run: {plain}: the task's own last lines are above") from None


def main(arguments: list[str] | None = None) -> None:
    """Run a command; a user's mistake is one line on stderr and exit status 1."""
    try:
        app(arguments, prog_name="python -m pipelines")
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
