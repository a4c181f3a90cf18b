"""Two cheap benchmarks as anyone would run them: what they measure moves, and they must not rot."""

import json
import os
import subprocess
import sys

import pytest
from repository import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"


@pytest.mark.parametrize(
    ("arguments", "figure"),
    [
        (["accounting.py", "--steps", "1", "--repetitions", "1"], "seconds"),
        (["noise.py", "--repetitions", "1"], "figures"),
    ],
)
def test_writes_its_figures_and_their_setting(tmp_path, arguments, figure):
    path = tmp_path / "figures.json"
    script, *options = arguments
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *options, "--json", str(path)],
        env={**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(path.read_text())
    assert {"date", "machine", "versions", figure} <= document.keys()
    assert document[figure]


def test_peers_that_train_other_work_are_found_out():
    from pretrain import same_losses

    losses = {"torchrun": [7.0, 6.0], "siloweave": [7.0, 6.0003]}
    assert same_losses(losses) == pytest.approx(5e-5, rel=1e-3)
    with pytest.raises(SystemExit, match="hf_trainer does other work: its loss at step 2"):
        same_losses({**losses, "hf_trainer": [7.0, 6.6]})


def test_only_steps_inside_turns_count():
    from pretrain import rate

    times = [0.5, 1.0, 1.5, 2.0, 7.0, 7.25, 7.5, 9.0]
    assert rate(times, [(0.9, 2.1), (6.9, 7.6), (8.5, 9.5)]) == pytest.approx(4 / 1.5)


def test_parts_of_a_start_add_up():
    from startup import parts_of_command, parts_of_peer

    lines = [
        {"time": 12.0, "mark": "started"},
        {"time": 15.0, "mark": "imported"},
        {"time": 16.0, "step": 1, "loss": 7.0},
        {"time": 17.0, "step": 2, "loss": 6.9},
    ]
    assert parts_of_peer(10.0, lines) == {"launcher": 2.0, "imports of the ranks": 3.0, "first step": 1.0}
    events = [
        {"time": 11.0, "event": "start"},
        {"time": 15.0, "event": "gang"},
        {"time": 19.0, "event": "started", "seconds": {"import": 2.0, "join": 0.5, "build": 1.0, "resume": 0.25}},
        {"time": 20.0, "event": "step", "step": 1, "loss": 7.0, "seconds": 0.5},
    ]
    parts = parts_of_command(10.0, events)
    assert parts["between"] == pytest.approx(0.75)
    assert sum(parts.values()) == pytest.approx(10.0)


def test_engines_that_compute_other_bytes_are_found_out():
    from simulation import check_same, ratios

    results = {"plain_2": {"training_digest": "a", "empty_digest": "b", "rate": 4.0}}
    results["local_grid"] = {**results["plain_2"], "rate": 3.0}
    check_same(results)
    assert ratios([results], "rate")["local_grid"]["median"] == 0.75
    with pytest.raises(SystemExit, match="not the same work: training_digest"):
        check_same({**results, "flower": {"training_digest": "c", "empty_digest": "b"}})
