"""Which files of a source are read, each once, and how they are opened. ``docs/data.md`` has the rule for people."""

import bz2
import gzip
import hashlib
import io
import lzma
import os
import stat
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.printing import printable
from configs.storage.files import unreadable

TEXTS = (".txt", ".md")  # a file is a record
KINDS = (".jsonl", ".json", ".csv", ".parquet", *TEXTS)
_TABLES_WITH_HISTORY = {"_delta_log": "Delta", ".hoodie": "Hudi"}
_COPY = "with the same rows as another"
_NAMES_SHOWN = 3


def _open_zstandard(path: Path) -> Any:
    import pyarrow as pa

    return pa.input_stream(str(path), compression="zstd")


_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstandard,
}


def is_compressed(path: Path) -> bool:
    """Whether a file is read through a decompressor, by its suffix."""
    return path.suffix.lower() in _OPENERS


def kind_of(path: Path) -> str | None:
    """The suffix that says how a file is read, in lower case and without that of a compression; None where none does.

    Parquet compresses by itself and is read from its end, so it is not looked for inside another compression.
    """
    kind = _uncompressed(path).suffix.lower()
    return kind if kind in KINDS and not (kind == ".parquet" and is_compressed(path)) else None


def _uncompressed(path: Path) -> Path:
    return path.with_suffix("") if is_compressed(path) else path


def _decompressed(path: Path) -> io.BufferedReader:
    return io.BufferedReader(_OPENERS[path.suffix.lower()](path))


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """A file's content, decompressed as it is read.

    Raises:
        InputError: it is missing, may not be read, or is no whole file of its compression.
    """
    try:
        with path.open("rb") if not is_compressed(path) else _decompressed(path) as file:
            yield file
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except PermissionError:
        raise InputError(unreadable(path)) from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise InputError(f"{path}: can't be read ({error.strerror})") from None
        # The decompressors' own words may quote the content.
        raise InputError(f"{path}: damaged, cut short, or no {path.suffix} file; write it again") from None


