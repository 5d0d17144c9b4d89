"""What Prometheus may know: counts and times, never a key, a user or a text.

Each gateway has its own registry, so that two in one process do not add up.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from fortpoint.types import Usage

CONTENT_TYPE = CONTENT_TYPE_LATEST

_FIRST_TOKEN_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_GUARD_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5)


class Meter:
    """The gateway's metrics. ``surface`` is a route's template: few values, whoever asks."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "fortpoint_requests",
            "Requests that ended, by surface, HTTP status and error code (ok if none).",
            ("surface", "status", "code"),
            registry=self._registry,
        )
        self._tokens = Counter(
            "fortpoint_tokens",
            "Tokens read (prompt) and written (completion).",
            ("kind",),
            registry=self._registry,
        )
        self._first_token = Histogram(
            "fortpoint_time_to_first_token_seconds",
            "From the request's arrival to its first token.",
            buckets=_FIRST_TOKEN_S,
            registry=self._registry,
        )
        self._guard = Histogram(
            "fortpoint_guard_seconds",
            "Time of one judgement by the guard.",
            buckets=_GUARD_S,
            registry=self._registry,
        )
        self._in_flight = Gauge(
            "fortpoint_requests_in_flight",
            "Requests that are being answered.",
            registry=self._registry,
        )

        self._watched = Counter(
            "fortpoint_watched_tokens",
            "Tokens at which a watched feature or direction was read.",
            ("target",),
            registry=self._registry,
        )
        self._watched_over = Counter(
            "fortpoint_watched_tokens_over",
            "Those at which it was over its threshold.",
            ("target",),
            registry=self._registry,
        )
        self._alerts = Counter(
            "fortpoint_alerts",
            "Requests in whose prompt or answer a watched target was over its threshold.",
            ("target", "part"),
            registry=self._registry,
        )

    def arrived(self) -> None:
        self._in_flight.inc()

    def ended(self, surface: str, status: int, code: str, usage: Usage) -> None:
        self._in_flight.dec()
        self._requests.labels(surface, str(status), code).inc()
        self._tokens.labels("prompt").inc(usage.prompt)
        self._tokens.labels("completion").inc(usage.completion)

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def judged(self, seconds: float) -> None:
        self._guard.observe(seconds)

    def watched(self, target: str, n_tokens: int, n_over: int) -> None:
        """``target`` is one of the configuration's, so there are few."""
        self._watched.labels(target).inc(n_tokens)
        self._watched_over.labels(target).inc(n_over)

    def alerted(self, target: str, part: str) -> None:
        self._alerts.labels(target, part).inc()

    def render(self) -> bytes:
        """The exposition text, for ``GET /metrics``."""
        return generate_latest(self._registry)
