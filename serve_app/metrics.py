"""Prometheus metrics of the ingress and of a model replica, and the merge of several processes' metrics.

Labels never hold what a client sends: prompts, adapter ids and keys would grow without bound and leak.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from serve_app.http.errors import STATUS_OF

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64)
STAGES = ("decode", "adapter", "queue", "forward", "masks")

_ENGINE_COUNTERS = {
    "image_cache_hits": "Images whose features were cached.",
    "image_cache_misses": "Images whose features were not cached.",
    "image_cache_evictions": "Images evicted from the cache.",
    "text_cache_hits": "Prompts whose features were cached.",
    "text_cache_misses": "Prompts whose features were not cached.",
    "forwards": "Detector passes.",
    "rows": "(image, prompt) pairs that passed the detector.",
    "images_encoded": "Images that passed the vision encoder.",
    "images_labelled": "Images that passed a dense head.",
    "objects_clicked": "Objects that passed the click head.",
    "click_decodes": "Passes of the click head.",
}
_ENGINE_GAUGES = {"image_cache_bytes": "Memory of cached images."}


class IngressMetrics:
    """Metrics of the HTTP ingress."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "sam3lora_requests",
            "Requests by route and outcome: ok, cancelled by the client, or the type of the error.",
            ("route", "outcome"),
            registry=self.registry,
        )
        self._latency = Histogram(
            "sam3lora_request_duration_seconds",
            "Time from a request's arrival to its response.",
            ("route",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "sam3lora_requests_in_flight", "Requests that wait for their response.", registry=self.registry
        )

    def finished(self, route: str, outcome: str, seconds: float) -> None:
        """Count an answered request. The route is a path's template such as "/v1/segment", never the path that came."""
        assert outcome in ("ok", "cancelled") or outcome in STATUS_OF, outcome
        self._requests.labels(route, outcome).inc()
        self._latency.labels(route).observe(seconds)

    def text(self) -> str:
        return generate_latest(self.registry).decode()


class ReplicaMetrics:
    """Metrics of a model replica; the functions given are called at every scrape."""

    def __init__(
        self,
        engine_counters: Callable[[], Mapping[str, int]],
        queue_length: Callable[[], int],
        resident_adapters: Callable[[], int],
    ) -> None:
        self.registry = registry = CollectorRegistry()
        Gauge("sam3lora_queue_length", "Requests that wait for the model.", registry=registry).set_function(
            queue_length
        )
        Gauge("sam3lora_adapters_resident", "Adapters in memory.", registry=registry).set_function(resident_adapters)
        self.batch_rows = Histogram(
            "sam3lora_batch_rows", "(image, prompt) pairs of a batch.", buckets=_ROWS, registry=registry
        )
        self.batch_requests = Histogram(
            "sam3lora_batch_requests", "Requests of a batch.", buckets=_ROWS, registry=registry
        )
        self.batch_seconds = Histogram(
            "sam3lora_batch_duration_seconds", "Time of a batch in the model.", buckets=_SECONDS, registry=registry
        )
        stage_seconds = Histogram(
            "sam3lora_stage_duration_seconds",
            "Time of a request in a stage.",
            ("stage",),
            buckets=_SECONDS,
            registry=registry,
        )
        self._stages = {stage: stage_seconds.labels(stage) for stage in STAGES}
        self.out_of_memory = Counter(
            "sam3lora_out_of_memory", "Batches that ran out of memory and were tried again.", registry=registry
        )
        self.adapter_loads = Counter("sam3lora_adapter_loads", "Adapters loaded into memory.", registry=registry)
        self.adapter_failures = Counter(
            "sam3lora_adapter_load_failures", "Adapter folders that could not be used.", registry=registry
        )
        self.adapter_evictions = Counter(
            "sam3lora_adapter_evictions", "Adapters evicted for others.", registry=registry
        )
        registry.register(_Collected(lambda: _engine_families(engine_counters())))

    def stages(self, timing_ms: Mapping[str, float]) -> None:
        for stage, milliseconds in timing_ms.items():
            if stage in self._stages:
                self._stages[stage].observe(milliseconds / 1000)

    def text(self) -> str:
        return generate_latest(self.registry).decode()


class StageClock:
    """Milliseconds of one request by stage; `started_s` is its arrival by `time.monotonic`, now if not given."""

    def __init__(self, started_s: float | None = None) -> None:
        self._started_s = self._last_s = time.monotonic() if started_s is None else started_s
        self.timing_ms: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        """The stage took the time since the end of the previous one."""
        now_s = time.monotonic()
        self.timing_ms[stage] = round((now_s - self._last_s) * 1000, 3)
        self._last_s = now_s

    def set(self, stage: str, seconds: float) -> None:
        """The stage was timed elsewhere and ends now."""
        self.timing_ms[stage] = round(seconds * 1000, 3)
        self._last_s = time.monotonic()

    def with_total(self, inner_ms: Mapping[str, float]) -> dict[str, float]:
        """The stages, those of an inner clock, and the `total` so far."""
        total_ms = round((time.monotonic() - self._started_s) * 1000, 3)
        return {**self.timing_ms, **inner_ms, "total": total_ms}


def _engine_families(values: Mapping[str, int]) -> Iterator[Metric]:
    """The plain integers that the engine counts, as metrics."""
    for family, texts in ((CounterMetricFamily, _ENGINE_COUNTERS), (GaugeMetricFamily, _ENGINE_GAUGES)):
        yield from (family(f"sam3lora_{name}", texts[name], values[name]) for name in texts if name in values)


class _Collected(Collector):
    def __init__(self, read: Callable[[], Iterable[Metric]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        return self._read()


def merge(texts: Mapping[str, str]) -> str:
    """One exposition text of several: each sample gets the label `replica`, each family is described once.

    The `_created` times that Python's client adds to counters are left out.

    >>> text = "# HELP n_total How many.\\n# TYPE n_total counter\\nn_total{of=\\"b\\"} 2.0\\n"
    >>> print(merge({"x": text, "y": text}), end="")
    # HELP n_total How many.
    # TYPE n_total counter
    n_total{of="b",replica="x"} 2.0
    n_total{of="b",replica="y"} 2.0
    """
    families: dict[str, Metric] = {}
    for replica, text in texts.items():
        for family in text_string_to_metric_families(text):
            if family.name.endswith("_created"):
                continue
            merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            merged.samples += [
                sample._replace(labels={**sample.labels, "replica": replica}) for sample in family.samples
            ]
    return generate_latest(_Collected(families.values)).decode()
