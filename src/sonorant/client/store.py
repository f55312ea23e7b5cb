"""Where answers are kept: a folder with one safetensors file for each, or a Parquet table made from such a folder.

An answer is there whole or not at all, so a killed run goes on where it was; it holds no time and no host, so that
what is there in the end does not tell whether the run was interrupted. As make does, an answer is taken for missing
where its audio has changed since.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from sonorant.client.outputs import failures_of, is_table, work_folder
from sonorant.client.service import Answer

Array = NDArray[Any]
Fields = dict[str, Any]
RECORD, INDEX = "embed.json", "index.jsonl"
SAID = "sonorant"
"""The one key of a file's metadata: safetensors writes several in any order."""
GROUP_BYTES, GROUP_ROWS = 1 << 26, 4096  # of a row group: whichever comes first


class Folder:
    """The answers in a folder, and what they were asked for with.

    settings: what every answer depends on beside its audio. Raises ValueError where the folder holds something else,
    or answers of other settings, or where another process is at work there.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], output: Path | None = None) -> None:
        self.folder, self.settings, self.output = folder, settings, output or folder
        if folder.is_dir() and not (folder / RECORD).is_file() and any(is_foreign(path) for path in folder.iterdir()):
            wanted = f"wanted an empty folder, or one of `sonorant embed` with its {RECORD}: name another --output"
            raise ValueError(f"{folder}: found other files in it, {wanted}")
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock(folder, self.output)
        try:
            if (folder / RECORD).is_file():
                compare(self.output, read_settings(folder / RECORD), settings)
            else:
                with written_whole(folder / RECORD) as file:
                    file.write(json.dumps(settings, indent=1, sort_keys=True).encode() + b"\n")
            for left in folder.glob(".*.partial"):
                left.unlink()
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)

    @property
    def failures(self) -> Path:
        """Where the files are listed that have no answer."""
        return failures_of(self.output)

    def check_files(self, files: Sequence[str]) -> None:
        """ValueError where answers to other files would be lost; a folder keeps them."""

    def missing(self, files: Sequence[str]) -> list[str]:
        """Those without an answer that is newer than they are; older ones are forgotten."""
        return [file for file in files if not self._has(file)]

    def _has(self, file: str) -> bool:
        part = self.folder / name_of(file)
        if not part.is_file():
            return False
        if os.stat(file).st_mtime_ns <= part.stat().st_mtime_ns:
            return True
        part.unlink()
        return False

    def put(self, file: str, answer: Answer, asked_ns: int) -> None:
        """Keep an answer. asked_ns: when its audio began to be read."""
        said = {"path": printable(file), **answer.about, **{k: self.settings[k] for k in ("model", "digest", "layer")}}
        arrays = {name: np.ascontiguousarray(array) for name, array in answer.arrays.items()}
        part = self.folder / name_of(file)
        with written_whole(part) as written:
            written.write(safetensors.numpy.save(arrays, metadata={SAID: json.dumps(said, sort_keys=True)}))
        os.utime(part, ns=(asked_ns, asked_ns))

    def drop(self, files: Sequence[str]) -> None:
        """Forget answers."""
        for file in files:
            (self.folder / name_of(file)).unlink(missing_ok=True)

    def finish(self, files: Sequence[str]) -> None:
        """All of these are answered: say in their order which answer is whose."""
        self._check_unchanged(files)
        lines = [json.dumps({"path": printable(file), "file": name_of(file)}) + "\n" for file in files]
        with written_whole(self.folder / INDEX) as index:
            index.write("".join(lines).encode())

    def _check_unchanged(self, files: Sequence[str]) -> None:
        if changed := self.missing(files):
            wanted = "wanted them as they were: run the same command again"
            raise ValueError(f"{changed[0]}: found {len(changed)} files changed while they were sent, {wanted}")


class Table(Folder):
    """The same as one Parquet table: answers wait beside it until all are there, then they are merged in order."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.old: dict[str, tuple[int, int]] = {}
        """Of the table that is there, the row group and the row in it of each file."""
        if path.exists():
            self.parquet = open_table(path)
            said = (self.parquet.schema_arrow.metadata or {}).get(SAID.encode())
            if said is None:
                raise ValueError(f"{path}: found no table of `sonorant embed`, wanted one or nothing: move it away")
            compare(path, json.loads(said), settings)
            for group in range(self.parquet.num_row_groups):
                paths = self.parquet.read_row_group(group, columns=["path"])["path"].to_pylist()
                self.old |= {text: (group, row) for row, text in enumerate(paths)}
        self.kept = dict(self.old)
        """Of its rows, those that are newer than their audio."""
        super().__init__(work_folder(path), settings, path)

    def check_files(self, files: Sequence[str]) -> None:
        """ValueError where the table has rows that would be lost."""
        lost = sorted(self.old.keys() - {printable(file) for file in files})
        if lost:
            wanted = "wanted all of them among the files: name them too, or another --output"
            raise ValueError(f"{self.path}: found rows of {len(lost)} other files, {lost[0]} the first, {wanted}")

    def _has(self, file: str) -> bool:
        if super()._has(file):
            return True
        text = printable(file)
        if text in self.kept and os.stat(file).st_mtime_ns > self.path.stat().st_mtime_ns:
            del self.kept[text]
        return text in self.kept

    def finish(self, files: Sequence[str]) -> None:
        """Merge what was there with what is new, in the order of the files, and remove the parts."""
        began = time.time_ns()
        self._check_unchanged(files)
        has_parts = any((self.folder / name_of(file)).is_file() for file in files)
        order = [text for file in files if (text := printable(file)) in self.kept]
        if has_parts or order != list(self.old) or not self.path.exists():
            with written_whole(self.path) as file:
                write_table(file, self._rows(files), self.settings)
            os.utime(self.path, ns=(began, began))
        shutil.rmtree(self.folder)

    def _rows(self, files: Sequence[str]) -> Iterator[Row]:
        @lru_cache(maxsize=1)
        def group_of(index: int) -> Any:
            return self.parquet.read_row_group(index)

        for file in files:
            if (part := self.folder / name_of(file)).is_file():
                yield read_part(part)
            elif (place := self.kept.get(printable(file))) is not None:
                yield row_of(group_of(place[0]), place[1])


