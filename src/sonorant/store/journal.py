"""Aliases: which artifact is in use under a name, told by a journal that is only ever added to.

    aliases/NAME/ALIAS/99999988-moved-<digest>-<chance>

Every move is an object of its own, and the newest is the alias: so a move is atomic, none is lost where two are made at
once, and this on stores too that do not honour conditional writes. The number counts down, so that the newest comes
first in a listing. Of two moves with the same number, made at once, the first in the listing is the later one.
"""

from __future__ import annotations

import getpass
import json
import re
import secrets
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from sonorant.store.objects import Found, Objects

TOP = 99_999_999
ENTRY = re.compile(r"(\d{8})-(moved|rolled-back)-([0-9a-f]{64})-[0-9a-f]{8}")
Kind = Literal["moved", "rolled-back"]


@dataclass(frozen=True)
class Move:
    """One change of an alias: to which digest, how, when by the store's clock, and by whom."""

    digest: str
    kind: Kind
    at: datetime | None
    by: str


class Journal:
    """The moves of one alias of one name."""

    def __init__(self, objects: Objects, name: str, alias: str) -> None:
        self._objects, self._folder = objects, f"aliases/{name}/{alias}/"

    def current(self) -> str | None:
        """The digest the alias stands for; None where there is no such alias."""
        return next((match[3] for _, match in self._entries()), None)

    def append(self, digest: str, kind: Kind) -> None:
        """Let the alias stand for that digest from now on."""
        last = next((int(match[1]) for _, match in self._entries()), TOP + 1)
        entry = f"{last - 1:08d}-{kind}-{digest}-{secrets.token_hex(4)}"
        content = json.dumps({"digest": digest, "kind": kind, "by": whoami()}, indent=1)
        self._objects.put(self._folder + entry, content.encode())

    def moves(self, limit: int) -> Iterator[Move]:
        """The moves, the newest first."""
        for number, (found, match) in enumerate(self._entries()):
            if number == limit:
                return
            kind: Kind = "moved" if match[2] == "moved" else "rolled-back"
            try:
                by = str(json.loads(self._objects.get(found.name) or b"{}").get("by", ""))
            except (ValueError, AttributeError):
                by = ""
            yield Move(match[3], kind, found.at, by)

    def before(self) -> str | None:
        """The digest that a rollback leads to; None where there was none before the present one."""
        kinds = [(match[2], match[3]) for _, match in self._entries()]
        stack = stack_of(reversed(kinds))
        return stack[-2] if len(stack) > 1 else None

    def _entries(self) -> Iterator[tuple[Found, re.Match[str]]]:
        for found in self._objects.names(self._folder):
            if match := ENTRY.fullmatch(found.name.removeprefix(self._folder)):
                yield found, match


def stack_of(moves: Iterable[tuple[str, str]]) -> list[str]:
    """The digests in service, the present one last, after kinds and digests of all moves from the oldest on.

    A rollback takes back the last move that has not been taken back, so two of them lead two back.
    """
    stack: list[str] = []
    for kind, digest in moves:
        if kind == "rolled-back":
            del stack[-1:]
        if stack[-1:] != [digest]:
            stack.append(digest)
    return stack


def whoami() -> str:
    """User and host, for the journal."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user need have no name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
