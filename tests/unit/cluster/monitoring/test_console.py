"""What a person sees of a run: loss, tokens a second and the time left, after a restart and a resume too."""

import pytest

from cluster.monitoring.console import Progressing
from cluster.monitoring.durations import Remaining, duration


def step(number, **more):
    values = {"step": number, "steps": 100, "loss": 2.5, "tokens": 512, "seconds": 0.25, **more}
    return {"time": 0.0, "stage": "pretrain", "event": "step", **values}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (11100, "3 h 05 min")]
)
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text


def test_the_time_left_knows_nothing_of_what_was_done_before():
    now = [0.0]
    remaining = Remaining(clock=lambda: now[0])

    def at(seconds, position):
        now[0] = seconds
        return remaining(position, 100)

    assert at(30.0, 51) is None  # a run that is continued: its first step says nothing
    assert at(32.0, 52) == 48 * 2.0
    assert at(34.0, 53) == 47 * 2.0
    assert at(99.0, 51) is None  # a restart goes back, and its start is not the speed
    assert at(100.0, 52) == 48 * 1.0


def test_a_line_has_loss_speed_and_the_time_left(capsys):
    with Progressing() as shown:
        shown(step(1))
        shown._last_line = -1e9  # the next line is due
        shown(step(2, mfu=0.412))
        shown({"time": 0.0, "stage": "pretrain", "event": "restart", "attempt": 1, "cause": "rank 1's process died"})
        shown({"time": 0.0, "stage": "evaluate", "event": "missing", "message": "sacrebleu is not installed"})
        shown({"time": 0.0, "stage": "tune", "event": "trial", "trial": 3, "done": 4, "of": 4, "status": "stopped"})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "pretrain: 1/100 loss 2.500, 2,048 tokens/s"
    assert lines[1].startswith("pretrain: 2/100 loss 2.500, 2,048 tokens/s, MFU 41.2%, ")
    assert lines[1].endswith(" left")
    missing = "evaluate: missing: sacrebleu is not installed"
    assert lines[2:] == ["pretrain: restart: rank 1's process died", missing, "tune: 4/4 trial 3 stopped"]
