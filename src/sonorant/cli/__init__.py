"""The command line, made from the steps' signatures: `sonorant STEP --config params.yaml --corpus …`.

A configuration file has one section per step. Given several, later ones override earlier ones key by key, so
`--config params.yaml --config recipes/mt4ssl.yaml` is the project's parameters with that recipe's. `--round 2`
takes the section of a step that the second round runs again with what `second` changes of it.

`sonorant embed` is no step: it sends audio files to the embedding server. Nor is `sonorant compare`: it lays what
`evaluate` wrote of several models side by side; nor `sonorant study`, which runs steps. Nor is `sonorant store`: it
brings artifacts to an object store and back.
"""

from __future__ import annotations

import errno
import functools
import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from sonorant.params import KEYS, TWICE, parse_round, parse_section, read_params
from sonorant.steps.step import Step, scratch_root

if TYPE_CHECKING:
    from typer import Typer


def main() -> None:
    """Run the command line; what a user can cause ends in one line on stderr and a non-zero exit."""
    need({"embed": "client", "store": "store"}.get("".join(sys.argv[1:2]), "train"), "typer")
    make_app()()


def make_app() -> Typer:
    """Every step as a command, `compare`, `study`, `embed`, and the commands of `store`."""
    import typer

    from sonorant.steps import SHARED, STEPS

    about = "Self-supervised speech representations, step by step."
    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=about)
    for step in (SHARED | STEPS).values():
        app.command(step.name, help=step.summary)(command(step))
    app.command("compare")(told_command("compare", "nothing was written"))
    app.command("study")(told_command("study", "finished runs are kept in its --folder"))
    app.command("embed")(embed_command())
    app.add_typer(store_app(), name="store")
    return app


def need(extra: str, *modules: str) -> None:
    """End in one line where a module of an extra is not installed."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            words = "training" if extra == "train" else extra
            wanted = f"wanted the {words} extra: pip install 'sonorant[{extra}]'"
            sys.exit(f"sonorant: found no module {error.name or module}, {wanted}")


def told_command(name: str, kept: str) -> Callable[..., None]:
    """`sonorant compare` or `sonorant study`, with its faults on one line; `kept` says where finished work is."""
    function: Callable[..., None] = getattr(importlib.import_module(f"sonorant.cli.{name}"), name)

    @functools.wraps(function)
    def call(**given: Any) -> None:
        need("train", "matplotlib", "rich")
        # Whoever is told to end stops the steps that it has started.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with one_line(name, kept):
            function(**given)

    return call


def embed_command() -> Callable[..., None]:
    """`sonorant embed`, with its faults on one line."""
    from sonorant.client.command import embed
    from sonorant.client.outputs import work_folder

    @functools.wraps(embed)
    def call(**given: Any) -> None:
        need("client", "httpx", "pyarrow", "rich")
        with one_line("embed", f"finished work is kept in {work_folder(given['output'])}"):
            embed(**given)

    return call


def store_app() -> Typer:
    """`sonorant store …`, with its commands' faults on one line."""
    import typer

    from sonorant.cli.store import COMMANDS

    def told(name: str, function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def call(**given: Any) -> None:
            need("store", "minio", "rich")
            # A container's first process is not ended by SIGTERM unless it says how.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            with one_line(f"store {name}", "what has come over is not sent again"):
                function(**given)

        return call

    app = typer.Typer(no_args_is_help=True, help="Artifacts to an object store and back.")
    for name, function in COMMANDS.items():
        app.command(name)(told(name, function))
    return app


def command(step: Step) -> Callable[..., None]:
    """The step as a function whose parameters typer turns into options."""
    import typer

    def call(config: list[Path], overrides: list[str], round: int = 1, **paths: Any) -> None:
        run(step, config, overrides, paths, round)

    def parameter(name: str, kind: Any, option: Any, default: Any = Parameter.empty) -> Parameter:
        return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])

    files = typer.Option("--config", help="YAML with a section per step; repeat to override", show_default=False)
    changes = typer.Option("--set", help="section.key=value, overrides the files", show_default=False)
    parameters = [parameter("config", list[Path], files), parameter("overrides", list[str], changes, [])]
    if step.name in TWICE:
        which = typer.Option("--round", help="2: the section with what `second` changes of it")
        parameters.append(parameter("round", int, which, 1))
    for name in (*step.inputs, *step.outputs):
        verb = "reads" if name in step.inputs else "writes"
        many = step.artifacts[name] == "ins"
        about = "an artifact it reads; repeat for each" if many else f"the artifact it {verb}"
        option = typer.Option(f"--{name}", help=about, show_default=False)
        if many:
            parameters.append(parameter(name, list[Path] | None, option, None))
        elif name in step.optional:
            parameters.append(parameter(name, Path | None, option, None))
        else:
            parameters.append(parameter(name, Path, option))
    call.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return call


def run(step: Step, config: Sequence[Path], overrides: Sequence[str], paths: Mapping[str, Any], round: int = 1) -> None:
    """Run the step and print its metrics, one a line."""
    need("train", "yaml")
    with one_line(step.name, f"finished work is kept in {scratch_root()}"):
        values = read_params(config, overrides)
        files = ", ".join(map(str, config))
        if unknown := sorted(set(values) - KEYS):
            raise ValueError(f"{files}: found unknown sections {unknown}, wanted some of {sorted(KEYS)}: respell them")
        name = step.section
        if name not in values:
            raise ValueError(f"{files}: found only the sections {sorted(values)}, wanted {name}: add it")
        is_shared = step.name != name
        section = parse_section(name, step.config, values[name]) if is_shared else parse_round(name, values, round)
        metrics = step(section, **paths)
    for name, value in metrics.items():
        # `evaluate` has shown its own table: its metrics are named system.score.
        if "." not in name:
            print(f"{step.name}  {name}  {value:.6g}")


@contextmanager
def one_line(step: str, kept: str) -> Iterator[None]:
    """What a user can cause becomes one line and the end; `kept` says where finished work is."""
    from safetensors import SafetensorError

    try:
        yield
    except ValueError as error:
        fail(step, str(error))
    except (OSError, SafetensorError) as error:
        # safetensors wraps what the system says.
        full = getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error)
        advice = "free some space" if full else "check the path and its permissions"
        file, reason = getattr(error, "filename", None), getattr(error, "strerror", None)
        where = f"{file}: " if file else ""
        fail(step, f"{where}{reason or error}: {advice} and run the same command again; {kept}")
    except KeyboardInterrupt:
        fail(step, f"interrupted; {kept}; run the same command again to go on", 130)


def fail(step: str, message: str, code: int = 1) -> NoReturn:
    """One line on stderr, and the end."""
    if os.environ.get("SONORANT_TRACEBACK"):
        raise
    line = " ".join(message.split())
    print(line if line.startswith(f"{step}:") else f"{step}: {line}", file=sys.stderr)
    raise SystemExit(code)
