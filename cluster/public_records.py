"""Records that a finished model may be asked about in the clear: public ones, and never those that a silo holds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.finished import Finished
from configs.errors import InputError, PolicyRefusal
from configs.schema.data import PrivateSettings, RecordSettings, SourceSettings, overlaps
from configs.storage.layout import RunFiles
from federated.simulation.in_the_clear import held_out_units, public_units


def public_records(found: Finished, records: Path | None, limit: int) -> tuple[str, Sequence[Sequence[Any]]]:
    """Units of records with their right answers, and whose they are.

    Args:
        found: the model that they are for.
        records: a file of them; None: the run's own, ``evaluate.public``, or where a simulation's silos are declared
            public what these hold out.
        limit: so many of a source, or of each silo.

    Returns:
        Whose they are, empty where the run has none, and the units.

    Raises:
        InputError: the file can't be read.
        PolicyRefusal: they are where the silos' records are, and these aren't declared public.
    """
    config = found.config
    spec, private = config.federated.task_spec, config.data.private
    if records is not None:
        if not records.is_file():
            raise InputError(f"--records {records}: no such file; give records with their right answers")
        kept = private.model_dump(include=set(RecordSettings.model_fields) - {"source"})
        source = RecordSettings(source=str(records), **kept)
        _refuse_private(source, private, "--records")
        return "the file", public_units(source, spec, limit)
    if config.evaluate.public.source:
        _refuse_private(config.evaluate.public, private, "evaluate.public.source")
        return "evaluate.public", public_units(config.evaluate.public, spec, limit)
    if private.public and found.run is not None:
        return "the public silos", held_out_units(config, RunFiles(found.run).model, limit)
    return "", ()


def _refuse_private(source: SourceSettings, private: PrivateSettings, named: str) -> None:
    if not private.public and overlaps(source, private):
        raise PolicyRefusal.of(
            "public",
            "records",
            "data declared public",
            f"{named} is {source.source!r}, where the silos' records are, and what is read of them in the clear has no "
            "noise; give public records",
        )
