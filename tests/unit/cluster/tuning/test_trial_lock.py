"""A trial is a run like others: nobody else writes there meanwhile."""

from cluster.tuning.ray_tune import Kind, _train
from configs.load import load
from configs.locks import note_of_holder
from configs.run_directory import run_directory
from configs.storage.layout import RunFiles


def test_a_trial_at_work_is_locked_and_then_free(tmp_path):
    """Before: the search alone was, so that a trial of a killed search and its successor wrote to one run."""
    config = load("tiny", [f'run.storage="{tmp_path}"', "run.name=trial-0001"])
    lock, seen = RunFiles(run_directory(config)).lock, []

    def train(_config, _on_event):
        seen.append(note_of_holder(lock))

    lock.parent.mkdir(parents=True, exist_ok=True)
    _train(
        Kind(("loss",), train, lambda _: [], lambda _: 1, lambda _: [], comparable=True, one_at_a_time=False), config
    )
    assert b'"pid"' in seen[0]
    assert note_of_holder(lock) is None
