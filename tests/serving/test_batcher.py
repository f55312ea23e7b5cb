"""The queue and its worker, on functions that compute something from the wave."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence

import numpy as np
import pytest

from serving.batcher import Batcher, ClosedError, Frames, FullError, Task, Wave

UNITS = Task("units")
SECOND = 16_000


class Doubler:
    """Doubles each wave; holds still while told to; fails on a batch that holds a wave beginning with 13."""

    def __init__(self) -> None:
        self.batches: list[tuple[Task, list[float]]] = []
        self.may_run = threading.Event()
        self.may_run.set()

    def __call__(self, task: Task, waves: list[Wave]) -> list[Frames]:
        self.may_run.wait()
        self.batches.append((task, [len(wave) / SECOND for wave in waves]))
        if any(wave[0] == 13 for wave in waves):
            raise ZeroDivisionError("poison")
        return [2 * wave for wave in waves]


def wave(seconds: float, value: float = 1) -> Wave:
    return np.full(int(seconds * SECOND), value, np.float32)


def run(
    test: Callable[[Batcher, Doubler], Awaitable[None]],
    max_batch_seconds: float = 10,
    max_queue_seconds: float = 100,
) -> list[tuple[int, float]]:
    """Run `test` with a batcher that has started; the sizes of the batches it observed."""
    observed: list[tuple[int, float]] = []

    async def main() -> None:
        double = Doubler()
        batcher = Batcher(
            double,
            max_batch_seconds=max_batch_seconds,
            max_queue_seconds=max_queue_seconds,
            observe=lambda num_waves, seconds: observed.append((num_waves, seconds)),
        )
        batcher.start()
        try:
            await test(batcher, double)
        finally:
            double.may_run.set()
            await batcher.close(5)

    asyncio.run(main())
    return observed


async def hold(batcher: Batcher, double: Doubler) -> asyncio.Future[Frames]:
    """Have the worker busy with a tenth of a second, so that what follows must queue."""
    double.may_run.clear()
    [busy] = batcher.admit(UNITS, [wave(0.1)])
    while batcher.waiting:
        await asyncio.sleep(0)
    return busy


async def release(double: Doubler, results: Sequence[asyncio.Future[Frames]]) -> list[Frames | BaseException]:
    double.may_run.set()
    return await asyncio.gather(*results, return_exceptions=True)


def test_waiting_waves_share_batches_capped_by_their_audio():
    async def test(batcher: Batcher, double: Doubler) -> None:
        await hold(batcher, double)
        results = batcher.admit(UNITS, [wave(6, 0), wave(5, 1), wave(1, 2), wave(3, 3), wave(25, 4), wave(0.5, 5)])
        outcomes = await release(double, results)
        assert [outcome[0] for outcome in outcomes] == [0, 2, 4, 6, 8, 10]
        assert [len(outcome) / SECOND for outcome in outcomes] == [6, 5, 1, 3, 25, 0.5]
        # Oldest first, then shortest first while it fits into 10 s; 25 s fits nowhere and goes alone.
        assert [lengths for _, lengths in double.batches[1:]] == [[6, 0.5, 1], [5, 3], [25]]

    observed = run(test)
    assert observed[1:] == [(3, 7.5), (2, 8.0), (1, 25.0)]


def test_the_oldest_wave_is_served_next_however_many_short_ones_come():
    async def test(batcher: Batcher, double: Doubler) -> None:
        await hold(batcher, double)
        long = batcher.admit(UNITS, [wave(10)])
        short = batcher.admit(UNITS, [wave(1) for _ in range(30)])
        await release(double, [*long, *short])
        assert double.batches[1][1] == [10]

    run(test)


def test_tasks_do_not_share_batches():
    async def test(batcher: Batcher, double: Doubler) -> None:
        await hold(batcher, double)
        results = [batcher.admit(task, [wave(1)])[0] for task in (UNITS, Task("embed", 3), UNITS, Task("embed", 4))]
        await release(double, results)
        assert [task for task, _ in double.batches[1:]] == [UNITS, Task("embed", 3), Task("embed", 4)]

    run(test)


def test_a_poisoned_wave_fails_alone_and_the_worker_lives_on():
    async def test(batcher: Batcher, double: Doubler) -> None:
        await hold(batcher, double)
        outcomes = await release(double, batcher.admit(UNITS, [wave(1, 5), wave(1, 13), wave(1, 6)]))
        assert isinstance(outcomes[1], ZeroDivisionError)
        assert (outcomes[0][0], outcomes[2][0]) == (10, 12)
        for _ in range(3):
            [poisoned] = batcher.admit(UNITS, [wave(1, 13)])
            with pytest.raises(ZeroDivisionError):
                await poisoned
        [after] = batcher.admit(UNITS, [wave(1, 7)])
        assert (await after)[0] == 14
        assert batcher.seconds == 0

    run(test)


def test_a_model_that_loses_a_result_fails_the_wave(monkeypatch):
    async def test(batcher: Batcher, double: Doubler) -> None:
        monkeypatch.setattr(batcher, "run", lambda task, waves: double(task, waves)[1:])
        [result] = batcher.admit(UNITS, [wave(1)])
        with pytest.raises(AssertionError, match="0 results for 1 waves"):
            await result

    run(test)


def test_a_wave_nobody_waits_for_is_not_run():
    async def test(batcher: Batcher, double: Doubler) -> None:
        await hold(batcher, double)
        gone, kept = batcher.admit(UNITS, [wave(2, 1), wave(3, 1)])
        gone.cancel()
        await release(double, [kept])
        assert [lengths for _, lengths in double.batches[1:]] == [[3]]
        assert batcher.seconds == 0

    run(test)


def test_admission_is_all_or_nothing_and_counts_what_is_being_run():
    async def test(batcher: Batcher, double: Doubler) -> None:
        busy = await hold(batcher, double)
        assert batcher.seconds == 0.1
        with pytest.raises(FullError, match=r"found 0.1 s of audio waiting and 10.0 s offered, wanted at most 10 s"):
            batcher.admit(UNITS, [wave(4), wave(6)])
        assert not batcher.waiting
        first = batcher.admit(UNITS, [wave(4), wave(5)])
        with pytest.raises(FullError) as refusal:
            batcher.admit(UNITS, [wave(1)])
        assert 1 <= refusal.value.retry_seconds <= 60
        await release(double, [busy, *first])
        assert batcher.seconds == 0
        await asyncio.gather(*batcher.admit(UNITS, [wave(4), wave(6)]))

    run(test, max_queue_seconds=10)


def test_draining_finishes_what_was_admitted():
    async def test(batcher: Batcher, double: Doubler) -> None:
        await hold(batcher, double)
        results = batcher.admit(UNITS, [wave(8) for _ in range(4)])
        closing = asyncio.create_task(batcher.close(5))
        await asyncio.sleep(0)
        with pytest.raises(ClosedError):
            batcher.admit(UNITS, [wave(1)])
        assert [outcome[0] for outcome in await release(double, results)] == [2] * 4
        await closing
        batcher.start()  # and it can begin again
        [again] = batcher.admit(UNITS, [wave(1)])
        await again

    run(test)


def test_what_a_drain_leaves_undone_is_failed_not_forgotten():
    async def test(batcher: Batcher, double: Doubler) -> None:
        busy = await hold(batcher, double)
        [queued] = batcher.admit(UNITS, [wave(1)])
        await batcher.close(0.05)
        for result in (busy, queued):
            with pytest.raises(ClosedError, match="closed before this was done"):
                await result
        assert batcher.seconds == 0
        double.may_run.set()
        batcher.start()

    run(test)
