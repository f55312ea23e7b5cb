"""A request while it is in hand, as every part of the server that handles it knows it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from serving.edge.keys import Account
from serving.errors import ApiError, shorten

if TYPE_CHECKING:
    from serving.engine.engine import Engine


@dataclass(eq=False)
class Visit:
    """A request while it is in hand.

    account: of its key, where keys are needed. exit: what is given back once its answer has been sent.
    status: of the answer that has begun, else 0; 101 for a WebSocket that was accepted. engine: the one it goes to.
    """

    request_id: str
    started: float
    deadline: float
    account: Account | None = None
    exit: ExitStack = field(default_factory=ExitStack)
    audio_seconds: float = 0.0
    status: int = 0
    engine: Engine | None = None

    def may_use(self, model: str) -> bool:
        """Whether the key is one for that model."""
        return self.account is None or self.account.may_use(model)

    def allow(self, model: str) -> None:
        """Go on with that model; ApiError 403 where the key is for others."""
        if self.account is not None and not self.account.may_use(model):
            key = self.account.key
            raise ApiError(
                403,
                "forbidden",
                f"model: found {shorten(model)}, wanted {' or '.join(key.models or ())}, which key {key.name} is for: "
                "name one, or use another key",
            )

    def charge(self, seconds: float) -> None:
        """Count so much audio against the key's quota; ApiError 429, or 413 where it is more than the whole quota."""
        if self.account is not None:
            self.account.charge(seconds)
        self.audio_seconds += seconds
