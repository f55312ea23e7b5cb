"""`python -m pipelines`: compile the workflow, run it on this machine, submit it to a cluster."""

import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from kfp import compiler, local

from pipelines.placing import every_task
from pipelines.submission import submit_run
from pipelines.train import graph_for
from sonorant.params import check_params, read_params

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Config = Annotated[list[Path], typer.Option(help="YAML with a section per step; repeat to override")]
Overrides = Annotated[list[str], typer.Option("--set", help="section.key=value, overrides the files")]
PARAMS = [Path("params.yaml")]
NONE: list[str] = []


@app.command("compile")
def compile_pipeline(
    config: Config = PARAMS,
    overrides: Overrides = NONE,
    output: Annotated[Path, typer.Option(help="where the pipeline's IR goes")] = Path("build/train.yaml"),
) -> None:
    """Write the pipeline's IR YAML, with the parameters as defaults."""
    if output.suffix not in (".yaml", ".yml"):
        raise ValueError(f"--output: found {output}, wanted a name ending in .yaml: rename it")
    write_package(checked_params(config, overrides), output)
    typer.echo(output)


@app.command()
def run(
    config: Config = PARAMS,
    overrides: Overrides = NONE,
    root: Annotated[Path, typer.Option(help="where artifacts go")] = Path("build/local"),
    on_this_machine: Annotated[bool, typer.Option("--local", help="one process a step, no cluster")] = False,
    cache: Annotated[bool, typer.Option(help="reuse results of equal configuration and inputs")] = False,
) -> None:
    """Run the very same graph on this machine."""
    if not on_this_machine:
        raise ValueError("run: found no --local, wanted it: add --local, or use `submit` for a cluster")
    graph, parameters = graph_for(checked_params(config, overrides))
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


@app.command()
def submit(
    host: Annotated[str, typer.Option(help="address of Kubeflow Pipelines", envvar="KF_PIPELINES_ENDPOINT")],
    config: Config = PARAMS,
    overrides: Overrides = NONE,
    experiment: Annotated[str, typer.Option(help="made where it does not exist")] = "sonorant",
    name: Annotated[str | None, typer.Option(help="the run's; default: the pipeline's and the time")] = None,
    namespace: Annotated[str | None, typer.Option(help="yours, where Kubeflow has many users")] = None,
    token: Annotated[str | None, typer.Option(envvar="KFP_TOKEN", help="better in the environment")] = None,
    cache: Annotated[bool, typer.Option(help="reuse results of equal configuration and inputs")] = True,
) -> None:
    """Start a run on a cluster and print its id."""
    params = checked_params(config, overrides)
    _, parameters = graph_for(params)
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "sonorant-train.yaml"
        write_package(params, package, cache=cache)
        typer.echo(
            submit_run(
                package,
                parameters,
                host=host,
                experiment=experiment,
                name=name,
                namespace=namespace,
                token=token,
            )
        )


def checked_params(config: list[Path], overrides: list[str]) -> dict[str, Any]:
    """The parameters as they are written, found valid for every step."""
    params = read_params(config, overrides)
    check_params(params)
    return params


def write_package(params: dict[str, Any], path: Path, cache: bool = True) -> None:
    """Compile the pipeline of as many rounds as `params` asks for, with its parameters as defaults."""
    graph, parameters = graph_for(params)
    if not cache:
        # kfp's own switch reaches the outermost tasks only.
        for task in every_task(graph):
            task.caching_options.enable_cache = False
    path.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(graph, str(path), pipeline_parameters=parameters)


def main(arguments: list[str] | None = None) -> None:
    """Run a command; a user's mistake is one line on stderr and exit status 1."""
    try:
        app(arguments, prog_name="python -m pipelines")
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
