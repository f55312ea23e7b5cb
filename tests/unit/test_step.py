"""What a step is: declared by its signature, all or nothing, and said on one line what is wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from sonorant.artifacts import digest_folder, read_record, write_absence
from sonorant.config import Section
from sonorant.steps.step import In, Metrics, Out, Scratch, step


class CountConfig(Section):
    """How far to count."""

    number: int = Field(3, ge=1)
    num_workers: int = Field(0, exclude=True)


@step
def count(config: CountConfig, *, numbers: Out, scratch: Scratch) -> Metrics:
    """Write the numbers.

    Not the summary.
    """
    (scratch / "begun").touch()
    assert list(numbers.iterdir()) == []
    for index in range(config.number):
        (numbers / f"{index}.txt").write_text(str(index))
    if config.number == 13:
        raise RuntimeError("unlucky")
    if config.number == 14:
        raise SystemExit(0)
    return {"total": float(config.number)}


@step
def add(config: CountConfig, *, numbers: In, sums: Out, rests: Out, more: In | None = None) -> Metrics:
    """Sum them."""
    total = sum(int(path.read_text()) for path in numbers.glob("*.txt")) + (0 if more is None else 1000)
    (sums / "sum.txt").write_text(str(total * config.number))
    (rests / "rest.txt").write_text("0")
    return {"sum": float(total)}


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "runs"
    monkeypatch.setenv("SONORANT_RUNS", str(folder))
    return folder


def one_line(caught: pytest.ExceptionInfo[ValueError]) -> str:
    """The error's text, which must be a single line."""
    text = str(caught.value)
    assert "\n" not in text
    return text


def names(folder: Path) -> list[str]:
    """Everything in a folder, hidden or not."""
    return sorted(path.name for path in folder.iterdir())


def test_the_signature_is_the_declaration() -> None:
    assert (add.name, add.summary, add.config) == ("add", "Sum them.", CountConfig)
    assert (add.inputs, add.outputs, add.optional) == (["numbers", "more"], ["sums", "rests"], {"more"})
    assert count.artifacts == {"numbers": "out", "scratch": "scratch"}
    assert count.summary == "Write the numbers."


@step
def hide(config: CountConfig, *, secrets: Out) -> Metrics:
    """Write a file as safetensors does: for its owner alone."""
    (secrets / "folder").mkdir()
    path = secrets / "folder" / "weights"
    path.write_bytes(bytes(config.number))
    path.chmod(0o600)
    return {}


