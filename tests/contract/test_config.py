"""params.yaml mirrors sonorant/config.py, and whatever is wrong in it is said on one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sonorant.config import SECTIONS, Section
from sonorant.params import check_params, parse_section, read_params
from sonorant.steps import STEPS

PARAMS = Path(__file__).resolve().parents[2] / "params.yaml"


@pytest.fixture
def params() -> dict[str, Any]:
    return yaml.safe_load(PARAMS.read_text())


def test_params_has_exactly_the_sections_in_their_order(params: dict[str, Any]) -> None:
    assert list(params) == list(SECTIONS)


@pytest.mark.parametrize("name", SECTIONS)
def test_every_key_of_a_section_is_valid(params: dict[str, Any], name: str) -> None:
    assert isinstance(parse_section(name, SECTIONS[name], params[name]), Section)


def test_every_section_belongs_to_a_step() -> None:
    assert {name: step.config for name, step in STEPS.items()} == SECTIONS


def test_the_file_is_read_as_it_is_written(params: dict[str, Any]) -> None:
    assert read_params([PARAMS]) == params
    check_params(params)


def test_later_files_and_single_keys_override_earlier_ones(params: dict[str, Any], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("pretrain: {num_updates: 7, optim: {beta1: 0.8}}")
    merged = read_params([PARAMS, recipe], ["pretrain.optim.eps=1.0e-5", "evaluate.split=dev"])
    params["pretrain"]["num_updates"] = 7
    params["pretrain"]["optim"] |= {"beta1": 0.8, "eps": 1e-5}
    params["evaluate"]["split"] = "dev"
    assert merged == params


def test_every_fault_is_named_on_one_line(params: dict[str, Any]) -> None:
    params["cluster"]["num_unit"] = 50
    params["publish"]["num_units"] = 100.5
    params["evaluate"]["split"] = "tset"
    with pytest.raises(ValueError) as caught:
        check_params(params)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("cluster.num_unit:", "publish.num_units: found 100.5", "evaluate.split: found 'tset'"):
        assert part in message


@pytest.mark.parametrize("section", ["prepair", None])
def test_a_strange_or_missing_section_is_named(params: dict[str, Any], section: str | None) -> None:
    prepare = params.pop("prepare")
    if section:
        params[section] = prepare
    with pytest.raises(ValueError, match=r"wanted .*prepare") as caught:
        check_params(params)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [3, None, [], "text"])
def test_a_section_that_is_no_mapping_is_named(params: dict[str, Any], value: object) -> None:
    with pytest.raises(ValueError, match=r"^cluster: found") as caught:
        check_params({**params, "cluster": value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "wanted"), [("prepare: [", "no valid YAML"), ("", "NoneType"), ("- prepare", "list")]
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, wanted: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=wanted) as caught:
        read_params([path])
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.yaml: found no such file"):
        read_params([tmp_path / "absent.yaml"])


@pytest.mark.parametrize("text", ["num_units=50", "cluster.num_units"])
def test_an_override_that_is_none_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=f"^--set {text}: found no section.key=value"):
        read_params([PARAMS], [text])
