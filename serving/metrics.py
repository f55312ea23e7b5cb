"""What Prometheus is told, in a registry of the app's own."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from serving.engine.batcher import Batch
from serving.engine.cards import Card

LATENCIES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The counters of one app."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("sonorant_requests", "Requests answered.", ("route", "status"), registry=registry)
        self.latency = Histogram(
            "sonorant_request_seconds",
            "From the request's head to the answer's last byte.",
            ("route",),
            buckets=LATENCIES,
            registry=registry,
        )
        self.audio_seconds = Counter(
            "sonorant_audio_seconds", "Audio decoded and admitted.", ("route",), registry=registry
        )
        self.batch_size = Histogram(
            "sonorant_batch_size",
            "Waves in one model call.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        self.batch_seconds = Histogram(
            "sonorant_batch_audio_seconds",
            "Audio in one model call.",
            buckets=(1, 2, 5, 10, 20, 30, 60),
            registry=registry,
        )
        self.queue_time = Histogram(
            "sonorant_queue_seconds",
            "From a wave's admission to its batch.",
            buckets=LATENCIES,
            registry=registry,
        )
        self.model_seconds = Histogram("sonorant_batch_seconds", "A model call.", buckets=LATENCIES, registry=registry)
        self.padding = Counter(
            "sonorant_padding_seconds", "Silence put between the waves of a batch, under 20 ms each.", registry=registry
        )
        self.queue_depth = Gauge("sonorant_queue_depth", "Waves waiting for the model.", registry=registry)
        self.queue_seconds = Gauge(
            "sonorant_queue_audio_seconds", "Audio admitted and not yet answered.", registry=registry
        )
        self.model = Gauge(
            "sonorant_model_info",
            "The models that are loaded.",
            ("model", "digest", "layer", "precision", "device"),
            registry=registry,
        )
        self.reloads = Counter(
            "sonorant_reloads", "Times the models were loaded anew.", ("outcome",), registry=registry
        )
        for outcome in ("done", "failed"):  # so that the first one is an increase
            self.reloads.labels(outcome)
        self.workers_lost = Counter("sonorant_workers_lost", "Processes that ended unasked.", registry=registry)
        self._peak_bytes = 0
        self.worker_bytes = Gauge(
            "sonorant_worker_peak_bytes", "Largest memory of any worker process so far.", registry=registry
        )
        self.device_bytes = Gauge("sonorant_gpu_memory_bytes", "GPU memory a worker holds.", registry=registry)

    def observe_batch(self, batch: Batch) -> None:
        """Count one call of a model."""
        self.batch_size.observe(batch.num_waves)
        self.batch_seconds.observe(batch.audio_seconds)
        self.model_seconds.observe(batch.seconds)
        self.padding.inc(batch.padding_seconds)
        for seconds in batch.queue:
            self.queue_time.observe(seconds)
        self._peak_bytes = max(self._peak_bytes, batch.fields["peak_bytes"])
        self.worker_bytes.set(self._peak_bytes)
        self.device_bytes.set(batch.fields["device_bytes"])

    def show_models(self, cards: Iterable[Card]) -> None:
        """Name what is loaded."""
        self.model.clear()
        for card in cards:
            self.model.labels(card.name, card.digest, str(card.layer), card.precision, card.device).set(1)

    def observe_request(self, route: str, status: int, seconds: float) -> None:
        """Count one answer."""
        self.requests.labels(route, str(status)).inc()
        self.latency.labels(route).observe(seconds)

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)
