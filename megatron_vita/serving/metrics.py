"""What Prometheus is told, by names that begin with `vita_`."""

from __future__ import annotations

import time
from collections import deque

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

disable_created_metrics()  # a second series for every counter, which says when it was made

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_WINDOW = 10.0
"""Seconds over which tokens a second are counted."""


class Metrics:
    """Counters, gauges and histograms of one server."""

    def __init__(self) -> None:
        """All zero."""
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "vita_requests", "Requests by endpoint and HTTP status", ("endpoint", "status"), registry=registry
        )
        self.joined = Counter(
            "vita_requests_joined", "Requests that joined a running one with the same body", registry=registry
        )
        self.cancelled = Counter("vita_requests_cancelled", "Requests whose clients went away", registry=registry)
        self.waiting = Gauge("vita_requests_waiting", "Requests that have no token yet", registry=registry)
        self.running = Gauge("vita_requests_running", "Requests that are being answered", registry=registry)
        self.sequences_waiting = Gauge("vita_sequences_waiting", "Sequences in the engine's queue", registry=registry)
        self.sequences_running = Gauge("vita_sequences_running", "Sequences being computed", registry=registry)
        self.cache = Gauge("vita_kv_cache_usage_ratio", "Share of the key/value cache in use", registry=registry)
        self.preemptions = Gauge("vita_preemptions", "Sequences that gave their blocks back, so far", registry=registry)
        self.prompt_tokens = Counter("vita_prompt_tokens", "Tokens of answered prompts", registry=registry)
        self.answer_tokens = Counter("vita_generation_tokens", "Tokens of answers", registry=registry)
        self.rate = Gauge(
            "vita_generation_tokens_per_second", f"Tokens of answers finished in the last {_WINDOW:.0f} s",
            registry=registry,
        )  # fmt: skip
        self.first = Histogram(
            "vita_time_to_first_token_seconds", "From a request's last byte to its first token", buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.duration = Histogram(
            "vita_request_duration_seconds", "From a request's last byte to its last token", buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.step_age = Gauge("vita_engine_step_age_seconds", "Seconds since the engine's last step", registry=registry)
        self.pending = Gauge("vita_pending_body_bytes", "Bytes of the bodies of unanswered requests", registry=registry)
        self._finished: deque[tuple[float, int]] = deque()

    def answered(self, *, prompt: int, answer: int, first: float, duration: float) -> None:
        """Count an answered request: tokens, and seconds."""
        self.prompt_tokens.inc(prompt)
        self.answer_tokens.inc(answer)
        self.first.observe(first)
        self.duration.observe(duration)
        self._finished.append((time.monotonic(), answer))

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        now = time.monotonic()
        while self._finished and self._finished[0][0] < now - _WINDOW:
            self._finished.popleft()
        self.rate.set(sum(tokens for _, tokens in self._finished) / _WINDOW)
        return generate_latest(self._registry)
