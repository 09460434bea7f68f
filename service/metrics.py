"""Prometheus metrics: requests as they are answered, jobs as the store has them at the moment of the scrape."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from store import JobState, Store, StoreError


class Metrics:
    """The metrics of one application; own registry, so that several applications may live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "prunefront_http_requests", "Requests answered.", ("method", "route", "status"), registry=self.registry
        )
        self.duration_s = Histogram(
            "prunefront_http_request_duration_seconds",
            "Time to the end of the answer.",
            ("route",),
            registry=self.registry,
        )

    def watch_store(self, store: Store) -> None:
        """Report the jobs of a store from now on."""
        self.registry.register(JobCollector(store))

    def render(self) -> tuple[bytes, str]:
        """The exposition text and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST


class JobCollector(Collector):
    """Jobs by state, counted in the store when asked."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def describe(self) -> Iterator[Metric]:
        # Without this the registry would collect once on registration, before the store may answer.
        yield GaugeMetricFamily("prunefront_jobs", "Jobs by state.", labels=("state",))

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("prunefront_store_up", "Whether the database answers.")
        jobs = GaugeMetricFamily("prunefront_jobs", "Jobs by state.", labels=("state",))
        try:
            counts = self.store.count_jobs()
        except StoreError:
            up.add_metric((), 0)
            yield up
            return
        up.add_metric((), 1)
        for state in JobState:
            jobs.add_metric((state.value,), counts.get(state, 0))
        yield up
        yield jobs


class RequestMeter:
    """ASGI middleware that counts and times requests by route, not by path: ids would make endless series."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 500
        started = time.perf_counter()

        async def send_noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_noting_status)
        finally:
            route = route_of(scope)
            self.metrics.requests.labels(scope["method"], route, str(status)).inc()
            self.metrics.duration_s.labels(route).observe(time.perf_counter() - started)


def route_of(scope: Scope) -> str:
    """The path with its parameters by name; one label for everything that no route answers."""
    path: str = scope["path"]
    if path.startswith("/static/"):
        return "/static"
    if "endpoint" not in scope:
        return "other"
    names = {str(value): f"{{{name}}}" for name, value in scope.get("path_params", {}).items()}
    return "/".join(names.get(segment, segment) for segment in path.split("/"))
