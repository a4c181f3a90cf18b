"""Temperature and thresholds: against what is known of made-up models, and against a search over all of them."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from configs.errors import InputError
from trainer.metrics.classification import calibration_error
from trainer.scoring.calibrating import figures, fit, judged
from trainer.tasks.task import Calibration
from trainer.tasks.text import CausalTask


def made_up(too_sure, several, number=2000, labels=3):
    """Logits of a model that is sure by a factor too much, and labels drawn from what it would say without it."""
    generator = torch.Generator().manual_seed(0)
    honest = torch.randn(number, labels, generator=generator, dtype=torch.float64) * 1.5
    if several:
        truths = torch.bernoulli(honest.sigmoid(), generator=generator).bool()
    else:
        drawn = torch.multinomial(honest.softmax(dim=1), 1, generator=generator).squeeze(1)
        truths = torch.nn.functional.one_hot(drawn, labels).bool()
    return honest * too_sure, truths


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("too_sure", [0.3, 1.0, 3.0])
def test_the_temperature_is_the_factor_by_which_a_model_is_too_sure(too_sure, several):
    logits, truths = made_up(too_sure, several)
    found = fit(logits, truths, several=several)
    assert found.temperature == pytest.approx(too_sure, rel=0.1)
    before, after = (figures(logits, truths, one, several=several) for one in (Calibration(), found))
    assert after["loss"] <= before["loss"] + 1e-9
    assert after["expected_calibration_error"] < 0.03
    if too_sure != 1.0:
        assert after["expected_calibration_error"] < before["expected_calibration_error"] / 2


def test_no_other_temperature_has_less_loss():
    logits, truths = made_up(2.0, several=False)
    best = fit(logits, truths, several=False).temperature
    losses = [figures(logits, truths, Calibration(best * by), several=False)["loss"] for by in (0.98, 1.0, 1.02)]
    assert min(losses) == losses[1]


def test_labels_without_a_mistake_have_a_temperature_all_the_same():
    truths = torch.eye(4).repeat(20, 1).bool()
    found = fit(truths.double() * 4 - 2, truths, several=False)
    assert 0.05 <= found.temperature < 0.5
    assert figures(truths.double() * 4 - 2, truths, found, several=False)["loss"] < 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_thresholds_have_the_best_f1_that_there_is(seed):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(60, 2)) * 2)
    truths = torch.from_numpy(rng.random((60, 2)) < 0.3)
    found = fit(logits, truths, several=True)
    given = (logits / found.temperature).sigmoid().numpy()
    for label in range(2):
        best = max(f1_score(truths[:, label], given[:, label] > cut) for cut in [0, *given[:, label]])
        reached = f1_score(truths[:, label], given[:, label] > found.thresholds[label])
        assert reached == pytest.approx(best)
    expected = f1_score(truths, given > np.array(found.thresholds), average="macro")
    assert figures(logits, truths, found, several=True)["macro_f1"] == pytest.approx(expected)


def test_a_label_that_no_record_has_keeps_half():
    logits, truths = made_up(1.0, several=True, number=80)
    truths[:, 1] = False
    assert fit(logits, truths, several=True).thresholds[1] == 0.5


def test_the_calibration_error_is_the_gap_in_each_bin():
    given, right = np.array([0.95, 0.95, 0.55, 0.55]), np.array([True, False, True, False])
    assert calibration_error(given, right) == pytest.approx((2 * 0.45 + 2 * 0.05) / 4)
    assert math.isclose(calibration_error(np.array([1.0]), np.array([True])), 0.0)


def test_what_has_no_labels_is_refused():
    class Words:
        bos_token_id = eos_token_id = 0

        def __len__(self):
            return 9

    with pytest.raises(InputError, match="the task 'causal' has no head whose labels have probabilities"):
        judged(None, CausalTask(Words(), 16), [], 4)
