"""A silo's records as privacy units. Every step here looks at one unit at a time, never across units."""

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.schema.data import SourceSettings
from configs.schema.silo import SiloConfig, SiloDataSettings
from configs.storage.layout import SiloFiles
from configs.storage.secrets import load_or_create_secret, load_secret
from privacy.ledger.client_runs import UNNOISED
from trainer.data.deidentify import open_deidentifier
from trainer.data.sources import ReadCounts, read_rows


@dataclass(frozen=True)
class Units:
    """A silo's units as texts, split for good by a keyed hash. Both lists are private.

    Attributes:
        train: units that may be trained on.
        held_out: units that never are.
        counts: what was replaced or empty while reading; exact, so for the steward's eyes.
        deidentified: spans replaced, by kind; None where de-identification is off. For the steward's eyes, too.
    """

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    counts: ReadCounts
    deidentified: dict[str, int] | None = None


def load_units(config: SiloConfig, split_key: bytes) -> Units:
    """Reads a silo's records and groups them into units.

    Raises:
        InputError: the source can't be read, this silo has no record in it, or de-identification can't start.
    """
    rows_by_silo, counts = rows_of(config.data)
    rows = rows_by_silo.get(config.silo.id if config.data.silo else "", ())
    if not rows:
        raise InputError(
            f"silo {config.silo.id!r}: no record in {config.data.source} (column {config.data.silo!r} has "
            f"{', '.join(sorted(rows_by_silo)) or 'no value'}); check the silo's name and data source"
        )
    deidentifier = open_deidentifier(config.data.deidentify)
    deidentify = deidentifier or str
    train: list[str] = []
    held_out: list[str] = []
    for unit, texts in _group(rows, has_units=bool(config.data.unit)):
        # After split and cap, which go by the rows as they came: turning it on moves no unit to the other part.
        text = "\n\n".join(map(deidentify, _cap(texts, split_key, config.data.max_rows_per_unit)))
        is_held_out = _keyed_hash(split_key, unit) < config.data.held_out_fraction * 2**64
        (held_out if is_held_out else train).append(text)
    return Units(tuple(train), tuple(held_out), counts, dict(deidentifier.counts) if deidentifier else None)


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
def rows_of(data: SiloDataSettings) -> tuple[dict[str, tuple[tuple[str, str], ...]], ReadCounts]:
    """All (unit, text) rows of a source by silo; a process that hosts many silos of one source reads it once."""
    counts, rows = ReadCounts(), defaultdict(list)
    columns = [column for column in (data.silo, data.unit) if column]
    source = SourceSettings(source=data.source, text=data.text, split=data.split)
    for row in read_rows(source, columns, counts):
        if any(row[column] in (None, "") for column in columns):
            counts.without_unit += 1  # whose it is can't be told, and so it can't be protected as theirs
            continue
        unit = str(row[data.unit]) if data.unit else ""
        rows[str(row[data.silo]) if data.silo else ""].append((unit, row[data.text]))
    return {silo: tuple(values) for silo, values in rows.items()}, counts


def _group(rows: tuple[tuple[str, str], ...], *, has_units: bool) -> list[tuple[str, list[str]]]:
    """(unit id, its rows). Without a unit column a record is its own unit and its text is its id."""
    if not has_units:
        return [(text, [text]) for _, text in rows]
    units: dict[str, list[str]] = defaultdict(list)
    for unit, text in rows:
        units[unit].append(text)
    return list(units.items())


def _cap(texts: list[str], key: bytes, largest: int) -> list[str]:
    if len(texts) <= largest:
        return texts
    return sorted(texts, key=lambda text: _keyed_hash(key, text))[:largest]


def _keyed_hash(key: bytes, value: str) -> int:
    """A 64-bit hash that nobody without the silo's key can predict."""
    return int.from_bytes(hashlib.blake2b(value.encode(errors="replace"), key=key, digest_size=8).digest(), "big")