def open_store(output: Path, settings: Mapping[str, Any]) -> Folder:
    """A table where the name ends in .parquet, else a folder."""
    if is_table(output):
        return Table(output, settings)
    return Folder(output, settings)


# ------------------------------------------------------------------------------------------------------- files


def name_of(file: str) -> str:
    """An answer's name: like its audio's, and no other file's."""
    path = os.fsencode(file)
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", os.path.splitext(os.path.basename(printable(file)))[0])[:80]
    return f"{stem.lstrip('.')}-{hashlib.sha256(path).hexdigest()[:16]}.safetensors"


def printable(file: str) -> str:
    """A path as text that can be written as UTF-8, whatever its bytes."""
    return os.fsencode(file).decode("utf-8", "backslashreplace")


def is_foreign(path: Path) -> bool:
    """Whether a killed run cannot have left this before it wrote its record."""
    return not path.name.endswith(".partial")


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """A file that is at `path` only once it is whole."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def lock(folder: Path, output: Path) -> int:
    """A descriptor that keeps other processes out of a folder until it is closed, or this process is gone."""
    descriptor = os.open(folder, os.O_RDONLY)
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ValueError(f"{output}: found another run at work on it, wanted none: wait for it or end it") from None
    return descriptor


def read_settings(path: Path) -> Fields:
    """What a folder's answers were asked for with."""
    try:
        settings: Fields = json.loads(path.read_bytes())
        return {**settings}
    except (ValueError, TypeError):
        raise ValueError(f"{path}: found no JSON, wanted its answers' settings: delete the folder") from None


def compare(output: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """ValueError that names the first setting in which answers that are there differ from those that are asked for."""
    for name in [*wanted, *found]:
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{output}: found answers of {name} {found.get(name)}, wanted {name} {wanted.get(name)}: "
                "name another --output, or ask as before"
            )


# -------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Row:
    """One file's answer on its way into the table. fields: path, seconds, num_frames, start_ms."""

    fields: Fields
    arrays: Mapping[str, Array]


