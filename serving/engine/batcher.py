"""From many requests to few model calls: a bounded queue that several replicas of the models take batches from.

The engine packs waves of any length without padding, so a result does not depend on the batch it was made in, and a
batch is bounded by the work in it alone. Work is counted in operations of the model, which grow faster than the
audio does.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from serving.engine.wire import Array, Letter, LostError
from sonorant.inference import FRAME_MS, SAMPLE_RATE

PATIENCE = 4.0
"""How many times its own service time a request lets later, shorter ones go first."""
BATCH_SECONDS = 0.4
"""How long a batch of several waves may take: what a short request may have to wait for a core."""
HANG_FACTOR, HANG_SECONDS = 20, 60
"""A replica that takes longer than so many times what is expected, and so many seconds, is lost."""
LONG_SECONDS = 1.0
"""A batch that takes longer is a long one; while short requests come, one replica takes none of those."""
SHORT_MEMORY_SECONDS = 1.0
"""How long a short request makes the next one likely."""
ALONE_SECONDS = 0.5
"""A batch takes the idle replicas' cores too where no two batches have run at once for so long."""
MAX_ATTEMPTS = 2
"""Replicas that may be lost over one wave before it is given up."""


class FullError(Exception):
    """The queue holds all it may; there may be room after `retry_seconds`."""

    def __init__(self, message: str, retry_seconds: float) -> None:
        self.retry_seconds = min(60, max(1, math.ceil(retry_seconds)))
        super().__init__(f"{message}: retry in {self.retry_seconds} s")


class ClosedError(Exception):
    """The queue takes no more work, or was closed before this was done."""


class LateError(Exception):
    """The deadline came before the result."""


