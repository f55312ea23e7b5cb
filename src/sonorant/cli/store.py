"""`sonorant store …`: artifacts to and from an object store."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from sonorant.data.progress import shown_progress
from sonorant.store.connection import read_settings
from sonorant.store.follow import follow as keep_following
from sonorant.store.shelf import Report, Store

Url = Annotated[str | None, typer.Option("--store", help="s3://BUCKET/PREFIX; default: $SONORANT_STORE")]
Reference = Annotated[str, typer.Argument(help="NAME@ALIAS, NAME@sha256:DIGEST, or a digest's first 8 characters")]
AliasReference = Annotated[str, typer.Argument(help="NAME@ALIAS")]


def push(
    folder: Annotated[Path, typer.Argument(help="an artifact that a step wrote")],
    alias: Annotated[str | None, typer.Option("--alias", help="to move to it, such as production")] = None,
    store: Url = None,
) -> None:
    """Publish an artifact under its digest, then move the alias to it; the same command goes on where it was ended."""
    shelf = Store.from_environment(store)
    with shown_progress(f"push {folder}", "kB") as report:
        digest = shelf.push(folder, alias, in_kilobytes(report))
    print(digest)


def fetch(
    reference: Reference,
    folder: Annotated[Path, typer.Argument(help="where it appears, whole")],
    store: Url = None,
) -> None:
    """Fetch an artifact, its checksums verified; the same command goes on where it was ended."""
    shelf = Store.from_environment(store)
    with shown_progress(f"fetch {reference}", "kB") as report:
        digest = shelf.fetch(reference, folder, in_kilobytes(report))
    print(digest)


def follow(
    reference: Reference,
    folder: Annotated[Path, typer.Argument(help="that holds what the reference stands for")],
    every: Annotated[float, typer.Option("--every", help="seconds between two looks", min=0.1, max=86_400)] = 10,
    store: Url = None,
) -> None:
    """Keep a folder at what an alias stands for, beside a server that reads it; ends on SIGTERM."""
    # The next look is the retry.
    shelf = Store(replace(read_settings(store), retries=0))
    with suppress(KeyboardInterrupt):
        keep_following(shelf, reference, folder, every)


def move(
    reference: Reference,
    alias: Annotated[str, typer.Option("--alias", help="to move, such as production")],
    store: Url = None,
) -> None:
    """Let an alias stand for an artifact that was pushed."""
    print(Store.from_environment(store).move(reference, alias))


def rollback(reference: AliasReference, store: Url = None) -> None:
    """Take back the alias's last move that was not taken back yet; twice leads two back."""
    print(Store.from_environment(store).rollback(reference))


def show(
    name: Annotated[str | None, typer.Argument(help="of an artifact; default: all")] = None, store: Url = None
) -> None:
    """List the artifacts, and the aliases that stand for them."""
    for artifact in Store.from_environment(store).artifacts(name):
        print(f"{artifact.name}@sha256:{artifact.digest}  {','.join(artifact.aliases)}".rstrip())


def log(
    reference: AliasReference,
    limit: Annotated[int, typer.Option("--limit", help="moves at most", min=1)] = 20,
    store: Url = None,
) -> None:
    """List an alias's moves, the newest first: when, how, to which digest, by whom."""
    for move in Store.from_environment(store).history(reference, limit):
        at = move.at.isoformat(timespec="seconds") if move.at else "?"
        print(f"{at}  {move.kind:11}  {move.digest}  {move.by}".rstrip())


def check(
    reads: Annotated[bool, typer.Option("--read-only", help="do not try to write")] = False, store: Url = None
) -> None:
    """Say what is wrong with the settings, the bucket or the key's rights."""
    shelf = Store.from_environment(store)
    shelf.check(writes=not reads)
    where = f"{shelf.settings.url} at {shelf.settings.endpoint}"
    print(f"{where}: reading{'' if reads else ' and writing'} works")


def shard(
    corpus: Annotated[Path, typer.Argument(help="that `prepare` wrote")],
    folder: Annotated[Path, typer.Argument(help="the same corpus, to train on, without its audio")],
    megabytes: Annotated[float, typer.Option("--megabytes", help="of files in a shard at most", min=0.01)] = 256,
    store: Url = None,
) -> None:
    """Write a corpus's audio into the store as Shar shards, the rest of it to a folder; the same command goes on."""
    from sonorant.data.shards import shard_corpus

    with shown_progress(f"shard {corpus}", "kB") as report:
        print(shard_corpus(corpus, folder, store, round(megabytes * 1e6), in_kilobytes(report)))


def unshard(
    folder: Annotated[Path, typer.Argument(help="that `shard` wrote")],
    corpus: Annotated[Path, typer.Argument(help="the same corpus with its audio")],
) -> None:
    """Bring a corpus's audio back from its shards; the same command goes on where it was ended."""
    from sonorant.data.shards import unshard_corpus

    with shown_progress(f"unshard {folder}", "files") as report:
        print(unshard_corpus(folder, corpus, report))


COMMANDS: dict[str, Callable[..., None]] = {
    "push": push,
    "fetch": fetch,
    "follow": follow,
    "move": move,
    "rollback": rollback,
    "list": show,
    "log": log,
    "check": check,
    "shard": shard,
    "unshard": unshard,
}


def in_kilobytes(report: Report) -> Report:
    """A report of bytes that shows kilobytes."""
    return lambda done, total: report(done // 1000, total // 1000)
