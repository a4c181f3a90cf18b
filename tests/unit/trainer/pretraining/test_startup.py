"""What a rank imports, and how long each phase of its start took."""

import subprocess
import sys

import pytest
from repository import REPOSITORY

from trainer.pretraining.startup import Start

ROOT = REPOSITORY
IMPORTS = """
import sys
import trainer.pretraining.loop
from trainer.pretraining.startup import import_libraries

assert "torch" not in sys.modules, "imported before the collector rests, and before anybody is told"
import_libraries()
assert not {"boto3", "mlflow", "scipy", "torchao"} & set(sys.modules), "hidden, and not left hidden"
assert "torch._inductor.lowering" not in sys.modules
from deepspeed.runtime import compiler
from deepspeed.runtime.zero.muon.original_muon import zeropower_via_newtonschulz5

import torch

assert compiler.compile.__name__ == "compile", "ours is gone again"
orthogonal = zeropower_via_newtonschulz5(torch.randn(4, 4), steps=5)
assert orthogonal.shape == (4, 4)
"""


def test_libraries_come_without_what_is_not_used():
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS],
        env={"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_phases_are_entered_and_timed(monkeypatch):
    clock = iter([10.0, 12.0, 12.5, 13.0])
    monkeypatch.setattr("trainer.pretraining.startup.time.perf_counter", lambda: next(clock))
    entered: list[tuple[int, str]] = []
    start = Start(lambda step, phase: entered.append((step, phase)))
    for name in ("import", "join", "build"):
        start.phase(name)
    assert entered == [(0, "import"), (0, "join"), (0, "build")]
    assert start.seconds() == pytest.approx({"import": 2.0, "join": 0.5, "build": 0.5})
