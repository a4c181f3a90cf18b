"""Siloweave's engine, measured from outside: only its arguments and the weights that it leaves."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from privacy.mechanism.dp_sgd import PrivateTraining
from privacy.mechanism.streams import Streams
from privacy.plan import PlanTerms, PrivacyPlan
from traps.layers import record_losses, records, trainable

SEED, DIGEST = bytes(range(32)), "ab" * 32
ALMOST_ONE = 1 - 2.0**-53  # a plan samples with probability below 1; at this one every record is in every batch


def train_privately(
    a_plan: PrivacyPlan, streams: Streams, model: nn.Module, optimizer: Any, units: Sequence[Any], **options: Any
) -> None:
    """All steps of one charge; the tests put broken engines in its place."""
    PrivateTraining(a_plan, model, optimizer, **options).run(streams, OneExampleEach(units))


def plan(num_records: int, **changes: float) -> PrivacyPlan:
    """A plan whose noise is next to nothing and whose batches hold everything, but for the changes."""
    values = {
        "sampling_rate": ALMOST_ONE,
        "max_grad_norm": 0.5,
        "noise_multiplier": 1e-9,
        "rounds": 1,
        "steps_per_round": 1,
        "delta": 1e-6,
    }
    return PlanTerms.model_validate({**values, **changes}).bind(num_records)


def train(
    model: nn.Module,
    x_B: Sequence[torch.Tensor],
    a_plan: PrivacyPlan,
    micro: int = 32,
    seed: bytes = SEED,
    synthetic: torch.Tensor | None = None,
) -> tuple[dict[str, torch.Tensor], list[list[int]]]:
    """Trains a copy by plain descent at rate 1.

    Returns:
        What the weights lost, times the normaliser: the noised sum of clipped gradients, over the steps; and the
        records in each step's batch.
    """
    model = copy.deepcopy(model)
    before = {name: value.detach().clone() for name, value in trainable(model).items()}
    units = Taken(len(x_B))
    made_up = records(16, seed=99) if synthetic is None else synthetic
    # Under numbers of their own, so that the engine's proof is not taken for private records.
    rows = {**dict(enumerate(x_B)), **{-1 - number: row for number, row in enumerate(made_up)}}
    train_privately(
        a_plan,
        Streams(seed, DIGEST),
        model,
        torch.optim.SGD(trainable(model).values(), lr=1.0),
        units,
        unit_losses=lambda batch: record_losses(model, torch.stack([rows[number] for number in batch])),
        shape_of=lambda _: None,
        made_up=lambda _, number: range(-number, 0),
        synthetic=[-1, -2, -3],
        micro_batch_size=micro,
    )
    scale = a_plan.expected_batch_size
    lost = {name: (before[name] - value.detach()) * scale for name, value in trainable(model).items()}
    return lost, units.batches


class OneExampleEach(Sequence[tuple[Any]]):
    """Units of a single example, which are asked for one by one as the engine asks."""

    def __init__(self, units: Sequence[Any]) -> None:
        self._units = units

    def __len__(self) -> int:
        return len(self._units)

    def __getitem__(self, index: Any) -> Any:
        return (self._units[index],)


class Taken(Sequence[int]):
    """Units by their numbers, and which of them each step took: a step asks for their number first."""

    def __init__(self, number: int) -> None:
        self._number = number
        self.batches: list[list[int]] = []

    def __len__(self) -> int:
        self.batches.append([])
        return self._number

    def __getitem__(self, index: Any) -> Any:
        unit = range(self._number)[index]
        self.batches[-1].append(unit)
        return unit


def clipped_sum(model: nn.Module, x_B: torch.Tensor, max_grad_norm: float, micro: int = 32) -> dict[str, torch.Tensor]:
    """The sum of clipped gradients of all records."""
    return train(model, list(x_B), plan(len(x_B), max_grad_norm=max_grad_norm), micro)[0]


def noise_alone(steps: int = 1, seed: bytes = SEED, num_records: int = 100) -> dict[str, torch.Tensor]:
    """The noise on the sum of a wide layer, in units of sigma * C: no record is there."""
    a_plan = plan(num_records, noise_multiplier=0.8, sampling_rate=0.1, steps_per_round=steps)
    lost, _ = train(wide(), [], a_plan, seed=seed)
    return {name: value / a_plan.noise_std for name, value in lost.items() if value.numel() > 100_000}


class Wide(nn.Module):
    """Two layers of 160,000 weights behind an embedding: room for statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 400)
        self.first, self.second = nn.Linear(400, 400), nn.Linear(400, 400)

    def forward(self, x_BT: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(self.embedding(x_BT)).tanh()).mean(dim=1)


def wide() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return Wide().train()


def batches(num_units: int, rate: float, steps: int) -> torch.Tensor:
    """Which units were in which step's batch, as the engine took them: (steps, units) of 0 and 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = nn.Sequential(nn.Embedding(10, 2))  # the cheapest; only the batches count
    averaged = Averaged(model)
    a_plan = plan(num_units, sampling_rate=rate, steps_per_round=steps, noise_multiplier=0.8)
    _, taken = train(averaged, list(records(num_units)), a_plan, micro=10_000)
    inclusion = torch.zeros(steps, num_units)
    for step, batch in enumerate(taken):
        inclusion[step, batch] = 1
    return inclusion


class Averaged(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x_BT: torch.Tensor) -> torch.Tensor:
        return self.inner(x_BT).mean(dim=1)
