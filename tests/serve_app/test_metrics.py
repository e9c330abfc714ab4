"""What is counted, and several processes' texts as one."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve_app.metrics import STAGES, IngressMetrics, ReplicaMetrics, StageClock, merge


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """(name, sorted labels) -> value."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def replica_metrics(counters: dict[str, int] | None = None) -> ReplicaMetrics:
    return ReplicaMetrics(lambda: counters or {}, queue_length=lambda: 3, resident_adapters=lambda: 2)


def test_requests_are_counted_by_route_and_outcome():
    metrics = IngressMetrics()
    metrics.finished("/v1/segment", "ok", 0.02)
    metrics.finished("/v1/segment", "ok", 0.3)
    metrics.finished("/v1/segment", "overloaded", 0.001)
    with metrics.in_flight.track_inprogress():
        found = samples(metrics.text())
    assert found["sam3lora_requests_total", (("outcome", "ok"), ("route", "/v1/segment"))] == 2
    assert found["sam3lora_requests_total", (("outcome", "overloaded"), ("route", "/v1/segment"))] == 1
    assert found["sam3lora_request_duration_seconds_count", (("route", "/v1/segment"),)] == 3
    assert found["sam3lora_request_duration_seconds_bucket", (("le", "0.025"), ("route", "/v1/segment"))] == 2
    assert found["sam3lora_requests_in_flight", ()] == 1
    assert samples(metrics.text())["sam3lora_requests_in_flight", ()] == 0


def test_a_replica_counts_batches_stages_and_adapters():
    metrics = replica_metrics()
    metrics.batch_rows.observe(5)
    metrics.batch_requests.observe(2)
    metrics.batch_seconds.observe(0.04)
    for counter in (metrics.out_of_memory, metrics.adapter_loads, metrics.adapter_failures, metrics.adapter_evictions):
        counter.inc()
    metrics.stages({"decode": 20.0, "forward": 40.0, "total": 60.0})
    found = samples(metrics.text())
    assert found["sam3lora_batch_rows_sum", ()] == 5
    assert found["sam3lora_batch_requests_sum", ()] == 2
    assert found["sam3lora_batch_duration_seconds_sum", ()] == pytest.approx(0.04)
    assert found["sam3lora_stage_duration_seconds_sum", (("stage", "decode"),)] == pytest.approx(0.02)
    assert found["sam3lora_stage_duration_seconds_count", (("stage", "masks"),)] == 0
    assert {dict(labels)["stage"] for _, labels in found if "stage" in dict(labels)} == set(STAGES)
    for name in ("out_of_memory", "adapter_loads", "adapter_load_failures", "adapter_evictions"):
        assert found[f"sam3lora_{name}_total", ()] == 1, name
    assert found["sam3lora_queue_length", ()] == 3
    assert found["sam3lora_adapters_resident", ()] == 2


def test_engine_counters_are_read_at_each_scrape():
    counters = {"image_cache_hits": 7, "image_cache_bytes": 1000, "unknown": 1}
    metrics = replica_metrics(counters)
    assert samples(metrics.text())["sam3lora_image_cache_hits_total", ()] == 7
    counters["image_cache_hits"] = 9
    found = samples(metrics.text())
    assert found["sam3lora_image_cache_hits_total", ()] == 9
    assert found["sam3lora_image_cache_bytes", ()] == 1000
    assert not any("unknown" in name for name, _ in found)


def test_merging_keeps_every_sample_once_under_its_replica():
    texts = {}
    for number, name in enumerate(("a", 'b"\\\n')):  # a name that needs quoting
        metrics = replica_metrics({"rows": number})
        metrics.batch_rows.observe(number + 1)
        texts[name] = metrics.text()
    merged = merge(texts)
    expected = {
        (name, tuple(sorted([*labels, ("replica", replica)]))): value
        for replica, text in texts.items()
        for (name, labels), value in samples(text).items()
        if not name.endswith("_created")
    }
    assert samples(merged) == expected
    described = [line for line in merged.splitlines() if line.startswith("# TYPE")]
    assert len(described) == len(set(described)) == len([line for line in merged.splitlines() if line[:6] == "# HELP"])


def test_merging_one_family_or_nothing():
    found = samples(merge({"ingress": IngressMetrics().text(), "replica": replica_metrics().text()}))
    assert found["sam3lora_queue_length", (("replica", "replica"),)] == 3
    assert found["sam3lora_requests_in_flight", (("replica", "ingress"),)] == 0
    assert merge({}) == merge({"a": ""}) == ""


def test_the_clock_gives_each_stage_its_own_time():
    clock = StageClock()
    clock.lap("decode")
    clock.set("queue", 2.0)
    clock.lap("masks")
    assert list(clock.timing_ms) == ["decode", "queue", "masks"]
    assert clock.timing_ms["queue"] == 2000
    assert clock.timing_ms["masks"] < 2000
