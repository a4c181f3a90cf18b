"""Which device a silo computes on; and that all that it computes lies there, on one that is not the processor."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import second_device
import torch

from configs.errors import InputError
from trainer.device import CPU, beside, device_of

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0


@pytest.mark.parametrize("setting", ["cpu", "auto"])
def test_without_a_gpu_silos_compute_on_the_processor(setting):
    found = device_of(setting)
    assert found == (torch.device("cuda:0") if GPUS and setting == "auto" else CPU)


def test_a_gpu_that_is_not_there_is_refused_by_name():
    with pytest.raises(InputError, match=rf"silo.device is 'cuda:{GPUS + 7}': .*; .*(install|give)"):
        device_of(f"cuda:{GPUS + 7}")


def test_where_the_model_is_on_the_processor_nothing_changes():
    assert isinstance(beside(torch.nn.Linear(1, 1)), nullcontext)


@pytest.fixture(scope="module")
def differences():
    """Largest relative difference of each result between the processor and a second device."""
    paths = [Path(second_device.__file__).parent, Path(second_device.__file__).parents[2]]
    done = subprocess.run(
        [sys.executable, second_device.__file__],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("task", ["text", "labels", "tags", "questions"])
@pytest.mark.parametrize("result", ["private", "plain", "sums", "scores"])
def test_a_second_device_gives_what_the_processor_gives(differences, task, result):
    """Private and plain updates, noised sums, and scores in the clear. The kernels are not all the same."""
    # Adam makes a whole step of a gradient that is nearly zero, whose last bits are each processor's own.
    assert differences[f"{task}, {result}"] < (1e-2 if result == "plain" else 1e-5)


def test_units_are_computed_together_there_as_far_as_it_is_proved(differences):
    assert differences["proved"] == 4 or not differences["alike"]


def test_tensors_of_two_devices_do_not_mix(differences):
    assert differences["mixes"] == 0.0
