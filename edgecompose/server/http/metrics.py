"""Metrics of a server in the text form of Prometheus; each server has its own registry."""

from __future__ import annotations

from collections.abc import Collection

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from edgecompose.request import Answer


class Metrics:
    """Counters, a gauge and histograms of one server.

    Args:
        paths: counted by name; any other is 'other', so that callers cannot make up series.
    """

    def __init__(self, paths: Collection[str]) -> None:
        self._paths = frozenset(paths)
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
            f"{name}_requests_inside", "Requests that are being computed or wait.", registry=self._registry
        )

    def requested(self, path: str, status: int, seconds: float) -> None:
        """Count a request."""
        name = path if path in self._paths else "other"
        self._requests.labels(name, str(status)).inc()
        self._seconds.labels(name).observe(seconds)

    def answered(self, answer: Answer) -> None:
        """Count the tokens and the time of an answer."""
        self._tokens.labels("prompt").inc(answer.prompt_tokens)
        self._tokens.labels("generated").inc(answer.generated_tokens)
        for stage, elapsed_ms in answer.timings_ms.items():
            self._stages.labels(stage).inc(elapsed_ms / 1e3)

    def aborted(self, tokens: int) -> None:
        """Count the tokens of an answer that was not finished."""
        self._tokens.labels("generated").inc(tokens)

    def text(self) -> tuple[bytes, str]:
        """All of it, and its media type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