def test_whoever_serves_an_artifact_may_read_it(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        hide({}, secrets=tmp_path / "s")
    finally:
        os.umask(before)
    assert oct((tmp_path / "s" / "folder" / "weights").stat().st_mode & 0o777) == "0o644"
    assert oct((tmp_path / "s" / "folder").stat().st_mode & 0o777) == "0o755"


def test_an_artifact_says_how_it_was_made(tmp_path: Path) -> None:
    assert count({"number": 4}, numbers=tmp_path / "n") == {"total": 4.0}
    assert names(tmp_path / "n") == ["0.txt", "1.txt", "2.txt", "3.txt", "artifact.json"]
    record = read_record(tmp_path / "n", "n")
    assert (record["step"], record["artifact"]) == ("count", "numbers")
    assert record["config"] == {"number": 4}, "how the work is done is no part of what is made"
    assert record["metrics"] == {"total": 4.0}
    assert record["digest"] == digest_folder(tmp_path / "n")
    assert "torch" in record["libraries"]
    add({}, numbers=tmp_path / "n", sums=tmp_path / "s", rests=tmp_path / "r")
    assert read_record(tmp_path / "s", "s")["inputs"] == {"numbers": record["digest"]}
    add({}, numbers=tmp_path / "n", more=tmp_path / "n", sums=tmp_path / "s", rests=tmp_path / "r")
    assert set(read_record(tmp_path / "s", "s")["inputs"]) == {"numbers", "more"}


def test_an_artifact_knows_all_that_it_was_made_from(tmp_path: Path) -> None:
    count({"number": 4}, numbers=tmp_path / "n")
    add({}, numbers=tmp_path / "n", sums=tmp_path / "s", rests=tmp_path / "r")
    add({"number": 2}, numbers=tmp_path / "s", sums=tmp_path / "s2", rests=tmp_path / "r2")
    first, second, third = (read_record(tmp_path / name, name) for name in ("n", "s", "s2"))
    assert first["lineage"] == {}
    assert second["lineage"] == {first["digest"]: {"step": "count", "config": {"number": 4}, "inputs": {}}}
    made = {"step": "add", "config": {"number": 3}, "inputs": {"numbers": first["digest"]}}
    assert third["lineage"] == {**second["lineage"], second["digest"]: made}


def test_the_same_work_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        count({"number": 4, "num_workers": len(name)}, numbers=str(tmp_path / name))
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    count({"number": 5}, numbers=tmp_path / "two")
    assert read_record(tmp_path / "two", "")["digest"] != read_record(tmp_path / "one", "")["digest"]


def test_kubeflow_turns_integers_into_floats(tmp_path: Path) -> None:
    count({"number": 4.0}, numbers=tmp_path / "n")
    assert json.dumps(read_record(tmp_path / "n", "n")["config"]) == '{"number": 4}'
    with pytest.raises(ValueError, match=r"count\.number: found 4\.5, wanted a valid integer") as caught:
        count({"number": 4.5}, numbers=tmp_path / "n")
    one_line(caught)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nmuber": 3}, "count.nmuber: found an unknown key"),
        ({"number": "many"}, "count.number: found 'many', wanted a valid integer"),
        ({"number": 0}, "count.number: found 0, wanted greater than or equal to 1"),
        ({"number": None}, "count.number: found None"),
        ([1, 2], "count: found [1, 2], wanted a valid dictionary"),
    ],
)
def test_a_wrong_configuration_is_refused_before_anything_is_touched(
    values: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"count") as caught:
        count(values, numbers=tmp_path / "n")
    assert message in one_line(caught)
    assert names(tmp_path) == []


def test_paths_must_be_those_of_the_signature(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"wanted \['numbers', 'more', 'sums', 'rests'\]: add \['rests'\]") as caught:
        add({}, numbers=tmp_path / "n", sums=tmp_path / "s")
    one_line(caught)
    with pytest.raises(ValueError, match=r"leave out \['corpus'\]") as caught:
        add({}, numbers=tmp_path / "n", sums=tmp_path / "s", rests=tmp_path / "r", corpus=tmp_path)
    one_line(caught)
    with pytest.raises(ValueError, match=r"add \['numbers'\]"):
        add({}, numbers=None, sums=tmp_path / "s", rests=tmp_path / "r")


def test_an_input_must_be_an_artifact(tmp_path: Path) -> None:
    paths = {"sums": tmp_path / "s", "rests": tmp_path / "r"}
    with pytest.raises(ValueError, match="found nothing there, wanted an artifact: run the step") as caught:
        add({}, numbers=tmp_path / "n", **paths)
    one_line(caught)
    (tmp_path / "n").mkdir()
    with pytest.raises(ValueError, match=r"found a folder without artifact\.json"):
        add({}, numbers=tmp_path / "n", **paths)
    (tmp_path / "n" / "artifact.json").write_text("{")
    with pytest.raises(ValueError, match="found no valid JSON") as caught:
        add({}, numbers=tmp_path / "n", **paths)
    one_line(caught)


def test_an_input_that_says_it_is_absent_was_not_given(tmp_path: Path) -> None:
    count({}, numbers=tmp_path / "numbers")
    absent, made = tmp_path / "absent", {}
    write_absence(absent, "nothing in service")
    for name, given in {"without": {}, "absent": {"more": absent}, "with": {"more": tmp_path / "numbers"}}.items():
        outputs = {"sums": tmp_path / name / "sums", "rests": tmp_path / name / "rests"}
        add({}, numbers=tmp_path / "numbers", **outputs, **given)
        made[name] = (outputs["sums"] / "artifact.json").read_bytes()
    assert made["absent"] == made["without"] != made["with"]
    with pytest.raises(ValueError, match=r"absent: found a folder without artifact\.json"):
        add({}, numbers=absent, **outputs)


