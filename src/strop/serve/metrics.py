"""What the server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """One registry a server, so that two in a process do not share their numbers."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"strop_{name}", what, labels, registry=registry)

        self.requests = counter("requests", "HTTP requests by path and status.", "path", "status")
        self.finished = counter("answers", "Answers by model and how they ended.", "model", "end")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens, those kept from before included.")
        self.kept_tokens = counter("kept_tokens", "Prompt tokens that had not to be read again.")
        self.new_tokens = counter("new_tokens", "Tokens generated.")
        self.active = Gauge("strop_active", "Requests being answered.", registry=registry)
        self.waiting = Gauge("strop_waiting", "Requests waiting for a slot.", registry=registry)
        self.first_token = Histogram(
            "strop_first_token_seconds", "Time from a request to its first token.", buckets=SECONDS, registry=registry
        )
        self.whole = Histogram(
            "strop_answer_seconds", "Time from a request to the end of its answer.", buckets=SECONDS, registry=registry
        )

    def text(self) -> bytes:
        return generate_latest(self._registry)
