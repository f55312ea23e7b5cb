"""Where `sonorant embed` keeps what it gets, told from the name of the output."""

from __future__ import annotations

from pathlib import Path

OTHER_SUFFIXES = {".arrow", ".csv", ".feather", ".json", ".jsonl", ".npy", ".npz", ".pq", ".safetensors", ".txt"}


def is_table(output: Path) -> bool:
    """Whether a Parquet table is wanted, not a folder."""
    return output.suffix == ".parquet"


def check_output(output: Path) -> None:
    """ValueError where nothing can be kept there."""
    taken = output.is_dir() if is_table(output) else output.exists() and not output.is_dir()
    if taken or output.suffix in OTHER_SUFFIXES:
        raise ValueError(f"--output: found {output}, wanted a name that ends in .parquet, or a folder: choose another")


def work_folder(output: Path) -> Path:
    """Where finished answers lie until all are there."""
    return output.with_name(f"{output.name}.parts") if is_table(output) else output


def failures_of(output: Path) -> Path:
    """Where the files are listed that have no answer."""
    return output.with_name(f"{output.name}.failed.jsonl") if is_table(output) else output / "failed.jsonl"
