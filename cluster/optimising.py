"""A finished model made smaller, with what that costs and saves; it is written as `merge` writes one."""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.finished import Finished
from cluster.public_records import public_records
from configs.errors import InputError
from configs.storage.files import digest_file
from configs.storage.layout import CERTIFICATE
from configs.storage.manifests import Manifest
from configs.storage.sealing import MasterKey, load_key
from federated.adapters.merged import finished_federation, plain_model, write_whole
from trainer.models.load import is_quantised
from trainer.optimisation.distilling import distil, student_of
from trainer.optimisation.heads import prune_heads
from trainer.optimisation.measuring import seconds_a_batch, sizes
from trainer.optimisation.pruning import prune_neurons, prune_weights
from trainer.optimisation.public_text import public_windows
from trainer.optimisation.quantising import quantise
from trainer.scoring.score import score

OPTIMISATION = "optimisation.json"
_PRUNING = {"prune": prune_weights, "neurons": prune_neurons, "heads": prune_heads}
_QUANTISING = ("int8", "int4")
_DISTIL = "distil"
METHODS = (*_PRUNING, *_QUANTISING, _DISTIL)
_SHARE, _STEPS = 0.5, 500
OnStep = Callable[[int, int, float], None]
"""Told how many steps of how many are done, and the loss."""
_CARD = """---
library_name: transformers
---
# Optimised model

A federation's model after `siloweave optimise`. `optimisation.json` says what was done and what that costs and saves;
`manifest.json` names by its digest the model that this one was made from, and the certificate, where there is one.
"""


@dataclass(frozen=True)
class Order:
    """What is to be done to a model.

    Attributes:
        method: one of ``METHODS``.
        share: of what the method removes; None: half of it, where it removes anything.
        steps: batches of public text that a student learns from; None: 500, where there is a student.

    Raises:
        InputError: there is no such method, or it has no such setting, or not this value of it.
    """

    method: str
    share: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"--method {self.method!r}: there is none of that name; give one of {', '.join(METHODS)}")
        if self.share is not None and self.method in _QUANTISING:
            raise InputError(f"--share {self.share}: --method {self.method} takes all weights; leave it out")
        if self.share is not None and not 0 < self.share < 1:
            raise InputError(f"--share {self.share}: give a share between 0 and 1, without these two")
        if self.steps is not None and self.method != _DISTIL:
            raise InputError(f"--steps {self.steps}: --method {self.method} trains nothing; leave it out")
        if self.steps is not None and self.steps < 2:
            raise InputError(f"--steps {self.steps}: give 2 or more")

    def filled(self) -> "Order":
        """The same with all that was left open."""
        share = None if self.method in _QUANTISING else self.share or _SHARE
        return Order(self.method, share, (self.steps or _STEPS) if self.method == _DISTIL else None)


@dataclass(frozen=True)
class Optimised:
    """What was done, and a model's size, speed and quality before and after it.

    Attributes:
        method: by its name.
        share: of what it removes; None: it removes nothing.
        steps: that a student has learnt; None: there is none.
        read: whose records the figures are of; empty: there were none that may be read.
        records: how many these are.
        before: size, seconds and figures by name.
        after: the same.
    """

    method: str
    share: float | None
    steps: int | None
    read: str
    records: int
    before: dict[str, float | None]
    after: dict[str, float | None]


def refuse_existing(output: Path) -> None:
    """Refuses to write where something is, before anything is loaded.

    Raises:
        InputError: something is there.
    """
    if output.exists():
        raise InputError(f"{output}: exists; give a path where nothing is yet, by --output")


def optimise(
    found: Finished,
    order: Order,
    output: Path,
    records: Path | None,
    on_step: OnStep = lambda _done, _of, _loss: None,
) -> tuple[Optimised, Manifest]:
    """Makes a model smaller and writes it.

    Args:
        found: the model.
        order: what is done to it.
        output: where nothing is yet; in an encrypted run it is encrypted, too.
        records: a file to score both models on; None: the run's own public records, if it has any.
        on_step: told of a student's progress.

    Raises:
        InputError: the output exists, the method doesn't fit the model, or the records can't be read.
        SiloweaveError: the disk is full or not writable.
    """
    refuse_existing(output)
    order = order.filled()
    read, units = public_records(found, records, found.config.evaluate.max_records_per_silo)
    key = load_key(found.config.run.encryption_key_file)
    model, base, inputs = plain(found, key)
    if is_quantised(model):
        raise InputError(f"{found.made}: its weights are quantised already; give the model that it was made from")
    smaller, more = _smaller(found, model, order, on_step)
    examples = [example for unit in units for example in found.task.scored(unit)]
    models = (model, smaller)
    seconds = seconds_a_batch(models, found.task)
    before, after = (
        {**sizes(model), "seconds_a_batch": took, **_figures(found, model, examples)}
        for model, took in zip(models, seconds, strict=True)
    )
    done = Optimised(**asdict(order), read=read if examples else "", records=len(examples), before=before, after=after)
    texts = {"README.md": _CARD, OPTIMISATION: json.dumps(asdict(done), indent=2) + "\n"}
    digests = {**inputs, **more, **origin(found)}
    return done, write_whole(smaller, base, found.made, output, key, digests, texts)


def _smaller(found: Finished, model: Any, order: Order, on_step: OnStep) -> tuple[Any, dict[str, str]]:
    """The smaller model, and digests of what else it was made from."""
    if order.method != _DISTIL:
        smaller = copy.deepcopy(model)
        if order.method in _PRUNING:
            _PRUNING[order.method](smaller, order.share or _SHARE)
        else:
            quantise(smaller, order.method)
        return smaller, {}
    steps, seed = order.steps or _STEPS, found.config.run.seed
    student = student_of(model, found.task.name, order.share or _SHARE)
    file, corpus = public_windows(found.config, found.run)
    distil(
        model, student, found.task, found.tokenizer, file, steps, seed, lambda done, loss: on_step(done, steps, loss)
    )
    return student, {"corpus": corpus.content_digest}


def _figures(found: Finished, model: Any, examples: Sequence[Any]) -> dict[str, float | None]:
    if not examples:
        return {}
    figures = score(model, found.task, examples, found.config.federated.micro_batch_size).figures
    return {name: value for name, value in figures.items() if not isinstance(value, dict)}


def plain(found: Finished, key: MasterKey | None) -> tuple[Any, Path, dict[str, str]]:
    """The model without peft, the folder of its tokenizer, and digests back to the base model, as a certificate has."""
    if found.manifest.kind == "merged":
        return found.model, found.made, found.manifest.inputs
    federation = finished_federation(found.made)
    model, inputs = plain_model(*federation, key)
    return model, federation[2], inputs


def origin(found: Finished) -> dict[str, str]:
    """Digests of the folder that the model was made from, and of the certificate there."""
    certificate = found.made / CERTIFICATE
    certified = {"certificate": digest_file(certificate)} if certificate.is_file() else {}
    return {**certified, found.manifest.kind: found.digest}
