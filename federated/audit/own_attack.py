"""A silo's white-hat kit: its own members against its own held-out records, on what has really left it.

Every figure is private data. Nothing here is sent, charged or written: the steward's command writes it where it stays.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from configs.errors import InputError
from configs.schema.silo import SiloConfig
from configs.storage.sealing import load_key
from federated.adapters.arrays import Arrays
from federated.adapters.merged import with_shared
from federated.adapters.warm_model import put_on
from federated.audit.own_records import Subject, Wanted, subject
from federated.evaluation.private_sums import evaluated
from federated.silo.released.released import ReleasedRound
from federated.silo.units import Rows
from federated.silo.workbench import Workbench, public_base_model
from privacy.audit.attacks import CONFIDENCE, Scores, membership_figures
from privacy.audit.updates import update_scores
from privacy.clipping.clipping import MOST_AT_ONCE, clipping
from privacy.ledger.runs import Body
from trainer.device import beside, where
from trainer.models.load import load_model
from trainer.scoring.record_losses import record_losses
from trainer.scoring.score import places_by_length
from trainer.tasks.task import Encoded, Task

ATTACK_VERSION = 1
_OF_ALL_ROUNDS = {"update": "updates", "loss_against_start": "updates_lowered_loss"}  # a record's sum over them
Mask = npt.NDArray[np.bool_]
OnDone = Callable[[int, int], None]
_LOG = logging.getLogger(__name__)
_LOG.addHandler(logging.NullHandler())
_LOG.propagate = False  # what a workbench says of the records is for the silo's own log


def attack(
    config: SiloConfig, bodies: Sequence[Body], wanted: Wanted, on_done: OnDone = lambda _done, _of: None
) -> dict[str, Any]:
    """How well the silo's members are told from its held-out records by what has left in a run.

    By a model's loss (Yeom et al. 2018); by how far that is below the loss of the model before, which stands for the
    reference models of Carlini et al. 2022; and by each update itself (Nasr et al. 2019). A round's model is the one
    that the silo's own update makes, before others are averaged in: the coordinator sees it.

    Args:
        config: the silo.
        bodies: what its ledger's entries say.
        wanted: what is asked for.
        on_done: told what is done, and of how much.

    Returns:
        What ``attack.json`` holds. Private.

    Raises:
        InputError: as ``subject``; or the base model is another one than a round's.
        PolicyRefusal: the policy, or the task, is no longer that of the run.
    """
    base = public_base_model(config)
    found = subject(config, bodies, wanted)
    passes = 3 * len(found.rounds) + 2 * (wanted.model is not None)
    done = iter(range(1, passes + 1))
    bench = Workbench(config, base, found.units, _LOG)
    kit = _Kit(config, found, bench, lambda: on_done(next(done), passes))
    opening = found.run.opening
    return {
        "version": ATTACK_VERSION,
        "silo": config.silo.id,
        "run": found.run.name,
        "epsilon": opening.get("epsilon"),  # of an entrusted run the aggregator's ledger has it
        "delta": opening.get("delta"),
        "members": len(found.members),
        "held_out": len(found.others),
        "confidence": CONFIDENCE,
        "base_model": base.content_digest,
        "model": wanted.model and str(wanted.model),
        "rounds_left": found.rounds_left,
        **kit.figures(wanted.model),
    }


class _Kit:
    """The scores of both sides' records, in one order: members first."""

    def __init__(self, config: SiloConfig, found: Subject, bench: Workbench, on_pass: Callable[[], None]) -> None:
        self._config, self._found, self._bench, self._on_pass = config, found, bench, on_pass
        self._units: list[Rows] = [*found.members, *found.others]
        self._is_member = np.arange(len(self._units)) < len(found.members)

    def figures(self, model: Path | None) -> dict[str, Any]:
        """Of the run's model, where it is given, of each round, and of all rounds' updates together."""
        attacks = self._of_model(model) if model is not None else {}
        rounds, totals = [], {name: np.zeros(len(self._units)) for name in _OF_ALL_ROUNDS}
        for released in self._found.rounds:
            scores, there = self._of_round(released)
            for name, total in totals.items():
                total[there] += scores[name]
            shown = {name: self._compared(values, there) for name, values in scores.items()}
            rounds.append({"round": released.number, **{name: _short(found) for name, found in shown.items()}})
        if rounds:
            everywhere = np.ones_like(self._is_member)
            attacks |= {_OF_ALL_ROUNDS[name]: self._compared(total, everywhere) for name, total in totals.items()}
        return {"attacks": attacks, "rounds": rounds}

    def _of_model(self, folder: Path) -> dict[str, Any]:
        silo, task = self._config.silo, self._bench.task
        base = load_model(Path(silo.base_model), load_key(silo.encryption_key_file), task.head)
        records, there = self._encoded(task)
        before = self._losses(base.to(self._bench.device), task, records)
        after = self._losses(with_shared(base, folder).to(self._bench.device), task, records)
        scores = {"loss": -after, "loss_against_base": before - after}
        return {f"model_{name}": self._compared(values, there) for name, values in scores.items()}

    def _of_round(self, released: ReleasedRound) -> tuple[dict[str, Scores], Mask]:
        """Scores of the records that the round's task makes something of, and which these are."""
        train, update = released.read()
        ours = self._bench.base_model.content_digest
        if train.base_model_digest != ours:
            raise InputError(
                f"silo.base_model {self._config.silo.base_model!r}: is {ours[:16]}…, round {released.number} of run "
                f"{self._found.run.name!r} began with {train.base_model_digest[:16]}…; put that one back"
            )
        task = self._bench.examples(train).task
        model, adapter = self._bench.fitted(train, self._config.policy)
        records, there = self._encoded(task)
        along = self._along(model, task, records, adapter, update)
        losses = []
        for weights in (adapter, {name: adapter[name] + update[name] for name in adapter}):
            with evaluated(model, weights):
                losses.append(self._losses(model, task, records))
        before, after = losses
        return {"loss": -after, "loss_against_start": before - after, "update": along}, there

    def _encoded(self, task: Task) -> tuple[list[Encoded], Mask]:
        """One example of each unit that has any: what a unit adds to a step is one, too."""
        examples = [task.examples(unit)[:1] for unit in self._units]
        there = np.array([bool(found) for found in examples])
        if min(there[self._is_member].sum(), there[~self._is_member].sum()) < 2:
            raise InputError(
                f"silo {self._config.silo.id!r}: hardly a record says anything within {task.context_length} tokens; "
                "give others with --held-out FILE, or attack another run"
            )
        return [one for found in examples for one in found], there

    def _losses(self, model: Any, task: Task, records: Sequence[Encoded]) -> Scores:
        with beside(model):
            losses = record_losses(model.eval(), task, records, self._config.silo.micro_batch_size)
        self._on_pass()
        return losses

    def _along(self, model: Any, task: Task, records: Sequence[Encoded], adapter: Arrays, update: Arrays) -> Scores:
        silo, norm = self._config.silo, self._found.run.opening["plan"]["max_grad_norm"]
        put_on(model.train(), adapter)
        along = np.zeros(len(records))
        with beside(model), clipping(model, norm, silo.clipping) as clipper:
            direction = {name: torch.from_numpy(value).to(where(model)) for name, value in update.items()}

            def losses(batch: Sequence[Encoded]) -> torch.Tensor:
                return task.record_losses(model, task.collate(batch))

            for places in places_by_length(records, min(silo.micro_batch_size, MOST_AT_ONCE)):
                along[places] = update_scores(clipper, losses, [records[place] for place in places], direction)
        self._on_pass()
        return along

    def _compared(self, scores: Scores, there: Mask) -> dict[str, Any]:
        is_member = self._is_member[there]
        return membership_figures(scores[is_member], scores[~is_member])


def _short(figures: dict[str, Any]) -> dict[str, Any]:
    """Without the curve, which of each round would be long."""
    return {name: value for name, value in figures.items() if name != "roc"}