@dataclass(frozen=True)
class SourceFile:
    """A file that is read.

    Attributes:
        path: where it is.
        name: the same, as seen from the source.
        kind: how it is read, as ``kind_of`` says.
        size_bytes: its size on disk when it was found.
        mtime_ns: when it had last been written then.
    """

    path: Path
    name: str
    kind: str
    size_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path, name: str, kind: str, found: os.stat_result) -> "SourceFile":
        """A file with what ``stat`` says of it."""
        return cls(path, name, kind, found.st_size, found.st_mtime_ns)

    @cached_property
    def sha256(self) -> str:
        """Digest of its content, without compression: a compressed copy has that of its original."""
        with opened(self.path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def check_unchanged(self) -> None:
        """Raises an InputError where the file is another one than was found, so that parts of two are never mixed."""
        try:
            now = self.path.stat()
        except OSError:
            now = None
        if now is None or (now.st_size, now.st_mtime_ns) != (self.size_bytes, self.mtime_ns):
            raise InputError(f"{self.path}: changed while it was read; run the same command when nobody writes to it")


@dataclass
class SourceFiles:
    """The files of a source, and what of its folder is left out.

    Attributes:
        source: a file or folder.
        files: in the order of their names. Copies among them are found while they are read.
        left_out: names of what is not read, by reason.
        equal_texts: how many text files have the content of an earlier one; each is a record all the same.
    """

    source: Path
    files: list[SourceFile]
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    equal_texts: int = 0

    def __iter__(self) -> Iterator[SourceFile]:
        """Every file once: one with the rows of an earlier one is passed over.

        Digests are computed only where a copy is possible, and only of files that are reached. A text file is a record,
        and equal records of two people are two.
        """
        self.left_out.pop(_COPY, None)
        self.equal_texts = 0
        sizes, first = Counter(file.size_bytes for file in self.files), dict[str, str]()
        compressed = any(is_compressed(file.path) for file in self.files)
        for file in self.files:
            alone = len(self.files) == 1 or (sizes[file.size_bytes] == 1 and not compressed)
            name = file.name if alone else first.setdefault(file.sha256, file.name)
            if name != file.name and file.kind not in TEXTS:
                self.left_out[_COPY].append(f"{file.name} as {name}")
                continue
            self.equal_texts += name != file.name
            yield file
            file.check_unchanged()

    def note(self) -> str | None:
        """The line that says what of a folder was read, once it was; None for a file, which is read as it was named."""
        if not self.source.is_dir():
            return None
        read = len(self.files) - len(self.left_out.get(_COPY, ()))
        equal = f"; {self.equal_texts} text files are equal to another and count as records" if self.equal_texts else ""
        return f"{printable(str(self.source))}: files read: {read}; left out: {self.shown_left_out()}{equal}"

    def shown_left_out(self) -> str:
        """What is left out and why, with the first names."""
        found = sorted((reason, names) for reason, names in self.left_out.items() if names)
        return ", ".join(f"{len(names)} {reason} ({shown(names)})" for reason, names in found) or "none"


def shown(names: list[str]) -> str:
    """The first of some names, for one line."""
    more = len(names) - _NAMES_SHOWN
    return printable(", ".join(sorted(names)[:_NAMES_SHOWN])) + (f" and {more} more" if more > 0 else "")


def source_files(source: Path) -> SourceFiles:
    """The files of a path: the one that it names, whatever its name, or those of the folder.

    Raises:
        InputError: nothing is there that can be read, a folder below may not be entered, or one file may be another in
            another form.
    """
    try:
        found = source.stat()
    except PermissionError as error:
        raise InputError(unreadable(Path(error.filename or source))) from None
    except (OSError, ValueError):  # ValueError: a null character, which no name has
        if kind_of(source) is None:
            raise _unknown(source) from None
        raise InputError(f"{source}: no such file") from None
    if stat.S_ISDIR(found.st_mode):
        return _of_folder(source)
    kind = kind_of(source)
    if kind is None:
        raise _unknown(source)
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{source}: a pipe, socket or device; give a file")
    return SourceFiles(source, [SourceFile.of(source, source.name, kind, found)])


def _unknown(source: Path) -> InputError:
    return InputError(
        f"{source}: unknown kind of file; give {', '.join(KINDS)} (all but .parquet also with {', '.join(_OPENERS)}), "
        "a folder, embedded:NAME or hf:NAME"
    )


@dataclass(frozen=True)
class _Entry:
    path: Path
    found: os.stat_result | None
    linked: bool

    @property
    def identity(self) -> tuple[int, int] | Path:
        if self.found is None or not self.found.st_ino:  # some network file systems number nothing
            return self.path.resolve()
        return self.found.st_dev, self.found.st_ino


def _of_folder(source: Path) -> SourceFiles:
    """A text file with two names of its own is two records: programs that save space make hard links of equal ones."""
    listed = SourceFiles(source, [])
    seen: set[tuple[int, int] | Path] = set()
    for entry in sorted(_entries(source, listed.left_out), key=lambda entry: (entry.linked, entry.path)):
        name, kind = entry.path.relative_to(source).as_posix(), kind_of(entry.path)
        if kind is None:
            listed.left_out["of another kind"].append(name)
        elif entry.found is None:
            raise InputError(f"{entry.path}: a link that leads nowhere; bring back its file or remove the link")
        elif not stat.S_ISREG(entry.found.st_mode):
            listed.left_out["no regular file"].append(name)
        elif entry.identity in seen and (entry.linked or kind not in TEXTS):
            listed.left_out["reached before by another name"].append(name)
        else:
            seen.add(entry.identity)
            listed.files.append(SourceFile.of(entry.path, name, kind, entry.found))
    _leave_out_texts_beside_rows(listed)
    listed.files.sort(key=lambda file: file.path)
    _check_forms(listed.files)
    if not listed.files:
        raise InputError(f"{source}: no {', '.join(KINDS)} file below this folder; left out: {listed.shown_left_out()}")
    return listed


def _entries(source: Path, left_out: dict[str, list[str]]) -> Iterator[_Entry]:
    """All files below a folder that are not hidden; each folder is entered once, and by its own name if it has one."""
    folders, seen = deque([_Entry(source, _stat(source), linked=False)]), set[tuple[int, int] | Path]()
    while folders:
        folder = folders.popleft()
        if folder.identity in seen:
            left_out["reached before by another name"].append(f"{folder.path.relative_to(source).as_posix()}/")
            continue
        seen.add(folder.identity)
        for item in _children(folder.path):
            path = folder.path / item.name
            if item.name.startswith((".", "_")):
                slash = "/" * item.is_dir(follow_symlinks=False)
                left_out["hidden"].append(path.relative_to(source).as_posix() + slash)
                continue
            entry = _Entry(path, _stat(path), folder.linked or item.is_symlink())
            if entry.found is None or not stat.S_ISDIR(entry.found.st_mode):
                yield entry
            elif entry.linked:
                folders.append(entry)
            else:
                folders.appendleft(entry)


def _children(folder: Path) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as items:
            children = sorted(items, key=lambda item: item.name)
    except PermissionError:
        raise InputError(unreadable(folder)) from None
    except OSError as error:
        raise InputError(f"{folder}: can't be read ({error.strerror})") from None
    for item in children:
        if item.name in _TABLES_WITH_HISTORY:
            raise InputError(
                f"{folder}: a {_TABLES_WITH_HISTORY[item.name]} table keeps older versions of its rows; write the "
                "current one to plain Parquet files, and give their folder"
            )
    return children


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except PermissionError as error:
        raise InputError(unreadable(Path(error.filename or path))) from None
    except OSError:
        return None


def _leave_out_texts_beside_rows(listed: SourceFiles) -> None:
    """Beside rows, a text is about them, as README.md is."""
    rows = [file for file in listed.files if file.kind not in TEXTS]
    if rows:
        listed.left_out["text beside rows"] += [file.name for file in listed.files if file.kind in TEXTS]
        listed.files = rows


def _check_forms(files: list[SourceFile]) -> None:
    """The same records in two formats, or compressed as well, would be read twice, and no digest tells."""
    forms: dict[Path, SourceFile] = {}
    for file in files:
        bare = _uncompressed(file.path).with_suffix("")
        other = forms.setdefault(bare.with_name(bare.name.casefold()), file)
        if other is not file:
            raise InputError(
                f"{file.path}: may hold the records of {other.path.name} in another form, and they would be read "
                "twice; keep one of the two, or give one another name where they differ"
            )