class WaveError(Exception):
    """The model could not make anything of a wave. kind: bad_audio or internal."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Pass:
    """What waves must have in common to share a batch: the model, the layer or the layers' weights, and whether they
    are led by what makes a query of them."""

    model: str
    layer: int | tuple[float, ...]
    led: bool = False


@dataclass(frozen=True)
class Search:
    """What is wanted of the images: how many, and whether with a small picture of each."""

    top: int
    thumbnails: bool


@dataclass(eq=False)
class Item:
    """One wave on its way through a model. spell: to units rather than frames; moments: those of its recording;
    search: to the images that it speaks of."""

    key: Pass
    wave: Array
    operations: float
    spell: bool = False
    moments: Array | None = None
    search: Search | None = None
    ticket: Ticket = field(init=False)
    result: asyncio.Future[Array] = field(init=False)
    attempts: int = 0
    started: float | None = None
    finished: float | None = None


@dataclass(eq=False)
class Ticket:
    """What one request has been admitted with, until it is given back; use it as a context."""

    items: list[Item]
    seconds: float
    operations: float
    arrived: float
    deadline: float
    release: Callable[[Ticket], None]

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, *_: object) -> None:
        for item in self.items:
            item.result.cancel()
        self.release(self)


class Replica(Protocol):
    """One copy of the models that runs one batch at a time."""

    async def run(self, order: Letter) -> Letter:
        """The answer to a batch; LostError where the replica is gone."""

    async def stop(self) -> None:
        """End it at once."""


class Batcher:
    """The queue, and a server for each replica.

    The next request to be served is the one with the least of arrival + PATIENCE × its own service time, so short ones
    pass long ones, but not for ever; one whose deadline comes near is served before that.
    """

    def __init__(self, *, max_seconds: float, max_batch_seconds: float, observe: Callable[[Batch], None]) -> None:
        self.max_seconds, self.max_batch_seconds, self.observe = max_seconds, max_batch_seconds, observe
        self.waiting: list[Item] = []
        self._samples = 0  # of audio admitted whose answers are not yet sent
        self.draining = self._closed = False
        self.pace = 1e9
        """Operations one replica does in a second, smoothed."""
        self.num_cores = 1
        """That the replicas have together, one each: what a lone request may take."""
        self._num_held = 0  # of `hold`
        self._running = 0.0  # operations in the replicas' hands
        self._num_free = 0  # replicas that have none
        self._shared = 0.0  # when two replicas last had some at once
        self._num_long = 0  # replicas that have a long batch
        self._short = -math.inf  # when a short request last came
        self._idle: deque[asyncio.Future[None]] = deque()
        self._servers: list[asyncio.Task[None]] = []

    @property
    def seconds(self) -> float:
        """Audio admitted whose answers are not yet sent."""
        return self._samples / SAMPLE_RATE

    def start(self, replicas: Sequence[Replica], supply: Callable[[Replica], Awaitable[Replica]]) -> None:
        """Begin to work with these, in the running event loop; `supply` makes another in the place of a lost one."""
        self._servers = [asyncio.create_task(self._serve(replica, supply)) for replica in replicas]

    # ------------------------------------------------------------------------------------------------ admission

    def admit(self, items: list[Item], *, seconds: float, deadline: float, held: bool = False) -> Ticket:
        """Take all of `items`, of a request with so much audio, or none; their results are in time or LateError.

        Raises FullError, or ClosedError while draining; where they are `held`, see `hold`, only once that has ended.
        """
        if self._closed or (self.draining and not held):
            raise ClosedError("queue: found it closed, wanted it open")
        if self.seconds + seconds > self.max_seconds:
            raise FullError(
                f"queue: found {self.seconds:.1f} s of audio in hand and {seconds:.1f} s offered, "
                f"wanted at most {self.max_seconds:g} s together",
                self._wait_for(sum(item.operations for item in self.waiting)),
            )
        loop, now = asyncio.get_running_loop(), time.monotonic()
        ticket = Ticket(items, seconds, sum(item.operations for item in items), now, deadline, self._release)
        for item in items:
            item.ticket = ticket
        longest = max((item.operations for item in items), default=0.0)
        own = max(ticket.operations / max(1, len(self._servers)), longest) / self.pace
        self._check_time(now, deadline, self._rank(ticket), own)
        if ticket.operations / self.pace < LONG_SECONDS:
            self._short = now
        for item in items:
            item.result = loop.create_future()
            # An error of a result nobody waits for any more is no news.
            item.result.add_done_callback(lambda result: result.cancelled() or result.exception())
        self.waiting.extend(items)
        self._samples += round(seconds * SAMPLE_RATE)
        self._wake(len(items))
        return ticket

    def check_time(self, deadline: float) -> None:
        """FullError where the queue is so long that not even a moment's audio could be done by then."""
        now = time.monotonic()
        self._check_time(now, deadline, now, 0.0)

    def _check_time(self, now: float, deadline: float, rank: float, own: float) -> None:
        ahead = self._wait_for(sum(item.operations for item in self.waiting if self._rank(item.ticket) <= rank))
        # What waits will share a batch, and is done when all of it is.
        wait = ahead + max(own, min(ahead, BATCH_SECONDS))
        if now + wait > deadline:
            raise FullError(
                f"queue: found {wait:.1f} s until this would be done, wanted at most {max(0, deadline - now):.1f} s",
                now + wait - deadline,
            )

    def _release(self, ticket: Ticket) -> None:
        self._samples -= round(ticket.seconds * SAMPLE_RATE)
        self.waiting = [item for item in self.waiting if item.ticket is not ticket]

    def _wait_for(self, operations: float) -> float:
        return (self._running / 2 + operations) / self.pace / max(1, len(self._servers))

    def _rank(self, ticket: Ticket) -> float:
        service = ticket.operations / self.pace
        allowed = ticket.deadline - ticket.arrived
        latest = ticket.deadline - min(1.5 * service / max(1, len(self._servers)), allowed / 2)
        return min(ticket.arrived + PATIENCE * service, latest)

    # -------------------------------------------------------------------------------------------------- closing

    @contextmanager
    def hold(self) -> Iterator[None]:
        """While it lasts a drain does not end: what goes on over many admissions, and was begun, may be finished."""
        self._num_held += 1
        try:
            yield
        finally:
            self._num_held -= 1
            if self.draining:
                self._wake(len(self._idle))

    def drain(self) -> None:
        """Admit nothing more; what was admitted will be done."""
        self.draining = True
        self._wake(len(self._idle))

    async def close(self, timeout: float | None) -> None:
        """Drain for at most `timeout` seconds, then fail what is left with ClosedError."""
        self.drain()
        if self._servers:
            _, late = await asyncio.wait(self._servers, timeout=timeout)
            self._closed = True
            for server in late:
                server.cancel()
            await asyncio.gather(*self._servers, return_exceptions=True)
        for item in self.waiting:
            settle(item, ClosedError("queue: found it closed before this was done"))
        self.waiting = []

    # --------------------------------------------------------------------------------------------------- work

    def _wake(self, count: int) -> None:
        for _ in range(count):
            if self._idle:
                idle = self._idle.popleft()
                if not idle.done():
                    idle.set_result(None)

    async def _serve(self, replica: Replica, supply: Callable[[Replica], Awaitable[Replica]]) -> None:
        while True:
            self._num_free += 1
            while not (batch := self._choose()):
                if self.draining and not self._num_held:
                    return
                idle = asyncio.get_running_loop().create_future()
                self._idle.append(idle)
                await idle
            self._num_free -= 1
            num_threads = self._num_threads()
            operations = sum(item.operations for item in batch)
            is_long = operations / self.pace > LONG_SECONDS
            self._running += operations
            self._num_long += is_long
            try:
                await self._run(replica, batch, operations, num_threads)
            except LostError:
                for item in batch:
                    item.attempts += 1
                    if item.attempts >= MAX_ATTEMPTS:
                        settle(item, LostError("model: found its process lost twice over this audio"))
                self.waiting = [*(item for item in batch if not item.result.done()), *self.waiting]
                replica = await supply(replica)
            finally:
                self._running -= operations
                self._num_long -= is_long

    def _num_threads(self) -> int:
        """How many cores a batch may take that begins now: one, but for a request that comes alone."""
        now = time.monotonic()
        if self.waiting or self._num_free < len(self._servers) - 1:
            self._shared = now
        return 1 if now - self._shared < ALONE_SECONDS else self.num_cores

    async def _run(self, replica: Replica, batch: list[Item], operations: float, num_threads: int) -> None:
        started = time.monotonic()
        for item in batch:
            item.started = started
        try:
            async with asyncio.timeout(HANG_SECONDS + HANG_FACTOR * operations / self.pace):
                answer = await replica.run(order_of(batch, num_threads))
        except TimeoutError:
            await replica.stop()
            raise LostError("replica: found no answer") from None
        except asyncio.CancelledError:
            for item in batch:
                settle(item, ClosedError("queue: found it closed before this was done"))
            raise
        seconds = answer.fields["seconds"]
        if num_threads == 1:
            self.pace += 0.2 * (operations / max(seconds, 1e-6) - self.pace)
        self.observe(Batch.of(batch, started, answer.fields))
        finished = time.monotonic()
        for item, array, error in zip(batch, answer.arrays, answer.fields["errors"], strict=True):
            item.finished = finished
            settle(item, array if error is None else WaveError(error["kind"], error["message"]))

    def _choose(self) -> list[Item]:
        """The next batch, taken from the queue: what has been given up or is late is not in it."""
        now = time.monotonic()
        for item in self.waiting:
            if item.ticket.deadline < now + item.operations / self.pace:
                settle(item, LateError("queue: found too little time left to do this, wanted more"))
        self.waiting = [item for item in self.waiting if not item.result.done()]
        ranks = {item: self._rank(item.ticket) for item in self.waiting if self._may_begin(item, now)}
        if not ranks:
            if self.waiting:
                asyncio.get_running_loop().call_later(SHORT_MEMORY_SECONDS, self._wake, 1)
            return []
        first = min(ranks, key=ranks.__getitem__)
        # What a replica was lost over goes alone.
        alike = [item for item in ranks if item.key == first.key and not item.attempts and item is not first]
        alike = [] if first.attempts else alike
        # Where other replicas have nothing to do, each is left its share.
        share = (sum(item.operations for item in alike) + first.operations) / self._num_free
        time_left = min(BATCH_SECONDS, first.ticket.deadline - now)
        room = min(share, time_left * self.pace) - first.operations
        seconds = self.max_batch_seconds * SAMPLE_RATE - len(first.wave)
        batch = [first]
        for item in sorted(alike, key=lambda item: (ranks[item], item.operations)):
            room, seconds = room - item.operations, seconds - len(item.wave)
            if room < 0 or seconds < 0:
                break
            batch.append(item)
        taken = set(batch)
        self.waiting = [item for item in self.waiting if item not in taken]
        return batch

    def _may_begin(self, item: Item, now: float) -> bool:
        """Whether a free replica may take it: not the last one for a long one, while short requests come."""
        if item.operations / self.pace <= LONG_SECONDS or len(self._servers) == 1:
            return True
        return self._num_long < len(self._servers) - 1 or now - self._short > SHORT_MEMORY_SECONDS


