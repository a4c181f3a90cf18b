"""A silo's records as privacy units. Every step here looks at one unit at a time, never across units."""

import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.identities import IdentityColumn, UnclearIdentityError, alike, canonical
from configs.schema.silo import SiloConfig, SiloDataSettings
from configs.schema.tasks import CAUSAL, TaskSpec
from configs.storage.files import digest_json
from configs.storage.layout import SiloFiles
from configs.storage.secrets import load_or_create_secret, load_secret
from privacy.ledger.client_runs import UNNOISED
from trainer.data.deidentify import Deidentifier, open_deidentifier
from trainer.data.reading.counts import ReadCounts
from trainer.data.reading.files import SourceFiles
from trainer.data.sources import all_columns
from trainer.tasks.fields import FieldReader, with_texts
from trainer.tasks.task import Row, kind_of

Rows = tuple[Row, ...]


@dataclass(frozen=True)
class Units:
    """A silo's units, each as its rows, split for good by a keyed hash. Both lists are private.

    Attributes:
        train: units that may be trained on.
        held_out: units that never are.
        counts: what was seen while reading; exact, so for the steward's eyes.
        beyond_cap: rows left out since their unit had ``max_rows_per_unit`` without them. For the steward's eyes, too.
        torn: rows left out since de-identification replaced what makes them whole: an answer in its context, for
            instance. For the steward's eyes, too.
        deidentified: spans replaced, by kind; None where de-identification is off. For the steward's eyes, too.
        notes: lines for the steward: which files were read, and how many ids were written in several ways or look
            alike. No values of records, but names of files.
    """

    train: tuple[Rows, ...]
    held_out: tuple[Rows, ...]
    counts: ReadCounts
    beyond_cap: int = 0
    torn: int = 0
    deidentified: dict[str, int] | None = None
    notes: tuple[str, ...] = ()

    @property
    def members_digest(self) -> str:
        """Of all that may be trained on, in order. Private: whoever can guess the records can confirm them by it."""
        return digest_json([unit_digest(unit) for unit in self.train])


@dataclass(frozen=True)
class SourceRows:
    """All rows of a source whose silo and unit are known.

    Attributes:
        by_silo: (unit, fields) of each row.
        counts: what was seen while reading, by silo; under no name, of the rows that name none.
        respelled: how many units of a silo were written in several ways.
        files: those of the source, where it is a path.
    """

    by_silo: dict[str, tuple[tuple[str, Row], ...]]
    counts: dict[str, ReadCounts]
    respelled: dict[str, int]
    files: SourceFiles | None


def load_units(config: SiloConfig, split_key: bytes) -> Units:
    """Reads a silo's records and groups them into units.

    Raises:
        InputError: the source can't be read, this silo has no record in it, or de-identification can't start.
    """
    source, own = rows_of(config.data, config.policy.task_spec), _own_name(config)
    rows = source.by_silo.get(own, ())
    if not rows:
        raise InputError(
            f"silo {config.silo.id!r}: no record in {config.data.source}, whose rows name {len(source.by_silo)} "
            "other silos; check the silo's name and the data source; rows without silo or unit are left out"
        )
    deidentifier = open_deidentifier(config.data.deidentify)
    train: list[Rows] = []
    held_out: list[Rows] = []
    beyond_cap = torn = 0
    for unit, found in _group(rows, has_units=bool(config.data.unit)):
        kept = _cap(found, split_key, config.data.max_rows_per_unit)
        beyond_cap += len(found) - len(kept)
        # After split and cap, which go by the rows as they came: turning it on moves no unit to the other part.
        unit_rows = _treated(kept, deidentifier, config.policy.task_spec)
        torn += len(kept) - len(unit_rows)
        if not unit_rows:
            continue
        is_held_out = _keyed_hash(split_key, unit) < config.data.held_out_fraction * 2**64
        (held_out if is_held_out else train).append(unit_rows)
    deidentified = dict(deidentifier.counts) if deidentifier else None
    notes = _notes(config.data, source, own)
    return Units(tuple(train), tuple(held_out), _counts(source, own), beyond_cap, torn, deidentified, notes)


def _counts(source: SourceRows, own: str) -> ReadCounts:
    """Of a silo's own rows, and of those that name no silo: they may be anyone's."""
    counts = ReadCounts()
    for silo in {own, ""}:
        counts.add(source.counts.get(silo, ReadCounts()))
    return counts


def _own_name(config: SiloConfig) -> str:
    """By which the source's silo column names this silo; empty without such a column.

    Raises:
        InputError: the silo's id is another spelling: whoever has that one has these rows, and their budget, too.
    """
    if not config.data.silo:
        return ""
    try:
        name = canonical(config.silo.id)
    except UnclearIdentityError:
        name = None
    if name != config.silo.id:
        reason = f"these rows and their ledger are those of silo {name!r}" if name else "that is no name"
        raise InputError(
            f"silo.id is {config.silo.id!r}: {reason}, since blanks and other spellings make no other silo"
        )
    return name


