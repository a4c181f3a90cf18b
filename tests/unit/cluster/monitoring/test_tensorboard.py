"""TensorBoard scalars hold what the events hold."""

import pytest

from cluster.monitoring.tensorboard import TensorBoard
from configs.events import EventLog

pytest.importorskip("tensorboard")


def test_the_scalars_are_the_events_figures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with TensorBoard(tmp_path) as board:
        log = EventLog(tmp_path / "events.jsonl", (board,))
        for step in (1, 2):
            values = {"steps": 2, "loss": 3.0 / step, "learning_rate": 0.5, "tokens": 64, "seconds": 0.25}
            log.emit("pretrain", "step", step=step, **values)
        log.emit("pretrain", "validation", step=2, loss=1.25, bits_per_char=2.5)
        values = {"rounds": 1, "answered": ["a", "b"], "bytes": 1024, "seconds": 2.0, "epsilon_left": 24.0}
        log.emit("federated", "round", round=1, **values)
        values = {"bits_per_char": 2.25, "accuracy": None, "macro_f1": 0.5, "f1_by_label": {"a": {"f1": 0.5}}}
        log.emit("federated", "private_evaluation", round=1, silos=["a", "b"], **values)
        log.emit("pretrain", "commit", step=2)
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = {tag: [(point.step, point.value) for point in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    assert found == {
        "pretrain/loss": [(1, 3.0), (2, 1.5)],
        "pretrain/learning_rate": [(1, 0.5), (2, 0.5)],
        "pretrain/tokens_per_s": [(1, 256.0), (2, 256.0)],
        "pretrain/validation_loss": [(2, 1.25)],
        "pretrain/validation_bits_per_char": [(2, 2.5)],
        "federated/silos": [(1, 2.0)],
        "federated/bytes": [(1, 1024.0)],
        "federated/seconds": [(1, 2.0)],
        "federated/epsilon_left": [(1, 24.0)],
        "federated/private_bits_per_char": [(1, 2.25)],
        "federated/private_macro_f1": [(1, 0.5)],
    }


def test_it_is_off_by_default_and_written_where_asked(siloweave, tmp_path):
    folder = tmp_path / "runs" / "tiny"
    assert siloweave("export", "-c", "tiny", cwd=tmp_path).returncode == 2
    assert not (folder / "tensorboard").exists()
    assert siloweave("export", "-c", "tiny", "--set", "monitoring.tensorboard=true", cwd=tmp_path).returncode == 2
    assert list((folder / "tensorboard").iterdir())


def test_without_the_package_it_is_one_clear_line(siloweave, hidden, tmp_path):
    arguments = ["export", "-c", "tiny", "--set", "monitoring.tensorboard=true"]
    done = siloweave(*arguments, cwd=tmp_path, PYTHONPATH=hidden("tensorboard"))
    assert done.returncode == 2
    assert "pip install 'siloweave[monitoring]'" in done.stderr