@dataclass(frozen=True)
class Batch:
    """One call of a model, as it is counted. queue: seconds each wave waited; padding: audio that is none."""

    num_waves: int
    audio_seconds: float
    padding_seconds: float
    seconds: float
    queue: tuple[float, ...]
    fields: dict[str, Any]

    @classmethod
    def of(cls, items: Sequence[Item], started: float, fields: dict[str, Any]) -> Batch:
        """The batch of `items` that was started then and answered with `fields`."""
        lengths = [len(item.wave) for item in items]
        padding = sum(-length % (FRAME_MS * SAMPLE_RATE // 1000) for length in lengths)
        queue = tuple(started - item.ticket.arrived for item in items)
        return cls(len(items), sum(lengths) / SAMPLE_RATE, padding / SAMPLE_RATE, fields["seconds"], queue, fields)


def order_of(batch: Sequence[Item], num_threads: int) -> Letter:
    """The letter that asks a replica for the batch."""
    items = [
        {
            "spell": item.spell,
            "moments": item.moments is not None,
            "search": None if item.search is None else asdict(item.search),
        }
        for item in batch
    ]
    fields = {"model": batch[0].key.model, "layer": batch[0].key.layer, "items": items, "num_threads": num_threads}
    return Letter(fields, [item.wave for item in batch] + [i.moments for i in batch if i.moments is not None])


def settle(item: Item, outcome: Array | Exception) -> None:
    """Give the item's waiter its outcome, where somebody still waits."""
    if item.result.done():
        return
    if isinstance(outcome, Exception):
        item.result.set_exception(outcome)
    else:
        item.result.set_result(outcome)
