"""The ledger's SQLite file: its schema and version, opened by its silo, only looked at, backed up or exported."""

import contextlib
import errno
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from urllib.parse import quote

from configs.errors import InputError, SiloweaveError
from configs.storage.files import canonical_json, sync_directory, write_failure
from configs.storage.sealing import (
    ENVIRONMENT,
    FROM_ENVIRONMENT,
    MasterKey,
    is_sealed,
    load_key,
    read_sealed,
    write_sealed,
)
from privacy.ledger.chain import Entry, each_entry, read_entries

# All versions have the same tables. Version 2 has an anchor, and may hold entries that tell of it; in version 3 a run's
# name is its coordinator's own, and so two runs may have one name.
UNANCHORED, ANCHORED, OWNED = 1, 2, 3
SCHEMA_VERSION = OWNED
LOCK_TIMEOUT_S = 60
EXPORT_SUFFIX = ".jsonl"
_EXPORT = "ledger export"
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
        if not _in_time(partial(_write_ahead, connection)):
            raise sqlite3.OperationalError("database is locked")
        for setting in ("synchronous = FULL", "secure_delete = ON"):
            connection.execute(f"PRAGMA {setting}")
        connection.execute("BEGIN IMMEDIATE")
        if _check_version(path, connection) == 0:
            for statement in _statements(_SCHEMA):
                connection.execute(statement)
            set_version(connection, UNANCHORED)
        connection.execute("COMMIT")
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        raise explain(path, error) from error
    return connection


def read_only(path: Path, key_file: str = "") -> list[Entry]:
    """The entries of a ledger file, or of its export, that is only looked at; nothing about it changes.

    Args:
        path: the ledger, or an export.
        key_file: the key's file of an encrypted export; empty: the environment's key.

    Raises:
        InputError: it is missing, no ledger, damaged, or of a newer version.
    """
    entries, problem = readable(path, key_file)
    if problem is not None:
        raise problem
    return entries


def readable(path: Path, key_file: str = "") -> tuple[list[Entry], SiloweaveError | None]:
    """The entries of a ledger file, or of its export, as far as they can be read, and what is wrong with the rest.

    Args:
        path: the ledger, or an export.
        key_file: see ``read_only``.

    Returns:
        The entries before the first place that can't be read, and of an export those after it; the error that
        ``read_only`` raises, or None.
    """
    entries: list[Entry] = []
    try:
        if not path.is_file():
            where = "give the ledger.sqlite of a silo's state_dir, or an export of it"
            raise InputError(f"{path}: no such ledger; {where}")
        if path.suffix == EXPORT_SUFFIX:
            return _read_export(path, key_file)
        with _looking(path) as connection:
            for entry in each_entry(connection):
                entries.append(entry)  # noqa: PERF402  (what was read before an error is kept)
    except SiloweaveError as error:
        return entries, error
    except OSError as error:
        return entries, InputError(f"{path}: can't be read ({error.strerror}); give a file that you may read")
    return entries, None


def read_version(path: Path) -> int:
    """The version of a ledger file that is only looked at.

    Raises:
        InputError: it is missing, no ledger, damaged, or of a newer version.
    """
    with _looking(path) as connection:
        return version_of(connection)


def export(path: Path, target: Path, key_file: str = "") -> int:
    """Writes a ledger's entries as JSON lines: neither seeds nor replies. Encrypted where there is a key.

    Args:
        path: the ledger.
        target: the new file.
        key_file: the key's file; empty: the environment's key, if it has one.

    Returns:
        The number of entries.

    Raises:
        InputError: the ledger can't be read, or the target exists or is not named ``.jsonl``.
        SiloweaveError: the disk is full or not writable.
    """
    if target.suffix != EXPORT_SUFFIX:
        raise InputError(f"{target}: an export is named *{EXPORT_SUFFIX}; give such a name")
    _must_be_new(target)
    entries = read_only(path)
    content = b"".join(canonical_json(entry) + b"\n" for entry in entries)
    write_sealed(target, content, given_key(key_file), _EXPORT)
    return len(entries)


