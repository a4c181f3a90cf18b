"""The ledger's SQLite file: its schema and version, opened by its silo or only looked at."""

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from configs.artifacts import write_failure
from configs.errors import InputError, SiloweaveError
from privacy.chain import read_entries

LEDGER_FILE = "ledger.sqlite"
SCHEMA_VERSION = 1
LOCK_TIMEOUT_S = 60
_SCHEMA = """
CREATE TABLE entries (number INTEGER PRIMARY KEY, body TEXT NOT NULL, previous TEXT NOT NULL, hash TEXT NOT NULL,
                      signature TEXT NOT NULL);
CREATE TABLE seeds (charge INTEGER PRIMARY KEY REFERENCES entries(number), seed BLOB NOT NULL);
CREATE TABLE replies (charge INTEGER PRIMARY KEY REFERENCES entries(number), reply BLOB NOT NULL);
CREATE TRIGGER entries_keep BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'entries are append-only'); END;
CREATE TRIGGER entries_stay BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'entries are append-only'); END;
"""


def connect(path: Path) -> sqlite3.Connection:
    """Opens a ledger for its silo, or starts it, with full sync and secure deletion of what is erased.

    Raises:
        InputError: it is damaged, or of a newer version.
    """
    if not path.exists():
        # The owner's alone before the first byte is in it; SQLite gives its -wal and -shm the same mode.
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    try:
        connection = sqlite3.connect(path, timeout=LOCK_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        for setting in ("journal_mode = WAL", "synchronous = FULL", "secure_delete = ON"):
            connection.execute(f"PRAGMA {setting}")
        connection.execute("BEGIN IMMEDIATE")
        if _check_version(path, connection) == 0:
            for statement in _statements(_SCHEMA):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        connection.execute("COMMIT")
    except sqlite3.DatabaseError as error:
        raise explain(path, error) from error
    return connection


def read_only(path: Path) -> list[dict[str, Any]]:
    """The entries of a ledger file that is only looked at; nothing about it changes.

    Raises:
        InputError: it is missing, no ledger, damaged, or of a newer version.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such ledger; give the ledger.sqlite of a silo's state_dir")
    # Without a write-ahead log the file is complete, and can be read where nothing may be written.
    options = "mode=ro" if path.with_name(path.name + "-wal").exists() else "mode=ro&immutable=1"
    try:
        connection = sqlite3.connect(f"file:{quote(str(path.absolute()))}?{options}", uri=True, timeout=LOCK_TIMEOUT_S)
        with contextlib.closing(connection):
            if _check_version(path, connection) == 0:
                raise InputError(f"{path}: not a ledger; give the ledger.sqlite of a silo's state_dir")
            return read_entries(connection)
    except sqlite3.DatabaseError as error:
        raise explain(path, error) from error


def _check_version(path: Path, connection: sqlite3.Connection) -> int:
    found = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if found > SCHEMA_VERSION:
        raise InputError(f"{path}: ledger version {found} is newer than this Siloweave reads; upgrade Siloweave")
    return found


def explain(path: Path, error: sqlite3.DatabaseError) -> SiloweaveError:
    """The one line for what SQLite says."""
    text = str(error)
    if "locked" in text or "busy" in text:
        return SiloweaveError(f"{path}: locked by another program for {LOCK_TIMEOUT_S} s; end it, then ask again")
    if isinstance(error, sqlite3.OperationalError):
        return write_failure(path, OSError(text))
    return InputError(f"{path}: not a sound ledger ({text}); put its backup back")


def _statements(script: str) -> Iterator[str]:
    """The script's statements one by one: ``executescript`` would commit the open transaction first."""
    statement = ""
    for piece in script.split(";"):
        statement += piece + ";"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
