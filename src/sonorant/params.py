"""From params.yaml and its like to sections: files merged key by key, every fault on one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from sonorant.config import SECTIONS, ClusterConfig, LaunchConfig, PretrainConfig, Rounds, Second, Section, Takes
from sonorant.config.release import GateConfig

Parsed = TypeVar("Parsed")
TWICE = tuple(Second.model_fields)
"""The steps that a second round runs again."""
OPTIONAL = ("ground", "align")
"""The steps that run where `takes` asks for them."""
KEYS = {*SECTIONS, *Rounds.model_fields, "takes", "gate"}
"""What a parameter file may hold."""


def read_params(paths: Sequence[Path], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The sections of one or more parameter files as they are written there; later files override earlier ones.

    `overrides` are texts such as cluster.num_units=50. Raises ValueError on one line.
    """
    return merged([*(read_yaml(path) for path in paths), *(parse_override(text) for text in overrides)])


def check_params(params: Mapping[str, Any]) -> None:
    """Refuse, with a ValueError on one line that names every fault, what is not exactly the sections of all steps.

    Beside them may stand `rounds`, `second`, `takes` and `gate`, and the sections of steps that do not run.
    """
    takes = parse_takes(params)
    wanted = {name for name in SECTIONS if name not in OPTIONAL or name in takes.steps}
    if not wanted <= set(params) <= KEYS:
        raise ValueError(
            f"params: found the sections {sorted(map(str, params))}, wanted {sorted(wanted)} "
            f"and perhaps {sorted(KEYS - wanted)}: add, remove or respell"
        )
    faults: list[str] = []

    def parsed(parse: Callable[..., Parsed], *arguments: Any) -> Parsed | None:
        try:
            return parse(*arguments)
        except ValueError as error:
            faults.append(str(error))
            return None

    parsed(parse_section, "gate", GateConfig, params.get("gate", {}))
    rounds = parsed(parse_rounds, params)
    given = {name: section for name, section in SECTIONS.items() if name in params}
    sections = {name: parsed(parse_section, name, section, params[name]) for name, section in given.items()}
    # A fault in the first round's section is not named again.
    again = [name for name in TWICE if sections[name]] if rounds and rounds.rounds > 1 else []
    second = {name: parsed(parse_round, name, params, 2) for name in again}
    clustering, first = second.get("cluster"), sections["pretrain"]
    if isinstance(clustering, ClusterConfig) and isinstance(first, PretrainConfig):
        layer, num_layers = clustering.layer or 0, first.encoder.num_layers
        if layer > num_layers:
            faults.append(
                f"second.cluster.layer: found {layer}, wanted 0 to {num_layers}: pretrain.encoder has no more layers"
            )
    if faults:
        raise ValueError("; ".join(faults))


def parse_rounds(params: Mapping[str, Any]) -> Rounds:
    """How many rounds there are and what the second changes; ValueError on one line with every fault in that."""
    rounds = parse_section("", Rounds, {key: params[key] for key in Rounds.model_fields if key in params})
    assert isinstance(rounds, Rounds)
    return rounds


def parse_takes(params: Mapping[str, Any]) -> Takes:
    """Whose encoder is aligned and whose is published; ValueError on one line with every fault in that."""
    takes = parse_section("takes", Takes, params.get("takes", {}))
    assert isinstance(takes, Takes)
    return takes


def parse_round(name: str, params: Mapping[str, Any], round: int) -> Section:
    """The section of a step as a round takes it; ValueError on one line with every fault in it."""
    parse_rounds(params)
    if round not in (1, 2):
        raise ValueError(f"--round: found {round}, wanted 1 or 2: correct it")
    section = parse_section(name, SECTIONS[name], params[name] or {})
    if round == 1:
        return section
    section = parse_section(f"second.{name}", SECTIONS[name], second_values(name, params))
    if isinstance(section, ClusterConfig) and section.layer is None:
        raise ValueError("second.cluster.layer: found nothing, wanted a layer of the first round's encoder: add it")
    return section


def second_values(name: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """A step's section as it is written, with what `second` says of it laid over it."""
    return merged([params[name] or {}, getattr(parse_rounds(params).second, name)])


def parse_launch(name: str, values: Mapping[str, Any]) -> LaunchConfig:
    """Who does the work of a step that trains, from its section as it is written."""
    launch = parse_section(f"{name}.launch", LaunchConfig, values.get("launch", {}))
    assert isinstance(launch, LaunchConfig)
    return launch


def read_yaml(path: Path) -> dict[str, Any]:
    """A parameter file's sections."""
    import yaml

    if not path.is_file():
        raise ValueError(f"--config {path}: found no such file, wanted YAML with a section per step: check the path")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        fault = " ".join(str(error).split())
        raise ValueError(f"--config {path}: found no valid YAML ({fault}), wanted sections: correct it") from None
    if not isinstance(values, dict):
        found = type(values).__name__
        raise ValueError(f"--config {path}: found {found}, wanted a mapping with a section per step: correct the file")
    return values


def parse_override(text: str) -> dict[str, Any]:
    """`a.b=1` as {"a": {"b": 1}}; the value is YAML."""
    import yaml

    key, equals, value = text.partition("=")
    if not equals or ("." not in key and key != "rounds"):
        raise ValueError(f"--set {text}: found no section.key=value, wanted e.g. cluster.num_units=50: correct it")
    try:
        nested: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {text}: found no valid YAML ({' '.join(str(error).split())}): correct it") from None
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return dict(nested)


def merged(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mappings merged key by key, later ones first; lists and values are replaced whole."""
    result: dict[str, Any] = {}
    for config in configs:
        for key, value in config.items():
            old = result.get(key)
            result[key] = merged([old, value]) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def parse_section(name: str, section: type[Section], values: Mapping[str, Any]) -> Section:
    """The section that `values` describe; ValueError on one line with every fault in them."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        faults = error.errors()
        # A sequence whose only entry is faulty is not also too short.
        told = [fault for fault in faults if fault["type"] != "too_short" or not has_deeper(fault, faults)]
        raise ValueError("; ".join(describe_fault(name, fault) for fault in told)) from None


def has_deeper(fault: Any, faults: Sequence[Any]) -> bool:
    """Whether something within what is faulty is faulty too."""
    place = fault["loc"]
    return any(other["loc"][: len(place)] == place and len(other["loc"]) > len(place) for other in faults)


def describe_fault(name: str, fault: Any) -> str:
    """One fault that pydantic found, as: the key, what it found, what it wanted."""
    key = ".".join([*([name] if name else []), *(str(part) for part in fault["loc"])])
    if fault["type"] == "extra_forbidden":
        return f"{key}: found an unknown key, wanted one that sonorant/config lists: remove or respell it"
    if fault["type"] == "missing":
        return f"{key}: found nothing, wanted a value: add it"
    message = fault["msg"].removeprefix("Value error, ").replace("Input should be ", "wanted ")
    found = "" if fault["type"] == "value_error" else f"found {fault['input']!r}, "
    return f"{key}: {found}{message}"
