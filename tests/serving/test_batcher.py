"""The queue and its replicas, which compute something from the wave."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from serving.engine.batcher import (
    Batch,
    Batcher,
    ClosedError,
    FullError,
    Item,
    LateError,
    LostError,
    Pass,
    Ticket,
    WaveError,
    settle,
)
from serving.engine.wire import Array, Letter

UNITS, LAYER_3, LAYER_4 = Pass("tiny", 2), Pass("tiny", 3), Pass("tiny", 4)
SECOND = 16_000
OPERATIONS = 1e6
"""Of a second of audio; the batcher is told that a replica does as many in a second."""


class Doubler:
    """Doubles each wave; holds still while told to; cannot do waves that begin with 13, is lost over those with 17."""

    def __init__(self, batches: list[tuple[int, list[float]]]) -> None:
        self.batches = batches
        self.may_run = asyncio.Event()
        self.may_run.set()
        self.stopped = False

    async def run(self, order: Letter) -> Letter:
        await self.may_run.wait()
        self.batches.append((order.fields["layer"], [len(wave) / SECOND for wave in order.arrays]))
        if any(wave[0] == 17 for wave in order.arrays):
            raise LostError("killed")
        seconds = sum(len(wave) for wave in order.arrays) / SECOND
        bad = {"kind": "internal", "message": "poison"}
        errors = [bad if wave[0] == 13 else None for wave in order.arrays]
        fields = {"errors": errors, "seconds": seconds, "peak_bytes": 1, "device_bytes": 0}
        return Letter(fields, [2 * wave for wave in order.arrays])

    async def stop(self) -> None:
        self.stopped = True


class Bench:
    """A batcher at work, its replicas and what it did."""

    def __init__(self, num_replicas: int = 1, max_batch_seconds: float = 10, max_seconds: float = 100) -> None:
        self.batches: list[tuple[int, list[float]]] = []
        self.observed: list[Batch] = []
        self.batcher = Batcher(
            max_seconds=max_seconds, max_batch_seconds=max_batch_seconds, observe=self.observed.append
        )
        self.batcher.pace = OPERATIONS
        self.replicas = [Doubler(self.batches) for _ in range(num_replicas)]
        self.supplied = 0

    async def supply(self, _: object) -> Doubler:
        self.supplied += 1
        return Doubler(self.batches)

    def admit(
        self, *waves: Array, key: Pass = UNITS, deadline: float = 1000, operations: float | None = None
    ) -> Ticket:
        items = [Item(key, wave, operations or OPERATIONS * len(wave) / SECOND) for wave in waves]
        seconds = sum(len(wave) for wave in waves) / SECOND
        return self.batcher.admit(items, seconds=seconds, deadline=time.monotonic() + deadline)

    async def hold(self) -> Ticket:
        """Have every replica busy with a tenth of a second, so that what follows must queue."""
        for replica in self.replicas:
            replica.may_run.clear()
        busy = self.admit(*[wave(0.1) for _ in self.replicas])
        while self.batcher.waiting:
            await asyncio.sleep(0)
        return busy

    async def release(self, *tickets: Ticket) -> list[Array | BaseException]:
        """Let them go on; the outcomes of these."""
        for replica in self.replicas:
            replica.may_run.set()
        items = [item for ticket in tickets for item in ticket.items]
        return await asyncio.gather(*(item.result for item in items), return_exceptions=True)


def wave(seconds: float, value: float = 1) -> Array:
    return np.full(round(seconds * SECOND), value, np.float32)


def run(test: Callable[[Bench], Awaitable[None]], monkeypatch: pytest.MonkeyPatch, **options: float) -> Bench:
    """Run `test` with a batcher that has started and whose batches may take ten seconds."""
    monkeypatch.setattr("serving.engine.batcher.BATCH_SECONDS", 10)
    benches = []

    async def main() -> None:
        bench = Bench(**options)
        benches.append(bench)
        bench.batcher.start(bench.replicas, bench.supply)
        try:
            await test(bench)
        finally:
            for replica in bench.replicas:
                replica.may_run.set()
            await bench.batcher.close(5)

    asyncio.run(main())
    return benches[0]


def test_each_wave_gets_its_own_result(monkeypatch):
    async def test(bench: Bench) -> None:
        ticket = bench.admit(*[wave(0.1, value) for value in range(5)])
        assert [outcome[0] for outcome in await bench.release(ticket)] == [0, 2, 4, 6, 8]

    run(test, monkeypatch)


def test_short_requests_go_first_and_share_a_batch_while_they_fit(monkeypatch):
    async def test(bench: Bench) -> None:
        await bench.hold()
        tickets = [bench.admit(wave(seconds, i)) for i, seconds in enumerate((6, 5, 1, 3, 25, 0.5))]
        outcomes = await bench.release(*tickets)
        assert [outcome[0] for outcome in outcomes] == [0, 2, 4, 6, 8, 10]
        assert [len(outcome) / SECOND for outcome in outcomes] == [6, 5, 1, 3, 25, 0.5]

    bench = run(test, monkeypatch)
    assert [lengths for _, lengths in bench.batches[1:]] == [[0.5, 1, 3, 5], [6], [25]]
    assert [(batch.num_waves, batch.audio_seconds) for batch in bench.observed[1:]] == [(4, 9.5), (1, 6), (1, 25)]


def test_a_batch_takes_no_longer_than_it_may(monkeypatch):
    """What a short request may have to wait for: two seconds here, at the pace of a second a second."""

    async def test(bench: Bench) -> None:
        await bench.hold()
        monkeypatch.setattr("serving.engine.batcher.BATCH_SECONDS", 2)
        await bench.release(*[bench.admit(wave(0.8)) for _ in range(5)])

    bench = run(test, monkeypatch)
    assert [lengths for _, lengths in bench.batches[1:]] == [[0.8, 0.8], [0.8, 0.8], [0.8]]


def test_work_is_divided_among_idle_replicas(monkeypatch):
    async def test(bench: Bench) -> None:
        busy = await bench.hold()
        ticket = bench.admit(*[wave(1) for _ in range(4)])
        await bench.release(busy, ticket)
        await bench.release(bench.admit(*[wave(2) for _ in range(4)]))

    bench = run(test, monkeypatch, num_replicas=2)
    # The fake one is done at once, and may come back before the other has begun.
    assert [lengths for _, lengths in bench.batches if lengths[0] == 2] in ([[2, 2], [2, 2]], [[2, 2], [2], [2]])


def test_a_long_request_is_not_passed_for_ever(monkeypatch):
    """It waits for its own service time, times the patience; shorter ones that come later than that wait for it."""

    async def test(bench: Bench) -> None:
        await bench.hold()
        long = bench.admit(wave(10))
        long.arrived -= 50
        later = [bench.admit(wave(1)) for _ in range(30)]
        await bench.release(long, *later)

    bench = run(test, monkeypatch)
    assert bench.batches[1][1] == [10]


def test_what_is_due_goes_first(monkeypatch):
    async def test(bench: Bench) -> None:
        await bench.hold()
        tickets = [bench.admit(wave(1)), bench.admit(wave(8), deadline=12)]
        tickets[1].arrived -= 100
        await bench.release(*tickets)

    bench = run(test, monkeypatch)
    assert [lengths[0] for _, lengths in bench.batches[1:]] == [8]


def test_windows_of_a_long_recording_let_a_short_one_pass(monkeypatch):
    async def test(bench: Bench) -> None:
        await bench.hold()
        long = bench.admit(*[wave(9, 2) for _ in range(6)])
        short = bench.admit(wave(1, 3))
        await bench.release(long, short)

    bench = run(test, monkeypatch)
    assert bench.batches[1][1] == [1, 9]


def test_layers_do_not_share_batches(monkeypatch):
    async def test(bench: Bench) -> None:
        await bench.hold()
        keys = (UNITS, LAYER_3, UNITS, LAYER_4)
        await bench.release(*[bench.admit(wave(1 + i / 10), key=key) for i, key in enumerate(keys)])

    assert [layer for layer, _ in run(test, monkeypatch).batches[1:]] == [2, 3, 4]


def test_a_wave_the_model_cannot_do_fails_alone(monkeypatch):
    async def test(bench: Bench) -> None:
        for _ in range(3):
            first, bad, last = await bench.release(bench.admit(wave(1, 5), wave(1, 13), wave(1, 6)))
            assert (first[0], last[0]) == (10, 12)
            assert isinstance(bad, WaveError)
            assert bad.kind == "internal"

    run(test, monkeypatch)


def test_a_lost_replica_is_replaced_and_its_batch_done_again(monkeypatch):
    async def test(bench: Bench) -> None:
        busy = await bench.hold()
        deadly, good = bench.admit(wave(1, 17)), bench.admit(wave(1.5, 4))
        lost, found = (await bench.release(busy, deadly, good))[1:]
        assert isinstance(lost, LostError)
        assert "twice" in str(lost)
        assert found[0] == 8
        [after] = await bench.release(bench.admit(wave(1, 7)))
        assert after[0] == 14

    assert run(test, monkeypatch).supplied == 2


def test_a_replica_that_hangs_is_lost(monkeypatch):
    monkeypatch.setattr("serving.engine.batcher.HANG_SECONDS", 0.05)
    monkeypatch.setattr("serving.engine.batcher.HANG_FACTOR", 0)

    async def test(bench: Bench) -> None:
        busy = await bench.hold()
        [outcome] = await asyncio.gather(busy.items[0].result)
        assert outcome[0] == 2
        assert bench.replicas[0].stopped

    assert run(test, monkeypatch).supplied == 1


def test_a_request_that_is_given_back_is_not_run(monkeypatch):
    async def test(bench: Bench) -> None:
        await bench.hold()
        with bench.admit(wave(2)):
            kept = bench.admit(wave(3))
        assert bench.batcher.seconds == pytest.approx(3.1)
        await bench.release(kept)

    assert [lengths for _, lengths in run(test, monkeypatch).batches[1:]] == [[3]]


def test_a_wave_nobody_waits_for_is_not_run(monkeypatch):
    async def test(bench: Bench) -> None:
        await bench.hold()
        ticket = bench.admit(wave(2), wave(3))
        settle(ticket.items[0], ConnectionError())
        await bench.release(ticket)

    assert [lengths for _, lengths in run(test, monkeypatch).batches[1:]] == [[3]]


def test_what_is_late_is_not_run(monkeypatch):
    async def test(bench: Bench) -> None:
        await bench.hold()
        ticket = bench.admit(wave(0.01), deadline=0.2)
        await asyncio.sleep(0.25)
        [outcome] = await bench.release(ticket)
        assert isinstance(outcome, LateError)

    assert len(run(test, monkeypatch).batches) == 1


def test_admission_is_all_or_nothing_and_lasts_until_the_answer_is_sent(monkeypatch):
    async def test(bench: Bench) -> None:
        busy = await bench.hold()
        with pytest.raises(FullError, match=r"found 0.1 s of audio in hand and 10.0 s offered, wanted at most 10 s"):
            bench.admit(wave(4), wave(6))
        assert not bench.batcher.waiting
        with busy:
            first = bench.admit(wave(4), wave(5))
            with pytest.raises(FullError) as refusal:
                bench.admit(wave(1))
            assert 1 <= refusal.value.retry_seconds <= 60
            await bench.release(busy, first)
            with pytest.raises(FullError):
                bench.admit(wave(1))
        with first:
            assert bench.batcher.seconds == pytest.approx(9)
        assert bench.batcher.seconds == pytest.approx(0)
        await bench.release(bench.admit(wave(4), wave(6)))

    run(test, monkeypatch, max_seconds=10)


def test_what_cannot_be_done_in_time_is_not_admitted(monkeypatch):
    """At the pace of a second a second four requests of two seconds can be done within ten, and a short one before."""

    async def test(bench: Bench) -> None:
        busy = await bench.hold()
        monkeypatch.setattr("serving.engine.batcher.BATCH_SECONDS", 0.5)
        waiting = [bench.admit(wave(2), deadline=10) for _ in range(4)]
        with pytest.raises(FullError, match=r"found 10.[0-9] s until this would be done, wanted at most 10.0 s") as e:
            bench.admit(wave(2), deadline=10)
        assert e.value.retry_seconds == 1
        short = bench.admit(wave(0.5), deadline=10)
        await bench.release(busy, *waiting, short)

    run(test, monkeypatch)


def test_a_long_queue_is_told_before_a_body_is_read(monkeypatch):
    async def test(bench: Bench) -> None:
        busy = await bench.hold()
        bench.batcher.check_time(time.monotonic() + 1)
        waiting = [bench.admit(wave(2)) for _ in range(5)]
        for ticket in waiting:
            ticket.arrived -= 100
        with pytest.raises(FullError, match=r"until this would be done, wanted at most 5\.0 s"):
            bench.batcher.check_time(time.monotonic() + 5)
        bench.batcher.check_time(time.monotonic() + 30)
        await bench.release(busy, *waiting)

    run(test, monkeypatch)


def test_what_can_no_longer_be_done_in_time_is_not_begun(monkeypatch):
    """Half a second is left for a second of work."""

    async def test(bench: Bench) -> None:
        await bench.hold()
        ticket = bench.admit(wave(1), deadline=1.5)
        await asyncio.sleep(1)
        [outcome] = await bench.release(ticket)
        assert isinstance(outcome, LateError)

    assert len(run(test, monkeypatch).batches) == 1


def test_while_short_requests_come_one_replica_takes_no_long_ones(monkeypatch):
    """Long ones wait for the first replica, though the second is free; a moment later they may have it too."""
    monkeypatch.setattr("serving.engine.batcher.SHORT_MEMORY_SECONDS", 0.5)

    async def test(bench: Bench) -> None:
        await bench.release(bench.admit(wave(0.1)))
        for replica in bench.replicas:
            replica.may_run.clear()
        long = [bench.admit(wave(9)) for _ in range(2)]
        await asyncio.sleep(0.1)
        assert len(bench.batcher.waiting) == 1
        short = bench.admit(wave(0.2))
        await asyncio.sleep(0.05)
        assert [len(item.wave) / SECOND for item in bench.batcher.waiting] == [9]
        bench.replicas[0].may_run.set()
        bench.replicas[1].may_run.set()
        await bench.release(short, *long)
        for replica in bench.replicas:
            replica.may_run.clear()
        await asyncio.sleep(0.6)
        long = [bench.admit(wave(9)) for _ in range(2)]
        await asyncio.sleep(0.1)
        assert not bench.batcher.waiting
        await bench.release(*long)

    run(test, monkeypatch, num_replicas=2)


def test_draining_finishes_what_was_admitted(monkeypatch):
    async def test(bench: Bench) -> None:
        await bench.hold()
        ticket = bench.admit(*[wave(8) for _ in range(4)])
        closing = asyncio.create_task(bench.batcher.close(5))
        await asyncio.sleep(0)
        with pytest.raises(ClosedError):
            bench.admit(wave(1))
        assert [outcome[0] for outcome in await bench.release(ticket)] == [2] * 4
        await closing

    run(test, monkeypatch)


def test_what_a_drain_leaves_undone_is_failed_not_forgotten(monkeypatch):
    async def test(bench: Bench) -> None:
        busy = await bench.hold()
        queued = bench.admit(wave(1))
        await bench.batcher.close(0.05)
        for item in (*busy.items, *queued.items):
            with pytest.raises(ClosedError, match="closed before this was done"):
                await item.result

    run(test, monkeypatch)


def test_the_pace_follows_what_is_seen(monkeypatch):
    async def test(bench: Bench) -> None:
        bench.batcher.pace = 4 * OPERATIONS
        for _ in range(30):
            await bench.release(bench.admit(wave(1)))
        assert bench.batcher.pace == pytest.approx(OPERATIONS, rel=0.01)

    run(test, monkeypatch)
