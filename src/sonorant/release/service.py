"""The model in service: found, and replaced by a better one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sonorant.artifacts import read_record, write_absence

if TYPE_CHECKING:
    from sonorant.store import Store

PRODUCTION, CANARY = "production", "canary"
"""The aliases that the two services follow."""


def open_store(store: str) -> Store:
    """The store at s3://BUCKET[/PREFIX]; ValueError where none is given."""
    if not store:
        raise ValueError("store: found none, wanted s3://BUCKET[/PREFIX]: give it")
    from sonorant.store import Store

    return Store.from_environment(store)


def resolve(store: str, reference: str) -> str:
    """The digest that a reference such as model@production stands for, "" where there is no store or no such alias."""
    if not store or not reference:
        return ""
    return open_store(store).find(reference) or ""


def find_incumbent(store: str, reference: str, model: Path) -> str:
    """Fetch the model that `reference` stands for into the folder `model`; its digest.

    Where there is no store, or nothing by that name or a digest that is "", the folder says that there is none, and the
    digest is "".
    """
    digest = resolve(store, reference)
    if not digest:
        reason = "no store" if not store else f"nothing in service{f' as {reference}' if reference else ''}"
        write_absence(model, reason)
        print(f"incumbent: {reason}", flush=True)
        return ""
    open_store(store).fetch(digest, model)
    print(f"incumbent: {digest}", flush=True)
    return digest


def release(store: str, alias: str, model: Path, report: Path) -> str:
    """Put a model and its report into the store, then move the alias to both, the model's last; its digest, printed.

    Killed at any moment it leaves in service what was there, or the new model whole.
    Raises ValueError where the report is not of this model, or measured it against another than is in service now.
    """
    shelf = open_store(store)
    made, measured = read_record(model, "model"), read_record(report, "report")
    digest, name = str(made["digest"]), str(made["artifact"])
    if measured["inputs"].get("model") != digest:
        raise ValueError(
            f"report {report}: found it made of the model {measured['inputs'].get('model')}, wanted {digest}: "
            "evaluate this model"
        )
    compared, serving = measured["inputs"].get("previous"), resolve(store, f"{name}@{PRODUCTION}")
    if serving not in ("", digest, compared):
        raise ValueError(
            f"{name}@{PRODUCTION}: found {serving}, wanted {compared or 'nothing'}, with which the report compares the "
            "new model: another was released meanwhile; run again"
        )
    shelf.push(model)
    shelf.push(report, alias=alias)
    shelf.move(f"{name}@sha256:{digest}", alias)
    print(f"release: {name}@{alias} is {name}@sha256:{digest}", flush=True)
    return digest
