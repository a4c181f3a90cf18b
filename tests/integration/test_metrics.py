"""Ray's Prometheus endpoint shows a run's figures."""

import time
import urllib.request
from unittest.mock import Mock

from cluster.monitoring.prometheus import RayMetrics

STEP = {"steps": 9, "loss": 2.5, "learning_rate": 0.5, "tokens": 64, "seconds": 0.25, "memory_bytes": 4096}


def scrape(ray):
    """All samples of all nodes: name{labels} -> value."""
    found = {}
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        try:
            text = urllib.request.urlopen(url, timeout=20).read().decode()
        except OSError:  # an agent that is busy; it is asked again
            continue
        lines = [line for line in text.splitlines() if line.startswith("ray_siloweave_")]
        found.update((line.rpartition(" ")[0], float(line.rpartition(" ")[2])) for line in lines)
    return found


def value(samples, name, run):
    mine = [number for key, number in samples.items() if key.startswith(f"{name}{{") and f'run="{run}"' in key]
    return mine[0] if mine else None


def test_the_metrics_endpoint_shows_the_run(shared_ray):
    metrics = RayMetrics("observed")
    stage = {"time": 1000.0, "stage": "pretrain"}
    metrics({**stage, "event": "gang", "pids": [1, 2]})
    for step in range(1, 8):
        metrics({**stage, "event": "step", "step": step, "gflop_per_s": 1.5, "mfu": None, **STEP})
    for attempt in (1, 2):
        metrics({**stage, "event": "restart", "attempt": attempt, "cause": "a rank's process died"})
    metrics({**stage, "event": "validation", "step": 7, "loss": 1.25, "bits_per_char": 2.0})
    metrics({**stage, "event": "commit", "step": 7})
    expected = {
        "ray_siloweave_step": 7,
        "ray_siloweave_steps": 9,
        "ray_siloweave_loss": 2.5,
        "ray_siloweave_tokens_per_s": 256,
        "ray_siloweave_gflop_per_s": 1.5,
        "ray_siloweave_memory_bytes": 4096,
        "ray_siloweave_world_size": 2,
        "ray_siloweave_failures_total": 2,
        "ray_siloweave_validation_bits_per_char": 2.0,
        "ray_siloweave_last_commit_step": 7,
    }
    deadline = time.monotonic() + 300  # Ray gathers every few seconds
    while True:
        samples = scrape(shared_ray)
        found = {name: value(samples, name, "observed") for name in expected}
        if found == expected:
            return
        assert time.monotonic() < deadline, (found, sorted(samples))
        time.sleep(1)


def test_steps_are_set_at_most_once_a_second_and_the_last_one_always(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    metrics, told = RayMetrics("limited"), []

    class Gauge:
        def set(self, number, tags):
            told.append((tags["stage"], number))

    monkeypatch.setattr(metrics, "_metric", lambda name: Gauge() if name == "step" else Mock())
    for step in range(1, 101):
        metrics({"time": 0.0, "stage": "pretrain", "event": "step", "step": step, **STEP})
    metrics({"time": 0.0, "stage": "pretrain", "event": "end", "seconds": 1.0})
    assert told[0] == ("pretrain", 1)
    assert told[-1] == ("pretrain", 100)
    assert len(told) < 10
