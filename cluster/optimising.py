"""A finished model made smaller, with what that costs and saves; it is written as `merge` writes one."""

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.finished import Finished
from configs.errors import InputError
from configs.schema.data import RecordSettings
from configs.storage.files import digest_file
from configs.storage.layout import CERTIFICATE, RunFiles
from configs.storage.manifests import Manifest
from configs.storage.sealing import MasterKey, load_key
from federated.adapters.merged import finished_federation, plain_model, write_whole
from federated.simulation.in_the_clear import held_out_units, public_units
from trainer.optimisation.measuring import seconds_a_batch
from trainer.optimisation.pruning import METHODS, sizes
from trainer.scoring.score import score

OPTIMISATION = "optimisation.json"
_CARD = """---
library_name: transformers
---
# Optimised model

A federation's model after `siloweave optimise`. `optimisation.json` says what was done and what that costs and saves;
`manifest.json` names by its digest the model that this one was made from, and the certificate, where there is one.
"""


@dataclass(frozen=True)
class Optimised:
    """What was done, and a model's size, speed and quality before and after it.

    Attributes:
        method: by its name.
        share: of what it removes.
        read: whose records the figures are of; empty: there were none that may be read.
        records: how many these are.
        before: size, seconds and figures by name.
        after: the same.
    """

    method: str
    share: float
    read: str
    records: int
    before: dict[str, float | None]
    after: dict[str, float | None]


def check(method: str, share: float, output: Path) -> None:
    """Refuses what can't be done before anything is loaded.

    Raises:
        InputError: there is no such method, the share is none, or the output exists.
    """
    if method not in METHODS:
        raise InputError(f"--method {method!r}: there is none of that name; give one of {', '.join(METHODS)}")
    if not 0 < share < 1:
        raise InputError(f"--share {share}: give a share between 0 and 1, without these two")
    if output.exists():
        raise InputError(f"{output}: exists; give a path where nothing is yet, by --output")


def optimise(
    found: Finished, method: str, share: float, output: Path, records: Path | None
) -> tuple[Optimised, Manifest]:
    """Makes a model smaller and writes it.

    Args:
        found: the model.
        method: one of ``METHODS``.
        share: of what the method removes.
        output: where nothing is yet; in an encrypted run it is encrypted, too.
        records: a file to score both models on; None: the run's own public records, if it has any.

    Raises:
        InputError: see ``check``; the method doesn't fit the model, or the records can't be read.
        SiloweaveError: the disk is full or not writable.
    """
    check(method, share, output)
    read, units = _units(found, records)
    key = load_key(found.config.run.encryption_key_file)
    model, base, inputs = _plain(found, key)
    smaller = copy.deepcopy(model)
    METHODS[method](smaller, share)
    examples = [example for unit in units for example in found.task.scored(unit)]
    models = (model, smaller)
    seconds = seconds_a_batch(models, found.task)
    before, after = (
        {**sizes(model), "seconds_a_batch": took, **_figures(found, model, examples)}
        for model, took in zip(models, seconds, strict=True)
    )
    done = Optimised(method, share, read if examples else "", len(examples), before, after)
    texts = {"README.md": _CARD, OPTIMISATION: json.dumps(asdict(done), indent=2) + "\n"}
    return done, write_whole(smaller, base, found.made, output, key, {**inputs, **_origin(found)}, texts)


def _units(found: Finished, records: Path | None) -> tuple[str, Sequence[Sequence[Any]]]:
    config = found.config
    spec, limit, private = config.federated.task_spec, config.evaluate.max_records_per_silo, config.data.private
    if records is not None:
        if not records.is_file():
            raise InputError(f"--records {records}: no such file; give records with their right answers")
        kept = private.model_dump(include=set(RecordSettings.model_fields) - {"source"})
        return "the file", public_units(RecordSettings(source=str(records), **kept), spec, limit)
    if config.evaluate.public.source:
        return "evaluate.public", public_units(config.evaluate.public, spec, limit)
    if private.public and found.run is not None:
        return "the public silos", held_out_units(config, RunFiles(found.run).model, limit)
    return "", ()


def _figures(found: Finished, model: Any, examples: Sequence[Any]) -> dict[str, float | None]:
    if not examples:
        return {}
    figures = score(model, found.task, examples, found.config.federated.micro_batch_size).figures
    return {name: value for name, value in figures.items() if not isinstance(value, dict)}


def _plain(found: Finished, key: MasterKey | None) -> tuple[Any, Path, dict[str, str]]:
    """The model without peft, the folder of its tokenizer, and digests back to the base model, as a certificate has."""
    if found.manifest.kind == "merged":
        return found.model, found.made, found.manifest.inputs
    federation = finished_federation(found.made)
    model, inputs = plain_model(*federation, key)
    return model, federation[2], inputs


def _origin(found: Finished) -> dict[str, str]:
    """Digests of the folder that the model was made from, and of the certificate there."""
    certificate = found.made / CERTIFICATE
    certified = {"certificate": digest_file(certificate)} if certificate.is_file() else {}
    return {**certified, found.manifest.kind: found.digest}
