"""MLflow runs hold what the events hold, and a run that goes on is the same one there."""

import json
import time

import pytest

from cluster.monitoring.mlflow_sink import MLflow
from configs.errors import InputError
from configs.events import EventLog
from configs.load import load

mlflow = pytest.importorskip("mlflow")
STEP = {"steps": 3, "learning_rate": 0.5, "tokens": 64, "seconds": 0.25, "gflop_per_s": 2.0, "mfu": None}


@pytest.fixture
def config(tmp_path):
    return load("tiny", [f"run.storage={tmp_path}", f"monitoring.mlflow=sqlite:///{tmp_path / 'mlflow.db'}"])


def read(config):
    client = mlflow.MlflowClient(tracking_uri=config.monitoring.mlflow)
    (run,) = client.search_runs([client.get_experiment_by_name("siloweave").experiment_id])
    return run, {
        name: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }


def test_a_run_that_goes_on_is_one_mlflow_run(config, tmp_path):
    with pytest.raises(KeyboardInterrupt), MLflow(config, tmp_path) as sink:
        log = EventLog(tmp_path / "events.jsonl", (sink,))
        log.emit("pretrain", "step", step=1, loss=3.0, **STEP)
        raise KeyboardInterrupt
    assert read(config)[0].info.status == "KILLED"
    with MLflow(config, tmp_path) as sink:
        log = EventLog(tmp_path / "events.jsonl", (sink,))
        assert read(config)[0].info.status == "RUNNING"
        log.emit("pretrain", "restart", attempt=1, cause="rank 1's process died")
        for step in (2, 3):
            log.emit("pretrain", "step", step=step, loss=3.0 / step, **STEP)
        log.emit("pretrain", "validation", step=3, loss=1.25, bits_per_char=2.5)
    run, history = read(config)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "tiny")
    assert json.loads((tmp_path / "mlflow.json").read_text())["run_id"] == run.info.run_id
    assert run.data.params["pretrain.learning_rate"] == "0.01"
    assert run.data.params["run.seed"] == "0"
    assert "run.encryption_key_file" not in run.data.params
    assert history["pretrain/loss"] == [(1, 3.0), (2, 1.5), (3, 1.0)]
    assert history["pretrain/tokens_per_s"] == [(1, 256.0), (2, 256.0), (3, 256.0)]
    assert history["pretrain/validation_bits_per_char"] == [(3, 2.5)]
    assert history["pretrain/failures"] == [(0, 1.0)]
    assert "pretrain/mfu" not in history


def test_a_server_that_is_lost_later_does_not_stop_the_run(config, tmp_path, capsys):
    with MLflow(config, tmp_path) as sink:
        log = EventLog(tmp_path / "events.jsonl", (sink,))

        def lost(*_, **__):
            raise ConnectionError("connection refused\nat some address")

        sink._client.log_batch, real = lost, sink._client.log_batch
        log.emit("pretrain", "step", step=1, loss=3.0, **STEP)
        while sink._waiting.qsize() or not sink._lost:
            time.sleep(0.01)
        sink._client.log_batch = real
        log.emit("pretrain", "step", step=2, loss=2.0, **STEP)
    assert read(config)[1]["pretrain/loss"] == [(1, 3.0), (2, 2.0)]
    told = capsys.readouterr().err
    assert told.count("connection refused; training goes on") == 1


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("http://127.0.0.1:1", "no MLflow answers there"),
        ("mlruns", "give an address such as"),
        ("file:///tmp/mlruns", "give an address such as"),
        ("https://me:secret@host", "monitoring.mlflow holds a password"),
    ],
)
def test_a_wrong_address_is_one_clear_line(tmp_path, address, expected):
    with pytest.raises(InputError) as caught:
        MLflow(load("tiny", [f'monitoring.mlflow="{address}"']), tmp_path)
    assert expected in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_the_package_it_is_one_clear_line(siloweave, hidden, tmp_path):
    arguments = ["export", "-c", "tiny", "--set", "monitoring.mlflow=sqlite:///x.db"]
    done = siloweave(*arguments, cwd=tmp_path, PYTHONPATH=hidden("mlflow"))
    assert done.returncode == 2
    assert "pip install 'siloweave[mlflow]'" in done.stderr
