"""The unit store gives back what was written, and never labels of another rate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sonorant.data.frames import num_frames
from sonorant.data.units import MAX_UNITS, UnitStore, write_units


def labels(num_labels: int, num_units: int = 10, seed: int = 0) -> NDArray[np.int64]:
    """Random units."""
    return np.random.default_rng(seed).integers(num_units, size=num_labels)


@given(st.lists(st.integers(0, 5000), max_size=8))
@settings(deadline=None, max_examples=30)
def test_what_goes_in_comes_out(tmp_path_factory: pytest.TempPathFactory, lengths: list[int]) -> None:
    folder = tmp_path_factory.mktemp("units")
    written = {f"u{row}": (n, labels(num_frames(n), seed=row)) for row, n in enumerate(lengths)}
    write_units(folder, ((name, n, units) for name, (n, units) in written.items()), 10, layer=6)
    store = UnitStore(folder)
    assert len(store) == len(lengths)
    assert (store.num_units, store.about["rate"], store.about["layer"]) == (10, 50, 6)
    for name, (_, units) in written.items():
        np.testing.assert_array_equal(store[name], units)


def test_the_largest_unit_fits(tmp_path: Path) -> None:
    units = np.array([0, MAX_UNITS - 1])
    write_units(tmp_path, [("a", 720, units)], MAX_UNITS)
    np.testing.assert_array_equal(UnitStore(tmp_path)["a"], units)


@pytest.mark.parametrize("num_labels", [48, 50, 98])
def test_other_than_one_label_a_frame_cannot_be_written(tmp_path: Path, num_labels: int) -> None:
    with pytest.raises(ValueError, match=rf"^units: a: found {num_labels} labels for 1 s of audio, wanted 49, .*\.*$"):
        write_units(tmp_path, [("a", 16_000, labels(num_labels))], 10)


def test_a_100_hz_stream_is_refused_by_its_rate(tmp_path: Path) -> None:
    write_units(tmp_path, [("a", 16_000, labels(98))], 10, rate=100)
    with pytest.raises(ValueError, match="found labels at 100 Hz, wanted 50 Hz"):
        UnitStore(tmp_path)
    assert len(UnitStore(tmp_path, rate=100)["a"]) == 98


def test_a_100_hz_stream_is_refused_by_its_lengths_whatever_it_says(tmp_path: Path) -> None:
    write_units(tmp_path, [("a", 16_000, labels(98))], 10, rate=100)
    store = tmp_path / "store.json"
    store.write_text(json.dumps({**json.loads(store.read_text()), "rate": 50}))
    with pytest.raises(ValueError, match="a: found 98 labels for 1 s of audio, wanted 49, one a frame at 50 Hz"):
        UnitStore(tmp_path)


@pytest.mark.parametrize("units", [[0, 10], [-1, 3]])
def test_a_unit_that_does_not_exist_is_refused(tmp_path: Path, units: list[int]) -> None:
    with pytest.raises(ValueError, match="wanted 0 to 9"):
        write_units(tmp_path, [("a", 720, np.array(units))], 10)


@pytest.mark.parametrize("num_units", [0, MAX_UNITS + 1])
def test_more_units_than_fit_are_refused(tmp_path: Path, num_units: int) -> None:
    with pytest.raises(ValueError, match=f"found num_units {num_units}"):
        write_units(tmp_path, [], num_units)


def test_an_utterance_written_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found 'a' twice"):
        write_units(tmp_path, [("a", 720, labels(2)), ("b", 720, labels(2)), ("a", 720, labels(2))], 10)


def test_an_unknown_utterance_is_refused(tmp_path: Path) -> None:
    write_units(tmp_path, [("a", 720, labels(2))], 10)
    store = UnitStore(tmp_path)
    assert "a" in store
    assert "b" not in store
    with pytest.raises(ValueError, match="no labels for 'b'"):
        store["b"]


def test_a_folder_that_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found no store\.json"):
        UnitStore(tmp_path)


@pytest.mark.parametrize("name", ["units.npy", "offsets.npy", "samples.npy", "ids.json", "store.json"])
def test_a_damaged_store_is_refused_on_one_line(tmp_path: Path, name: str) -> None:
    write_units(tmp_path, [("a", 16_000, labels(49)), ("b", 720, labels(2))], 10)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged unit store") as error:
        UnitStore(tmp_path)
    assert "\n" not in str(error.value)


def test_files_of_different_runs_are_refused(tmp_path: Path) -> None:
    for name, count in (("old", 2), ("new", 3)):
        (tmp_path / name).mkdir()
        write_units(tmp_path / name, [(f"u{row}", 720, labels(2)) for row in range(count)], 10)
    (tmp_path / "old" / "ids.json").rename(tmp_path / "new" / "ids.json")
    with pytest.raises(ValueError, match="files of different lengths"):
        UnitStore(tmp_path / "new")