@pytest.mark.parametrize("number", [13, 14], ids=["exception", "exit"])
def test_a_step_that_ends_early_leaves_nothing_but_its_scratch(number: int, tmp_path: Path, runs: Path) -> None:
    with pytest.raises((RuntimeError, SystemExit)):
        count({"number": number}, numbers=tmp_path / "n")
    assert names(tmp_path) == ["runs"]
    (kept,) = runs.iterdir()
    assert names(kept) == ["begun"]


def test_a_step_that_fails_leaves_the_artifact_of_before(tmp_path: Path) -> None:
    count({"number": 2}, numbers=tmp_path / "n")
    before = {p.name: p.read_bytes() for p in (tmp_path / "n").iterdir()}
    with pytest.raises(RuntimeError):
        count({"number": 13}, numbers=tmp_path / "n")
    assert {p.name: p.read_bytes() for p in (tmp_path / "n").iterdir()} == before
    count({"number": 1}, numbers=tmp_path / "n")
    assert names(tmp_path / "n") == ["0.txt", "artifact.json"], "nothing of the old one stays"


def test_what_a_kill_left_behind_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".n.partial").mkdir()
    (tmp_path / ".n.partial" / "old.txt").write_text("old")
    (tmp_path / ".n.old").mkdir()
    count({"number": 1}, numbers=tmp_path / "n")
    assert names(tmp_path / "n") == ["0.txt", "artifact.json"]
    assert names(tmp_path) == ["n", "runs"]


def test_scratch_belongs_to_configuration_and_inputs_and_goes_with_success(tmp_path: Path, runs: Path) -> None:
    for number in (13, 14, 13):
        with pytest.raises((RuntimeError, SystemExit)):
            count({"number": number}, numbers=tmp_path / "n")
    assert len(names(runs)) == 2
    count({"number": 3}, numbers=tmp_path / "n")
    assert len(names(runs)) == 2
    count({"number": 3}, numbers=tmp_path / "n", scratch=tmp_path / "mine")
    assert names(tmp_path / "mine") == ["begun"], "a scratch folder that was given is left to its owner"


def test_nothing_but_an_artifact_is_replaced(tmp_path: Path) -> None:
    holiday = tmp_path / "photos"
    holiday.mkdir()
    count({}, numbers=holiday)
    (holiday / "artifact.json").unlink()
    with pytest.raises(ValueError, match="found something that is no artifact") as caught:
        count({}, numbers=holiday)
    one_line(caught)
    assert names(holiday) == ["0.txt", "1.txt", "2.txt"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="found something that is no artifact"):
        count({}, numbers=tmp_path / "file")


def test_an_output_never_replaces_an_input(tmp_path: Path) -> None:
    count({}, numbers=tmp_path / "n")
    with pytest.raises(ValueError, match="found an input's path") as caught:
        add({}, numbers=tmp_path / "n", sums=tmp_path / "x" / ".." / "n", rests=tmp_path / "r")
    one_line(caught)
    assert (tmp_path / "n" / "2.txt").exists()


def test_other_ranks_leave_the_folders_to_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count({}, numbers=tmp_path / "first")
    monkeypatch.setenv("RANK", "1")
    (tmp_path / ".n.partial").mkdir()
    count({}, numbers=tmp_path / "n")
    assert not (tmp_path / "n").exists()
    assert names(tmp_path / ".n.partial") == ["0.txt", "1.txt", "2.txt"]


def test_the_digest_is_of_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    digests = [digest_folder(tmp_path)]
    (tmp_path / "a" / "x").write_text("2")
    digests.append(digest_folder(tmp_path))
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    digests.append(digest_folder(tmp_path))
    assert len(set(digests)) == 3
    (tmp_path / "artifact.json").write_text("{}")
    os.utime(tmp_path / "a" / "y", (0, 0))
    assert digest_folder(tmp_path) == digests[-1], "neither the record nor times count"
