"""Counts of replicas add up, never fall, stay few, and are text that Prometheus' own parser reads."""

from __future__ import annotations

import pickle
import threading
import time

from prometheus_client.parser import text_string_to_metric_families

from cnn_ray.endpoint_metrics import KEPT_S, LIVE_S, MAX_VERSIONS, EndpointMetrics, MetricsBoard, render


def parsed(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """(sample, sorted labels) -> value, by Prometheus' own parser; no sample is there twice."""
    found: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    families = list(text_string_to_metric_families(text.decode()))
    assert len({family.name for family in families}) == len(families)
    for family in families:
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found
            found[key] = sample.value
    return found


def value(text: bytes, name: str, **labels: str) -> float | None:
    return parsed(text).get((name, tuple(sorted(labels.items()))))


def busy(seconds: float = 0.03, images: int = 4) -> EndpointMetrics:
    metrics = EndpointMetrics()
    metrics.loaded([("demo", 3)])
    metrics.started()
    metrics.started()
    metrics.waiting(images)
    metrics.decoded(0.004)
    metrics.predicted(images, 0.02)
    metrics.rejected("queue")
    metrics.finished("predict", 200, seconds, "demo", 3)
    return metrics


def test_every_metric_is_summed_over_replicas():
    text = render({"a": busy().snapshot(), "b": busy(seconds=0.2, images=8).snapshot()})
    assert value(text, "cnn_ray_requests_total", action="predict", code="200", model="demo", version="3") == 2
    assert value(text, "cnn_ray_request_seconds_count", action="predict") == 2
    assert abs((value(text, "cnn_ray_request_seconds_sum", action="predict") or 0) - 0.23) < 1e-9
    assert value(text, "cnn_ray_request_seconds_bucket", action="predict", le="0.05") == 1
    assert value(text, "cnn_ray_request_seconds_bucket", action="predict", le="+Inf") == 2
    assert value(text, "cnn_ray_batch_size_sum") == 12
    assert value(text, "cnn_ray_batch_size_bucket", le="4.0") == 1
    assert value(text, "cnn_ray_decode_seconds_count") == 2
    assert value(text, "cnn_ray_predict_seconds_count") == 2
    assert value(text, "cnn_ray_queue") == 12
    assert value(text, "cnn_ray_in_flight") == 2
    assert value(text, "cnn_ray_rejected_total", reason="queue") == 2
    assert value(text, "cnn_ray_loaded_models") == 2
    assert text.endswith(b"\n")


def test_buckets_of_a_histogram_are_cumulative_and_in_order():
    metrics = EndpointMetrics()
    for seconds in (0.001, 0.06, 0.06, 99):
        metrics.started()
        metrics.finished("infer", 200, seconds)
    for _ in range(3):  # also where an action is first seen by a later replica
        text = render({"a": EndpointMetrics().snapshot(), "b": metrics.snapshot()})
        buckets = [
            (float(sample.labels["le"]), sample.value)
            for family in text_string_to_metric_families(text.decode())
            for sample in family.samples
            if sample.name == "cnn_ray_request_seconds_bucket" and sample.labels["action"] == "infer"
        ]
        assert buckets == sorted(buckets)
        assert [count for _, count in buckets] == sorted(count for _, count in buckets)
        assert buckets[-1] == (float("inf"), 4)


def test_snapshots_are_small_plain_values():
    snapshot = busy().snapshot()
    raw = pickle.dumps(snapshot)
    assert pickle.loads(raw) == snapshot  # noqa: S301
    assert len(raw) < 20_000


def test_clients_cannot_make_time_series():
    metrics = busy()
    before = len(parsed(render({"a": metrics.snapshot()})))
    for number in range(1000):
        metrics.started()
        metrics.finished(f"action{number}", 404, 0.1, f"model{number}", number)
    after = parsed(render({"a": metrics.snapshot()}))
    assert (
        after[("cnn_ray_requests_total", (("action", "other"), ("code", "404"), ("model", ""), ("version", "")))]
        == 1000
    )
    assert len(after) - before < 30
    assert value(render({"a": metrics.snapshot()}), "cnn_ray_in_flight") == 1


def test_versions_have_a_bound_too():
    metrics = EndpointMetrics()
    for version in range(1, MAX_VERSIONS + 50):
        metrics.loaded([("demo", version)])
        metrics.started()
        metrics.finished("predict", 200, 0.1, "demo", version)
    text = render({"a": metrics.snapshot()})
    assert len([key for key in parsed(text) if key[0] == "cnn_ray_requests_total"]) == MAX_VERSIONS + 1
    assert value(text, "cnn_ray_requests_total", action="predict", code="200", model="", version="") == 49


def test_model_names_with_quotes_are_still_text_that_parses():
    metrics = EndpointMetrics()
    metrics.loaded([('a"\\\n', 1)])
    metrics.started()
    metrics.finished("predict", 200, 0.1, 'a"\\\n', 1)
    text = render({"a": metrics.snapshot()})
    assert value(text, "cnn_ray_requests_total", action="predict", code="200", model='a"\\\n', version="1") == 1


def test_threads_lose_no_count():
    metrics = EndpointMetrics()
    metrics.loaded([("demo", 3)])

    def work() -> None:
        for _ in range(2000):
            metrics.started()
            metrics.predicted(2, 0.01)
            metrics.finished("predict", 200, 0.01, "demo", 3)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    text = render({"a": metrics.snapshot()})
    assert value(text, "cnn_ray_requests_total", action="predict", code="200", model="demo", version="3") == 8000
    assert value(text, "cnn_ray_batch_size_sum") == 16000
    assert value(text, "cnn_ray_in_flight") == 0


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def total(board: MetricsBoard) -> float | None:
    return value(board.render(), "cnn_ray_requests_total", action="predict", code="200", model="demo", version="3")


def test_a_replica_that_goes_keeps_its_counts_and_loses_its_gauges():
    clock = Clock()
    board = MetricsBoard(clock)
    board.report("a", busy().snapshot())
    clock.now += LIVE_S - 1
    board.report("b", busy().snapshot())
    assert value(board.render(), "cnn_ray_in_flight") == 2
    clock.now += 2
    text = board.render()
    assert value(text, "cnn_ray_in_flight") == 1
    assert value(text, "cnn_ray_queue") == 4
    assert value(text, "cnn_ray_loaded_models") == 1
    assert total(board) == 2
    assert value(text, "cnn_ray_batch_size_count") == 2
    clock.now += LIVE_S
    assert total(board) == 2
    assert value(board.render(), "cnn_ray_in_flight") is None


def test_a_paused_replica_is_not_counted_twice_when_it_is_back():
    clock = Clock()
    board = MetricsBoard(clock)
    metrics = busy()
    board.report("a", metrics.snapshot())
    clock.now += LIVE_S * 3
    board.report("b", EndpointMetrics().snapshot())
    metrics.finished("predict", 200, 0.1, "demo", 3)
    board.report("a", metrics.snapshot())
    assert total(board) == 2


def test_sums_never_fall_when_a_name_starts_again_from_zero():
    board = MetricsBoard(Clock())
    board.report("a", busy().snapshot())
    board.report("a", EndpointMetrics().snapshot())
    assert total(board) == 1
    board.report("a", busy().snapshot())
    assert total(board) == 2


def test_a_thousand_replicas_that_came_and_went_cost_no_memory():
    clock = Clock()
    board = MetricsBoard(clock)
    snapshot = busy().snapshot()
    for number in range(1000):
        board.report(f"replica-{number}", snapshot)
        clock.now += KEPT_S / 10
    assert total(board) == 1000
    assert len(board._heard) <= 12


def test_an_empty_board_is_an_empty_page():
    assert MetricsBoard(Clock()).render() == b""


def test_a_request_costs_microseconds():
    """Generous to a busy machine: measured 7 microseconds for the five calls of a request."""
    metrics = EndpointMetrics()
    metrics.loaded([("demo", 3)])
    best = float("inf")
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(200):
            metrics.started()
            metrics.decoded(0.005)
            metrics.waiting(3)
            metrics.predicted(8, 0.01)
            metrics.finished("predict", 200, 0.03, "demo", 3)
        best = min(best, (time.perf_counter() - began) / 200)
    assert best < 50e-6
