"""From params.yaml and its like to sections: files merged key by key, every fault on one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sonorant.config import SECTIONS, Section


def read_params(paths: Sequence[Path], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The sections of one or more parameter files as they are written there; later files override earlier ones.

    `overrides` are texts such as cluster.num_units=50. Raises ValueError on one line.
    """
    return merged([*(read_yaml(path) for path in paths), *(parse_override(text) for text in overrides)])


def check_params(params: Mapping[str, Any]) -> None:
    """Refuse, with a ValueError on one line that names every fault, what is not exactly the sections of all steps."""
    if set(params) != set(SECTIONS):
        raise ValueError(
            f"params: found the sections {sorted(map(str, params))}, wanted {sorted(SECTIONS)}: add, remove or respell"
        )
    faults = []
    for name, section in SECTIONS.items():
        try:
            parse_section(name, section, params[name])
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError("; ".join(faults))


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
    if not equals or "." not in key:
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
        raise ValueError("; ".join(describe_fault(name, fault) for fault in error.errors())) from None


def describe_fault(name: str, fault: Any) -> str:
    """One fault that pydantic found, as: the key, what it found, what it wanted."""
    key = ".".join([name, *(str(part) for part in fault["loc"])])
    if fault["type"] == "extra_forbidden":
        return f"{key}: found an unknown key, wanted one that sonorant/config.py lists: remove or respell it"
    if fault["type"] == "missing":
        return f"{key}: found nothing, wanted a value: add it"
    message = fault["msg"].removeprefix("Value error, ").replace("Input should be ", "wanted ")
    found = "" if fault["type"] == "value_error" else f"found {fault['input']!r}, "
    return f"{key}: {found}{message}"
