"""How sure a model may be: a temperature for what it says of labels, and of several labels a threshold for each."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from configs.errors import InputError
from trainer.metrics.classification import calibration_error
from trainer.scoring.score import places_by_length
from trainer.tasks.task import Calibration, Encoded, LabellingTask, Task

LEAST = 40
_COLDEST, _HOTTEST = 0.05, 20.0


def judged(model: Any, task: Task, examples: Sequence[Encoded], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a model says of each example's labels, (N, L) in float64, and which are right, (N, L).

    Args:
        model: in evaluation mode.
        task: what it answers.
        examples: with right answers.
        size: of a batch.

    Raises:
        InputError: the task has no labels with probabilities, or there are too few examples.
    """
    if not isinstance(task, LabellingTask):
        raise InputError(f"the task {task.name!r} has no head whose labels have probabilities; nothing to calibrate")
    if len(examples) < LEAST:
        raise InputError(f"{len(examples)} records are too few to calibrate on; give {LEAST} or more")
    logits: list[Any] = [None] * len(examples)
    truths: list[Any] = [None] * len(examples)
    with torch.no_grad():
        for places in places_by_length(examples, size):
            said_BL, right_BL = task.judged(model, [examples[place] for place in places])
            for place, said_L, right_L in zip(places, said_BL, right_BL, strict=True):
                logits[place], truths[place] = said_L, right_L
    said_NL = torch.stack(logits).double()
    if not said_NL.isfinite().all():
        raise InputError("the model says something that is no number; its training has diverged")
    return said_NL, torch.stack(truths)


def fit(logits_NL: torch.Tensor, truths_NL: torch.Tensor, *, several: bool) -> Calibration:
    """The temperature of the least negative log-likelihood (Guo et al. 2017), and thresholds of the best F1.

    Args:
        logits_NL: what a model says of each label.
        truths_NL: which are right.
        several: whether a text may have any number of labels; only then there are thresholds.
    """
    log_t = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = _nats(logits_NL / log_t.exp(), truths_NL, several=several)
        loss.backward()
        return loss

    optimizer.step(closure)
    # Labels that are told apart without a mistake ask for a temperature of 0, and noise for an endless one.
    temperature = min(max(math.exp(log_t.item()), _COLDEST), _HOTTEST)
    if not several:
        return Calibration(temperature)
    columns = zip((logits_NL / temperature).sigmoid().T, truths_NL.T, strict=True)
    return Calibration(temperature, tuple(_threshold(given_N, right_N) for given_N, right_N in columns))


def figures(
    logits_NL: torch.Tensor, truths_NL: torch.Tensor, calibration: Calibration, *, several: bool
) -> dict[str, float]:
    """Mean negative log-likelihood and expected calibration error; of several labels macro F1, too."""
    scaled_NL = logits_NL / calibration.temperature
    nats = _nats(scaled_NL, truths_NL, several=several).item()
    if not several:
        given_N, chosen_N = scaled_NL.softmax(dim=1).max(dim=1)
        right_N = truths_NL.gather(1, chosen_N[:, None]).squeeze(1)
        return {"loss": nats, "expected_calibration_error": calibration_error(given_N.numpy(), right_N.numpy())}
    given_NL = scaled_NL.sigmoid()
    chosen_NL = given_NL > torch.tensor(calibration.thresholds or 0.5, dtype=torch.float64)
    hits_L, sizes_L = (chosen_NL & truths_NL).sum(dim=0), chosen_NL.sum(dim=0) + truths_NL.sum(dim=0)
    f1_L = torch.where(sizes_L > 0, 2 * hits_L / sizes_L.clamp(min=1), 0.0)
    error = calibration_error(given_NL.numpy(), truths_NL.numpy())
    return {"loss": nats, "expected_calibration_error": error, "macro_f1": f1_L.mean().item()}


def _nats(logits_NL: torch.Tensor, truths_NL: torch.Tensor, *, several: bool) -> torch.Tensor:
    if not several:
        return torch.nn.functional.cross_entropy(logits_NL, truths_NL.int().argmax(dim=1))
    by_label = torch.nn.functional.binary_cross_entropy_with_logits(logits_NL, truths_NL.double(), reduction="none")
    return by_label.sum(dim=1).mean()


def _threshold(given_N: torch.Tensor, right_N: torch.Tensor) -> float:
    """What the best F1 of one label needs: between two probabilities that there are; of equals the nearest to half."""
    if not right_N.any():
        return 0.5
    values = given_N.unique()
    cuts = torch.cat([torch.tensor([0.5], dtype=torch.float64), (values[1:] + values[:-1]) / 2, values[:1] / 2])
    chosen_CN = given_N[None, :] > cuts[:, None]
    f1_C = 2 * (chosen_CN & right_N).sum(dim=1) / (chosen_CN.sum(dim=1) + right_N.sum())
    best = cuts[f1_C >= f1_C.max() - 1e-12]
    return float(best[(best - 0.5).abs().argmin()])
