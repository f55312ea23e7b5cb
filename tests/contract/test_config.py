"""params.yaml mirrors sonorant/config, and whatever is wrong in it is said on one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sonorant.config import SECTIONS, ClusterConfig, PretrainConfig, Section
from sonorant.params import TWICE, check_params, parse_round, parse_rounds, parse_section, read_params
from sonorant.steps import STEPS

PARAMS = Path(__file__).resolve().parents[2] / "params.yaml"


@pytest.fixture
def params() -> dict[str, Any]:
    return yaml.safe_load(PARAMS.read_text())


def test_params_has_exactly_the_sections_in_their_order(params: dict[str, Any]) -> None:
    assert [name for name in params if name in SECTIONS] == list(SECTIONS)
    assert {name for name in params if name not in SECTIONS} == {"rounds", "takes", "second", "gate"}


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


def test_a_second_round_is_said_beside_the_sections_or_not_at_all(params: dict[str, Any]) -> None:
    check_params({**params, "rounds": 2})
    first = {name: values for name, values in params.items() if name in SECTIONS}
    check_params(first)
    assert parse_rounds(first).rounds == 1
    assert read_params([PARAMS], ["rounds=2"]) == {**params, "rounds": 2}


def test_the_second_round_changes_the_sections_key_by_key(params: dict[str, Any]) -> None:
    changes = {"optim": {"beta1": 0.8}, "phases": [{"weights": {"units": 2}}]}
    params["second"] = {"cluster": {"layer": 3}, "pretrain": changes}
    units, encoder = (parse_round(name, params, 2) for name in TWICE)
    assert isinstance(units, ClusterConfig)
    assert isinstance(encoder, PretrainConfig)
    assert units == ClusterConfig.model_validate({**params["cluster"], "layer": 3})
    assert (encoder.optim.beta1, encoder.optim.beta2) == (0.8, params["pretrain"]["optim"]["beta2"])
    assert [phase.weights for phase in encoder.phases] == [{"units": 2}]
    assert parse_round("cluster", params, 1) == ClusterConfig.model_validate(params["cluster"])


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["gate.max_pnmi_loss=2"], "gate.max_pnmi_loss: found 2, wanted less than or equal to 1"),
        (["rounds=3"], "rounds: found 3, wanted less than or equal to 2"),
        (["rounds=0"], "rounds: found 0, wanted greater than or equal to 1"),
        (["rounds=two"], "rounds: found 'two', wanted a valid integer"),
        (["rounds=2.0"], "rounds: found 2.0, wanted a valid integer"),
        (["rounds=true"], "rounds: found True, wanted a valid integer"),
        (["second.cluter={}"], "second.cluter: found an unknown key, wanted one that sonorant/config lists"),
        (["second.pretrain=3"], "second.pretrain: found 3, wanted a valid dictionary"),
        (["rounds=2", "second.cluster.layer=null"], "second.cluster.layer: found nothing, wanted a layer of the first"),
        (["rounds=2", "second.cluster.layer=-1"], "second.cluster.layer: found -1, wanted greater than or equal"),
        (["rounds=2", "second.cluster.layer=4"], "second.cluster.layer: found 4, wanted 0 to 3"),
        (["rounds=2", "second.cluster.num_unit=4"], "second.cluster.num_unit: found an unknown key"),
        (["rounds=2", "second.pretrain.encoder.num_heads=5"], "second.pretrain.encoder: dim 256 is not divisible"),
        (["rounds=2", "cluster.num_unit=4"], "cluster.num_unit: found an unknown key"),
    ],
)
def test_a_fault_in_rounds_is_named_once_and_on_one_line(overrides: list[str], wanted: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_params(read_params([PARAMS], overrides))
    message = str(caught.value)
    assert message.startswith(wanted)
    assert "\n" not in message
    assert ";" not in message


def test_what_second_says_of_a_section_is_read_in_the_second_round_alone(params: dict[str, Any]) -> None:
    params["second"]["cluster"] = {"num_units": 0}
    check_params(params)
    with pytest.raises(ValueError, match=r"^second\.cluster\.num_units: found 0"):
        check_params({**params, "rounds": 2})