def read_part(path: Path) -> Row:
    """An answer that waits beside the table."""
    try:
        with safe_open(path, framework="numpy") as file:
            said = json.loads(file.metadata()[SAID])
            return Row(said, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (no mapping)
    except (SafetensorError, TypeError, KeyError, ValueError):
        wanted = "wanted an answer: delete it and run the same command again"
        raise ValueError(f"{path}: found it damaged, {wanted}") from None


def open_table(path: Path) -> Any:
    """A Parquet file; ValueError where it is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        raise ValueError(f"{path}: found no Parquet, wanted a table of `sonorant embed`: move it away") from None


def row_of(table: Any, row: int) -> Row:
    """An answer that is in a table already."""
    import pyarrow as pa

    arrays = {}
    for name in {"embedding", "units", "durations_ms"} & set(table.column_names):
        if table[name][row].is_valid:
            values, shape = table[name][row].values, [-1]
            if pa.types.is_fixed_size_list(values.type):
                values, shape = values.flatten(), [-1, values.type.list_size]
            arrays[name] = values.to_numpy().reshape(shape)
    return Row({name: table[name][row].as_py() for name in ("path", "seconds", "num_frames", "start_ms")}, arrays)


def write_table(file: IO[bytes], rows: Iterator[Row], settings: Mapping[str, Any]) -> None:
    """Write the rows in groups; the same rows give the same bytes."""
    import pyarrow.parquet as pq

    first = next(groups := grouped(rows), [])
    schema = schema_of(settings, first)
    with pq.ParquetWriter(file, schema, use_dictionary=["model", "digest"]) as writer:
        writer.write_table(table_of(first, schema, settings))
        for group in groups:
            writer.write_table(table_of(group, schema, settings))


def grouped(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Rows that go into the table together."""
    held: list[Row] = []
    size = 0
    for row in rows:
        held.append(row)
        size += sum(array.nbytes for array in row.arrays.values())
        if size >= GROUP_BYTES or len(held) >= GROUP_ROWS:
            yield held
            held, size = [], 0
    if held:
        yield held


def schema_of(settings: Mapping[str, Any], rows: Sequence[Row]) -> Any:
    """The table's columns; the rows tell the size of a vector and whether there is one a frame."""
    import pyarrow as pa

    fields = [("path", pa.string()), ("seconds", pa.float64()), ("num_frames", pa.int32()), ("start_ms", pa.int64())]
    if settings["kind"] == "units":
        fields += [("units", pa.list_(pa.int32())), ("durations_ms", pa.list_(pa.int32()))]
    else:
        shape = rows[0].arrays["embedding"].shape if rows else (settings["dim"],)
        vector = pa.list_(pa.float32(), shape[-1])
        fields += [("embedding", pa.list_(vector) if settings["pooling"] == "none" else vector)]
    fields += [("model", pa.string()), ("digest", pa.string()), ("layer", pa.int32())]
    if isinstance(settings["layer"], list):
        fields += [("layer_weights", pa.list_(pa.float64()))]
    return pa.schema(fields, {SAID: json.dumps(settings, sort_keys=True)})


def table_of(rows: Sequence[Row], schema: Any, settings: Mapping[str, Any]) -> Any:
    """Rows as a table; frames go in without a copy of each."""
    import pyarrow as pa

    layer = settings["layer"]
    same = {"model": settings["model"], "digest": settings["digest"], "layer": layer, "layer_weights": layer}
    same["layer"] = None if isinstance(layer, list) else layer
    columns = []
    for field in schema:
        if field.name in same:
            columns.append(pa.array([same[field.name]] * len(rows), field.type))
        elif field.name in ("embedding", "units", "durations_ms"):
            columns.append(column_of([row.arrays.get(field.name) for row in rows], field.type))
        else:
            columns.append(pa.array([row.fields[field.name] for row in rows], field.type))
    return pa.Table.from_arrays(columns, schema=schema)


def column_of(arrays: Sequence[Array | None], kind: Any) -> Any:
    """Arrays (T,), (T, D) or (D,) as a column of lists."""
    import pyarrow as pa

    there = [array for array in arrays if array is not None]
    if len(there) < len(arrays) or not there:
        return pa.array([None if array is None else array.tolist() for array in arrays], kind)
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(there)), type=kind)
    values = np.concatenate(there)
    if pa.types.is_fixed_size_list(kind.value_type):
        inner = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=kind.value_type)
    else:
        inner = pa.array(values, kind.value_type)
    offsets = np.cumsum([0, *(len(array) for array in there)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), inner, type=kind)
