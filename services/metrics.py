"""What a server counts, for Prometheus. Every label has a closed set of values: no path, no key, no request's text."""

from __future__ import annotations

from functools import partial
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder

from services.state import Service
from services.visit import UNROUTED, Visit

_PREFIX = "teacher_serve"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_ROWS = tuple(float(2**power) for power in range(13))


class Metrics:
    """The figures of one app, in a registry of its own. Thread-safe, as its parts are."""

    def __init__(self, service: Service) -> None:
        """Begins to count: also what happens in the threads of the teachers and of the books."""
        self._service, self.registry = service, CollectorRegistry()
        asked = ("route", "method", "status", "teacher")
        self._requests = self._counter("requests", "Requests, by what became of them.", asked)
        self._duration = self._seconds("request_duration", "From its head to the end of its answer.", "route")
        self._parts = self._seconds("request_part", "What the time of a request was spent on.", "part")
        self._queue_wait = self._seconds("queue_wait", "Until a request's first image was in the model.", "teacher")
        self._batch = self._seconds("batch_duration", "One batch, from the queue to its requests.", "teacher")
        self._wrote = self._seconds("books_write", "One commit of usage, audit or journal, to the disk.", "book")
        self._rows = self._histogram("batch_rows", "Images in a batch, without what fills it up.", "teacher", _ROWS)
        self._images = self._counter("images", "Images that were answered.", ("teacher",))
        self._cache = self._counter("cache_answers", "Images that were looked up first.", ("teacher", "result"))
        self._refused = self._counter("refusals", "Requests that a limit of their key's policy refused.", ("limit",))
        self._received = self._counter("received_bytes", "Bodies of requests.", ())
        self._sent = self._counter("sent_bytes", "Bodies of answers.", ())
        self.in_flight = self._gauge("requests_in_flight", "Requests that are not answered to the end.", ())
        """Incremented and decremented at the door."""
        ProcessCollector(registry=self.registry)
        self._watch(service)

    def answered(self, visit: Visit) -> None:
        """Counts a request that is over, on the event loop."""
        teacher, route = visit.teacher or "", visit.route or UNROUTED
        status = "none" if visit.status is None else str(visit.status)
        self._requests.labels(route, visit.method, status, teacher).inc()
        self._duration.labels(route).observe(visit.spent.total)
        parts = visit.spent.parts
        for part, seconds in parts.items():
            self._parts.labels(part).observe(seconds)
        if "queue" in parts:
            self._queue_wait.labels(teacher).observe(parts["queue"])
        if visit.answered:
            self._images.labels(teacher).inc(visit.images)
        self._cache.labels(teacher, "hit").inc(visit.cache_hits)
        self._cache.labels(teacher, "miss").inc(visit.cache_misses)
        if visit.limit is not None:
            self._refused.labels(visit.limit).inc()
        self._received.inc(visit.bytes_in)
        self._sent.inc(visit.bytes_out)

    def text(self, accept: str) -> tuple[bytes, str]:
        """All figures as they are now, and the media type, which is one that `accept` names."""
        encode, media_type = choose_encoder(accept)
        return encode(self.registry), media_type

    def _watch(self, service: Service) -> None:
        info = self._gauge("build_info", "Always 1; which version this is.", ("version",))
        info.labels(version("teacher-cache")).set(1)
        teachers = self._gauge("teacher_info", "Always 1; which teachers are served.", ("teacher", "digest"))
        waiting = self._gauge("queue_images", "Images that wait for the model.", ("teacher",))
        for name, batcher in service.batchers.items():
            teachers.labels(name, service.teachers[name].digest).set(1)
            waiting.labels(name).set_function(partial(getattr, batcher, "waiting"))
            batcher.on_batch(partial(self._ran, name))
        for scribe in service.scribes:
            scribe.wrote = lambda book, seconds: self._wrote.labels(book).observe(seconds)
        self._gauge("draining", "1 on the way out.", ()).set_function(lambda: service.draining)
        self._gauge("ready", "1 while new requests should be sent here.", ()).set_function(
            lambda: not service.not_ready()
        )

    def _ran(self, teacher: str, rows: int, seconds: float) -> None:
        self._rows.labels(teacher).observe(rows)
        self._batch.labels(teacher).observe(seconds)

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(f"{_PREFIX}_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...]) -> Gauge:
        return Gauge(f"{_PREFIX}_{name}", text, labels, registry=self.registry)

    def _seconds(self, name: str, text: str, label: str) -> Histogram:
        return self._histogram(f"{name}_seconds", text, label, _SECONDS)

    def _histogram(self, name: str, text: str, label: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"{_PREFIX}_{name}", text, (label,), registry=self.registry, buckets=buckets)


__all__ = ["Metrics"]
