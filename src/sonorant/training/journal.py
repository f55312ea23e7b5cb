"""The journal: one JSON object per logged update. It holds no time, so the same run writes the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Journal:
    """journal.jsonl in a run directory."""

    def __init__(self, path: Path, after: int = 0) -> None:
        """Open it and forget what was written beyond update `after`: those updates will be done again."""
        self.path = path
        kept = [entry for entry in read_journal(path) if entry["update"] <= after]
        staged = path.with_name(f".{path.name}.partial")
        staged.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        staged.replace(path)

    def write(self, **entry: Any) -> None:
        """Add an entry and push it to the disk's cache."""
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def read_journal(path: Path) -> list[dict[str, Any]]:
    """All whole entries, none where there is no file; a last line cut off by a kill is left out."""
    entries = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries


def last_numbers(path: Path) -> dict[str, float]:
    """What the last entry says of the losses."""
    entry = read_journal(path)[-1]
    return {name: value for name, value in entry.items() if name not in ("update", "learning_rate")}
