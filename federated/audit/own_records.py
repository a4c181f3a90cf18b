"""What a silo's steward attacks: a run's updates as they left, its model, and the records of both sides."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import InputError
from configs.parse import json_object, parse
from configs.schema.silo import SiloConfig
from configs.storage.layout import CERTIFICATE, SiloFiles
from configs.storage.secrets import load_secret
from federated.audit.membership import spread
from federated.silo.released.released import Released, ReleasedRound, left_rounds
from federated.silo.units import Rows, Units, load_units, unit_digest, units_of
from privacy.certificate.check import check_certificate
from privacy.certificate.model_digests import ADAPTER, ModelDigests, which_model
from privacy.ledger.runs import Body, Run, Runs

SMALLEST = 20  # records of each side
_NAMED = 10  # runs in a message


@dataclass(frozen=True)
class Wanted:
    """What the steward asks for.

    Attributes:
        run: its name; empty: the newest in which something has left.
        model: what the run has published, an adapter's folder or a whole model's; None: its updates alone are attacked.
        held_out: a file of records that were never trained on, in place of the silo's held-out ones.
        records: most of each side.
    """

    run: str = ""
    model: Path | None = None
    held_out: Path | None = None
    records: int = 500


@dataclass(frozen=True)
class Subject:
    """What is attacked. The records are private.

    Attributes:
        run: one of the ledger's.
        rounds: its updates, as far as the silo has kept them.
        rounds_left: how many have left.
        units: the silo's.
        members: of them, what may have been trained on, each unit as its rows.
        others: what never was.
    """

    run: Run
    rounds: list[ReleasedRound]
    rounds_left: int
    units: Units
    members: list[Rows]
    others: list[Rows]


def subject(config: SiloConfig, bodies: Sequence[Body], wanted: Wanted) -> Subject:
    """Finds what a steward wants to attack, and makes sure that it belongs together.

    Args:
        config: the silo.
        bodies: what its ledger's entries say.
        wanted: what is asked for.

    Raises:
        InputError: nothing has left, or nothing of it is here; the model is another run's; the records were replaced
            since; or there are too few on a side.
    """
    run = _run(config, bodies, wanted.run)
    rounds = Released(Path(config.silo.state_dir)).rounds(run, bodies)
    if not rounds and wanted.model is None:
        raise InputError(
            f"run {run.name!r}: nothing of what left is kept here, and no model is given; give --model, and write "
            "keep_released = true under [silo] before the next run"
        )
    if wanted.model is not None:
        _check_model(config, run, bodies, wanted.model)
    units = units_of(config)
    others = _from_file(config, units, wanted.held_out) if wanted.held_out else units.held_out
    _check_numbers(config, units, others, wanted.held_out)
    _check_members(config, run, rounds, units)
    sides = (spread(side, min(wanted.records, len(side))) for side in (units.train, others))
    return Subject(run, rounds, len(left_rounds(run, bodies)), units, *sides)


def _run(config: SiloConfig, bodies: Sequence[Body], name: str) -> Run:
    left = [run for run in Runs(bodies) if left_rounds(run, bodies)]
    found = [run for run in left if run.name == name] if name else left
    if found:
        return found[-1]
    if not left:
        raise InputError(f"silo {config.silo.id!r}: no update has left in any run, so there is nothing to attack")
    names = ", ".join(dict.fromkeys(repr(run.name) for run in reversed(left[-_NAMED:])))
    raise InputError(f"--run {name!r}: no update has left in a run of this name; updates have left in {names}")


def _check_model(config: SiloConfig, run: Run, bodies: Sequence[Body], folder: Path) -> None:
    """Refuses a model of another run: what it says of these records would mean nothing."""
    path = folder.absolute().parent / CERTIFICATE
    if not path.is_file():
        raise InputError(
            f"{folder}: no {CERTIFICATE} beside it, which says of which run it is; put both into one folder, as the "
            "coordinator has published them"
        )
    document = json_object(path.read_bytes(), str(path))
    if document.get("run_id") != run.name:
        shown = str(document.get("run_id"))[:100]
        raise InputError(
            f"{path}: is of run {shown!r}, and what is attacked is run {run.name!r}; give --run or its model"
        )
    check_certificate(document, str(path))
    model = parse(ModelDigests, document.get("model") or {}, f"{path}: model")
    for number, digest in model.rounds_of(config.silo.id).items():
        if left_rounds(run, bodies).get(number) != digest:
            raise InputError(
                f"{path}: the update of round {number} is none that this silo's ledger knows; do not trust it"
            )
    if which_model(model, folder, None) != ADAPTER:
        raise InputError(f"{folder}: is the base model, which no private record has touched; give what the run made")


def _check_members(config: SiloConfig, run: Run, rounds: Sequence[ReleasedRound], units: Units) -> None:
    now = units.members_digest
    for one in rounds:
        if one.members_digest != now:
            raise InputError(
                f"data.source {config.data.source!r}: round {one.number} of run {run.name!r} trained on other records "
                "than are there now; put those back, with the settings under [data] that they were read by"
            )


def _from_file(config: SiloConfig, units: Units, file: Path) -> list[Rows]:
    """All units of a file in the data's own format, but for those that say what a member says."""
    data = config.data.model_copy(update={"source": str(file.absolute())})
    key = load_secret(SiloFiles(Path(config.silo.state_dir)).split_key)
    found = load_units(config.model_copy(update={"data": data}), key)
    members = {unit_digest(unit) for unit in units.train}
    return [unit for unit in (*found.train, *found.held_out) if unit_digest(unit) not in members]


def _check_numbers(config: SiloConfig, units: Units, others: Sequence[Rows], file: Path | None) -> None:
    silo = f"silo {config.silo.id!r}"
    if len(units.train) < SMALLEST:
        raise InputError(
            f"{silo}: {len(units.train)} training records; an attack shows nothing with fewer than {SMALLEST}"
        )
    if len(others) < SMALLEST:
        held = f"data.held_out_fraction is {config.data.held_out_fraction:g}"
        where = f"{file} has" if file else f"{held}, which leaves"
        raise InputError(
            f"{silo}: {where} {len(others)} records that were not trained on; give {SMALLEST} or more of the same kind "
            "with --held-out FILE"
        )