def backup(path: Path, target: Path) -> int:
    """Copies a ledger through SQLite's backup API, with what its write-ahead log holds and without its seeds.

    The seed of a charge that is not answered yet would outlive its erasure in the copy. So a copy that is put back
    can't answer that charge any more, which stays spent.

    Returns:
        The number of entries.

    Raises:
        InputError: the ledger can't be read, or the target exists.
        SiloweaveError: the disk is full or not writable.
    """
    _must_be_new(target)
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as copy:
            with _looking(path) as source:
                source.backup(copy)
            copy.execute("DELETE FROM seeds")
            os.close(os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            copy.execute("VACUUM INTO ?", (str(fresh),))
            number = len(read_entries(copy))
        _publish(fresh, target)
    except (OSError, sqlite3.DatabaseError) as error:
        raise write_failure(target, error if isinstance(error, OSError) else OSError(str(error))) from error
    finally:
        fresh.unlink(missing_ok=True)
    return number


def _publish(fresh: Path, target: Path) -> None:
    with fresh.open("rb") as file:
        os.fsync(file.fileno())
    os.link(fresh, target)  # unlike a rename it never replaces what is there
    sync_directory(target.parent)


def _must_be_new(target: Path) -> None:
    if target.exists():
        raise InputError(f"{target}: exists; give a new name, nothing is overwritten")


def given_key(key_file: str) -> MasterKey | None:
    """The key of a file, or else of the environment; None where neither is given."""
    return load_key(key_file or (FROM_ENVIRONMENT if os.environ.get(ENVIRONMENT) else ""))


def _read_export(path: Path, key_file: str) -> tuple[list[Entry], InputError | None]:
    """The entries, an empty one for each line that is none, and the first such line's error."""
    entries: list[Entry] = []
    problem: InputError | None = None
    sealed = is_sealed(path)
    if sealed and not key_file and not os.environ.get(ENVIRONMENT):
        raise InputError(f"{path}: encrypted, and no key is given; give --key-file FILE, or set {ENVIRONMENT}")
    content = read_sealed(path, given_key(key_file), _EXPORT) if sealed else path.read_bytes()
    for number, line in enumerate(content.splitlines(), 1):
        try:
            entry = json.loads(line)
            wrong = None if isinstance(entry, dict) else "no entry"
        except (ValueError, RecursionError):
            entry, wrong = {}, "not JSON"
        if wrong and problem is None:
            problem = InputError(f"{path}: line {number} is {wrong}: the export was edited or damaged")
        entries.append({} if wrong else entry)
    return entries, problem


@contextlib.contextmanager
def _looking(path: Path) -> Iterator[sqlite3.Connection]:
    """A ledger opened for reading alone."""
    if not path.is_file():
        raise InputError(f"{path}: no such ledger; give the ledger.sqlite of a silo's state_dir")
    # Without a write-ahead log the file is complete, and can be read where nothing may be written.
    options = "mode=ro" if path.with_name(path.name + "-wal").exists() else "mode=ro&immutable=1"
    try:
        connection = sqlite3.connect(f"file:{quote(str(path.absolute()))}?{options}", uri=True, timeout=LOCK_TIMEOUT_S)
        with contextlib.closing(connection):
            if _check_version(path, connection) == 0:
                raise InputError(f"{path}: not a ledger; give the ledger.sqlite of a silo's state_dir")
            yield connection
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _write_ahead(connection: sqlite3.Connection) -> bool:
    try:
        connection.execute("PRAGMA journal_mode = WAL")
    except sqlite3.OperationalError as error:
        if "locked" not in str(error):
            raise
        return False
    return True


def empty_write_ahead_log(connection: sqlite3.Connection) -> bool:
    """Moves the write-ahead log into the file and empties it. Returns whether others let it."""

    def emptied() -> bool:
        busy, *_ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        return not busy

    return _in_time(emptied)


def _in_time(attempt: Callable[[], bool]) -> bool:
    """Repeats a step at which SQLite gives up at once, rather than wait, where another process is at the same one."""
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while not (done := attempt()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return done


def version_of(connection: sqlite3.Connection) -> int:
    """The file's version; 0 for a file that is still empty."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def set_version(connection: sqlite3.Connection, version: int) -> None:
    """Marks the file; a Siloweave that is too old for the version refuses it."""
    connection.execute(f"PRAGMA user_version = {version}")


def _check_version(path: Path, connection: sqlite3.Connection) -> int:
    found = version_of(connection)
    if found > SCHEMA_VERSION:
        raise InputError(f"{path}: ledger version {found} is newer than this Siloweave reads; upgrade Siloweave")
    return found


def explain(path: Path, error: Exception) -> SiloweaveError:
    """The one line for what SQLite says; Python can't decode the words of a damaged schema."""
    text = str(error)
    if _is_locked(error):
        return SiloweaveError(f"{path}: locked by another program for {LOCK_TIMEOUT_S} s; end it, then ask again")
    if isinstance(error, sqlite3.OperationalError):
        full = getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL
        return write_failure(path, OSError(errno.ENOSPC, text) if full else OSError(text))
    return InputError(f"{path}: not a sound ledger ({text}); put its backup back")


def _unreadable(path: Path, error: Exception) -> SiloweaveError:
    """The one line for what SQLite says where nothing was to be written."""
    if isinstance(error, sqlite3.OperationalError) and not _is_locked(error):
        return InputError(f"{path}: can't be read ({error}); look as a user who may, or put its backup back")
    return explain(path, error)


def _is_locked(error: Exception) -> bool:
    return "locked" in str(error) or "busy" in str(error)


def _statements(script: str) -> Iterator[str]:
    """The script's statements one by one: ``executescript`` would commit the open transaction first."""
    statement = ""
    for piece in script.split(";"):
        statement += piece + ";"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
