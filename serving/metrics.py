"""What Prometheus is told, in a registry of the app's own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

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
        self.queue_depth = Gauge("sonorant_queue_depth", "Waves waiting for the model.", registry=registry)
        self.queue_seconds = Gauge(
            "sonorant_queue_audio_seconds", "Audio admitted and not yet answered.", registry=registry
        )
        self.model = Gauge("sonorant_model_info", "The model that is loaded.", ("model", "layer"), registry=registry)

    def observe_batch(self, num_waves: int, seconds: float) -> None:
        """Count one call of the model."""
        self.batch_size.observe(num_waves)
        self.batch_seconds.observe(seconds)

    def observe_request(self, route: str, status: int, seconds: float) -> None:
        """Count one answer."""
        self.requests.labels(route, str(status)).inc()
        self.latency.labels(route).observe(seconds)

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)
