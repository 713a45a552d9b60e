"""What a server counts, in the text form of Prometheus; one registry for each server, none of the process."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from edgecompose.request import Answer

#: Paths that are counted by name; any other is 'other', so that callers cannot make up series.
_PATHS = frozenset(
    (
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/compose",
        "/v1/models",
        "/health",
        "/metrics",
        "/",
    )
)


class Metrics:
    """Counters, a gauge and histograms of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        name = "edgecompose"
        self._requests = Counter(
            f"{name}_requests", "Requests that were answered.", ("path", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            f"{name}_request_seconds", "Time of a request, until its answer began.", ("path",), registry=self._registry
        )
        self._tokens = Counter(f"{name}_tokens", "Tokens read and written.", ("kind",), registry=self._registry)
        self._stages = Counter(f"{name}_stage_seconds", "Time of each stage.", ("stage",), registry=self._registry)
        self.waiting = Gauge(
            f"{name}_requests_inside", "Requests that are being computed or wait for it.", registry=self._registry
        )

    def requested(self, path: str, status: int, seconds: float) -> None:
        """Count a request."""
        known = path if path in _PATHS else "other"
        self._requests.labels(known, str(status)).inc()
        self._seconds.labels(known).observe(seconds)

    def answered(self, answer: Answer) -> None:
        """Count the tokens and the time of an answer."""
        self._tokens.labels("prompt").inc(answer.prompt_tokens)
        self._tokens.labels("generated").inc(answer.generated_tokens)
        for stage, spent in answer.timings_ms.items():
            self._stages.labels(stage).inc(spent / 1e3)

    def text(self) -> tuple[bytes, str]:
        """All of it, and its media type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