def _notes(data: SiloDataSettings, source: SourceRows, own: str) -> tuple[str, ...]:
    notes = [note] if source.files and (note := source.files.note()) else []
    if respelled := source.respelled.get(own, 0):
        notes.append(f"column {data.unit!r}: {respelled} ids are written in several ways, and each is one unit")
    named = {data.silo: list(source.by_silo), data.unit: [unit for unit, _ in source.by_silo[own]]}
    for column, forms in named.items():
        pairs = sum(len(group) * (len(group) - 1) // 2 for group in alike(forms)) if column else 0
        if pairs:
            notes.append(
                f"column {column!r}: {pairs} pairs of ids look alike (case, leading zeros or blanks inside) and stay "
                "apart; where two are one, write them alike in the source"
            )
    return tuple(notes)


def units_of(config: SiloConfig) -> Units:
    """The units of a silo that has been opened before: the split is that of its key.

    Raises:
        InputError: as ``load_units``, or the key is missing.
    """
    return load_units(config, load_secret(SiloFiles(Path(config.silo.state_dir)).split_key))


def split_key(files: SiloFiles, bodies: list[dict[str, Any]]) -> bytes:
    """The key of the split, drawn before any charge and never again: a new one would train on what was held out.

    Args:
        files: the silo's.
        bodies: what its ledger's entries say. One that was lost and reconciled has no charge, and its dataset may have
            been trained on all the same.

    Raises:
        InputError: the key is lost, or others may read it.
    """
    trained = any(body["kind"] in ("charge", UNNOISED, "reconcile") for body in bodies)
    return load_secret(files.split_key) if trained else load_or_create_secret(files.split_key)


@lru_cache(maxsize=1)
def rows_of(data: SiloDataSettings, spec: TaskSpec = CAUSAL) -> SourceRows:
    """All rows of a source by silo; a process that hosts many silos of one source reads it once.

    Raises:
        InputError: the source can't be read, a value is none that the task can take, or an id in it can't be told from
            others.
    """
    source, counts = ReadCounts(), defaultdict[str, ReadCounts](ReadCounts)
    rows: dict[str, list[tuple[str, Row]]] = defaultdict(list)
    spellings: dict[tuple[str, str], set[str]] = defaultdict(set)
    columns = {name: IdentityColumn(name) for name in (data.silo, data.unit) if name}
    fields = FieldReader(data, spec)
    for row, found in all_columns(data, [*fields.columns, *columns], source):
        record = fields.read(row, source.where, found)
        found.empty = int(record is None)
        ids = {name: column.canonical(row[name], source.where) for name, column in columns.items()}
        silo, unit = ids.get(data.silo) or "", ids.get(data.unit) or ""
        # Without an id, whose a row is can't be told, and so it can't be protected as theirs.
        found.without_unit = int(not found.empty and None in ids.values())
        counts[silo].add(found)
        if record is None or found.without_unit:
            continue
        rows[silo].append((unit, record))
        if data.unit:
            spellings[silo, unit].add(str(row[data.unit]))
    respelled = Counter(silo for (silo, _), found in spellings.items() if len(found) > 1)
    return SourceRows({silo: tuple(values) for silo, values in rows.items()}, dict(counts), respelled, source.files)


def _group(rows: tuple[tuple[str, Row], ...], *, has_units: bool) -> list[tuple[str, list[Row]]]:
    """(unit id, its rows). Without a unit column a record is its own unit and what it says is its id."""
    if not has_units:
        return [(_words(row), [row]) for _, row in rows]
    units: dict[str, list[Row]] = defaultdict(list)
    for unit, row in rows:
        units[unit].append(row)
    return list(units.items())


def _words(row: Row) -> str:
    """What a row says: the same for every task that reads its text, so that all tasks hold the same out."""
    return row["text"] if "text" in row else json.dumps(row, sort_keys=True)


def unit_digest(unit: Rows) -> str:
    """Of what a unit's rows say. Private."""
    return digest_json([_words(row) for row in unit])


def _cap(rows: list[Row], key: bytes, largest: int) -> list[Row]:
    if len(rows) <= largest:
        return rows
    return sorted(rows, key=lambda row: _keyed_hash(key, _words(row)))[:largest]


def _treated(rows: list[Row], treat: Deidentifier | None, spec: TaskSpec) -> Rows:
    """The rows without identifiers, but for those that no longer fit together."""
    if treat is None:
        return tuple(rows)
    return tuple(row for row in (with_texts(row, treat) for row in rows) if not kind_of(spec.name).misfit(row))


def _keyed_hash(key: bytes, value: str) -> int:
    """A 64-bit hash that nobody without the silo's key can predict."""
    return int.from_bytes(hashlib.blake2b(value.encode(errors="replace"), key=key, digest_size=8).digest(), "big")
