"""Prometheus metrics. Labels hold configured names only, never what a client sent."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

PREFIX = "posttrain_gateway"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """All metrics of one gateway, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter(
            "requests", "HTTP requests answered.", "endpoint", "model", "version", "status"
        )
        self.seconds = self._histogram(
            "request_seconds", "From the headers to the end of the answer.", "endpoint"
        )
        self.first_token = self._histogram(
            "first_token_seconds", "From asking Triton to its first response.", "model", "version"
        )
        self.tokens = self._counter(
            "tokens", "Tokens; kind: prompt or completion.", "model", "version", "kind"
        )
        self.key_tokens = self._counter("key_tokens", "Tokens by API key.", "key", "kind")
        self.limited = self._counter("limited", "Requests refused with 429.", "key", "reason")
        self.upstream_errors = self._counter(
            "upstream_errors", "Requests that Triton refused or failed.", "model", "version", "code"
        )
        self.disconnects = self._counter("disconnects", "Clients that left before the answer's end.")
        self.refused_connections = self._counter("refused_connections", "Connections beyond max_connections.")
        self.shadows = self._counter(
            "shadow_requests",
            "Copies; outcome: same or different text (greedy ones), answered, failed, left_out.",
            "model",
            "version",
            "outcome",
        )
        self.unmonitored = self._counter(
            "monitoring_dropped",
            "Requests missing in the monitoring database; reason: queue_full or database.",
            "reason",
        )
        for reason in ("queue_full", "database"):
            self.unmonitored.labels(reason)
        self.reloads = self._counter("reloads", "Route changes; outcome: done or failed.", "what", "outcome")
        self.share = Gauge(
            f"{PREFIX}_route_share",
            "Share of a model's traffic.",
            ("model", "version"),
            registry=self.registry,
        )
        self.in_flight = Gauge(f"{PREFIX}_in_flight", "Requests being answered.", registry=self.registry)
        self.connections = Gauge(f"{PREFIX}_connections", "Open connections.", registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{PREFIX}_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", text, labels, buckets=SECONDS, registry=self.registry)

    def show_shares(self, shares: dict[str, dict[str, float]]) -> None:
        """Set the gauge of route shares to this table's."""
        self.share.clear()
        for model, versions in shares.items():
            for version, share in versions.items():
                self.share.labels(model, version).set(share)
