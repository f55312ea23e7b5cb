"""A model at work: admission, batches, warm-up and draining behind one object."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from serving.batcher import Batcher, ClosedError, Frames, FullError, Task, Wave, count_samples
from serving.errors import ApiError, draining, overloaded
from serving.intake import Clip, relabel
from serving.metrics import Metrics
from serving.settings import Settings
from sonorant.inference import SAMPLE_RATE, Speech

log = logging.getLogger("serving")


class Service:
    """One model, its queue and its readiness."""

    def __init__(self, speech: Speech, settings: Settings, metrics: Metrics) -> None:
        self.speech, self.settings, self.metrics = speech, settings, metrics
        self.name = settings.model.resolve().name
        self.is_warm = False
        self.batcher = Batcher(
            self.run,
            max_batch_seconds=settings.max_batch_seconds,
            max_queue_seconds=settings.max_queue_seconds,
            observe=metrics.observe_batch,
        )
        metrics.queue_depth.set_function(lambda: len(self.batcher.waiting))
        metrics.queue_seconds.set_function(lambda: self.batcher.seconds)
        metrics.model.labels(self.name, str(speech.layer)).set(1)

    def run(self, task: Task, waves: list[Wave]) -> Sequence[Frames]:
        """One call of the model; ValueError where a wave makes frames that are not finite."""
        results: Sequence[Frames] = (
            self.speech.units(waves) if task.kind == "units" else self.speech.embed(waves, task.layer)
        )
        for frames in results:
            if not np.isfinite(frames).all():
                raise ValueError("audio: found frames that are not finite, wanted finite ones: scale it to -1 … 1")
        return results

    async def process(self, task: Task, clips: Sequence[Clip], route: str) -> list[Frames]:
        """What the model makes of each clip, in order; ApiError where it cannot be had."""
        waves = [clip.wave for clip in clips]
        try:
            results = self.batcher.admit(task, waves)
        except FullError as error:
            raise overloaded(str(error), error.retry_seconds) from None
        except ClosedError:
            raise draining() from None
        self.metrics.audio_seconds.labels(route).inc(count_samples(waves) / SAMPLE_RATE)
        frames: list[Frames] = []
        try:
            for clip, result in zip(clips, results, strict=True):
                try:
                    frames.append(await result)
                except ValueError as error:
                    raise ApiError(400, "bad_audio", relabel(error, clip.label)) from None
                except ClosedError:
                    raise draining() from None
        finally:
            for result in results:
                result.cancel()
        return frames

    async def warm_up(self) -> None:
        """Run the model once; from then on the service is ready."""
        second = np.random.default_rng(0).normal(0, 0.1, SAMPLE_RATE).astype(np.float32)
        try:
            for task in (Task("units"), Task("embed", self.speech.layer)):
                [result] = self.batcher.admit(task, [second])
                await result
        except ClosedError:
            return
        except Exception:
            log.exception("warm-up: found a model that fails on noise; the server will not be ready")
            return
        self.is_warm = True

    def check_ready(self) -> None:
        """Raises ApiError 503 until the warm-up has run, and from the moment the service drains."""
        if self.batcher.draining:
            raise draining()
        if not self.is_warm:
            raise ApiError(
                503, "not_ready", "model: found it not warmed up, wanted one pass: wait", {"Retry-After": "1"}
            )
