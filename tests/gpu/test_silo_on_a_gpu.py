"""What a silo computes on a GPU is what it computes on the processor, and is repeated to the last bit.

Where there is no GPU the processor is compared with itself, so that this file's own code runs. ``make gpu`` runs it.
"""

import numpy as np
import pytest
import torch
from compared_devices import cases, compared, computed

from trainer.device import device_of
from trainer.models.adapters import add_adapter

DEVICE = device_of("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def differences():
    return compared(str(DEVICE))


@pytest.mark.parametrize("task", ["text", "labels", "tags", "questions"])
@pytest.mark.parametrize("result", ["private", "plain", "sums", "scores"])
def test_results_are_those_of_the_processor(differences, task, result):
    assert differences[f"{task}, {result}"] < 1e-3


def test_units_are_computed_together_as_far_as_it_is_proved(differences):
    assert differences["proved"] >= 1


@pytest.mark.parametrize("task", ["text", "labels", "tags", "questions"])
def test_the_same_is_given_to_the_last_bit_when_it_is_asked_again(task):
    kind, made = cases()[task]
    first, again = (
        computed(kind, add_adapter(made(), 4, 8.0, seed=0, head=kind.head).train().to(DEVICE)) for _ in range(2)
    )
    assert all(np.array_equal(first[what], again[what]) for what in first)
