"""Wheels of what is installed here: a site gets the very files that this environment runs, and nothing is fetched."""

import base64
import csv
import hashlib
import importlib.metadata
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution
from pathlib import Path, PurePosixPath

from packaging.requirements import Requirement
from packaging.tags import parse_tag
from packaging.utils import canonicalize_name

from configs.errors import InputError

_EPOCH = (1980, 1, 1, 0, 0, 0)  # equal environments make equal wheels
_OF_INSTALLER = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"}
_FAST = 1  # most of the bytes are machine code, which higher levels of zlib shrink by a few percent in thrice the time


@dataclass(frozen=True)
class Recorded:
    """A file as pip has installed it.

    Attributes:
        path: from the folder of packages.
        digest: SHA-256 as RECORD writes it; empty: none.
    """

    path: PurePosixPath
    digest: str


def recorded(distribution: Distribution) -> list[Recorded]:
    """A package's files by its RECORD: what importlib.metadata gives lacks, in some versions, files that are gone."""
    rows = csv.reader((distribution.read_text("RECORD") or "").splitlines())
    return [
        Recorded(PurePosixPath(row[0]), row[1].removeprefix("sha256=") if row[1].startswith("sha256=") else "")
        for row in rows
    ]


def required(root: str, extras: tuple[str, ...] = ()) -> list[Distribution]:
    """A package and all that it needs on a machine like this one, by name.

    Args:
        root: the package.
        extras: of it.

    Raises:
        InputError: one of them is not installed here, or the package has no such extra.
    """
    found: dict[tuple[str, str], Distribution] = {}
    open_ = [(root, "", f"{root}[{','.join(extras)}]" if extras else root), *((root, extra, root) for extra in extras)]
    while open_:
        name, extra, asked_by = open_.pop()
        if (canonicalize_name(name), extra) in found:
            continue
        distribution = _installed(name, asked_by)
        if extra and canonicalize_name(extra) not in map(canonicalize_name, _extras(distribution)):
            raise InputError(f"{name}: has no extra {extra!r}; it has {', '.join(_extras(distribution)) or 'none'}")
        found[canonicalize_name(name), extra] = distribution
        for needed in _needs(distribution, extra):
            open_ += [(needed.name, each, name) for each in ("", *sorted(needed.extras))]
    return [found[key] for key in sorted(found) if not key[1]]


def _extras(distribution: Distribution) -> list[str]:
    return distribution.metadata.get_all("Provides-Extra") or []


def _installed(name: str, asked_by: str) -> Distribution:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"{name}: {asked_by} needs it, and it is not installed here; `pip install {name}`") from None


def _needs(distribution: Distribution, extra: str) -> Iterator[Requirement]:
    for line in distribution.requires or []:
        needed = Requirement(line)
        if needed.marker is None:
            if not extra:
                yield needed
        elif needed.marker.evaluate({"extra": extra}) and (not extra or not needed.marker.evaluate({"extra": ""})):
            yield needed


def write_wheel(distribution: Distribution, folder: Path) -> Path:
    """Packs an installed package, whose files are all as they were installed.

    Args:
        distribution: the package.
        folder: where to.

    Returns:
        The wheel.

    Raises:
        InputError: pip hasn't installed it from a wheel, or a file of it was changed since.
    """
    files = recorded(distribution)
    name, described, info = _packable(distribution, files)
    stem = f"{canonicalize_name(distribution.name).replace('-', '_')}-{distribution.version.replace('-', '_')}"
    wheel = folder / f"{stem}-{_tags(described)}.whl"
    record = []
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED, compresslevel=_FAST) as archive:
        for place, file in sorted(_kept(distribution, files, info), key=lambda kept: kept[0]):
            content = _content(distribution, file, name)
            if place.startswith(f"{info.removesuffix('.dist-info')}.data/scripts/"):
                content = _for_any_python(content)
            _add(archive, place, content, Path(str(distribution.locate_file(file.path))).stat().st_mode)
            record.append(f"{_quoted(place)},sha256={_digest(content)},{len(content)}\n")
        record.append(f"{info}/RECORD,,\n")
        _add(archive, f"{info}/RECORD", "".join(record).encode(), 0o644)
    return wheel


def check_packable(distribution: Distribution) -> None:
    """Refuses what no wheel can be made of, before any is.

    Raises:
        InputError: pip hasn't installed it from a wheel.
    """
    _packable(distribution, recorded(distribution))


def _packable(distribution: Distribution, files: Sequence[Recorded]) -> tuple[str, str, str]:
    """Name and version of a package, what its WHEEL says, and the folder of that."""
    name = f"{distribution.name}-{distribution.version}"
    described = distribution.read_text("WHEEL")
    if not files or described is None:
        raise InputError(f"{name}: not installed by pip from a wheel; use a virtual environment of its own")
    if _is_editable(distribution):
        raise InputError(f"{name}: runs from a working folder; `pip install` it from there without --editable")
    paths = (file.path for file in files)
    (info,) = {path.parts[0] for path in paths if path.match("*.dist-info/WHEEL") and len(path.parts) == 2}
    return name, described, info


def _is_editable(distribution: Distribution) -> bool:
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    return bool(origin.get("dir_info", {}).get("editable"))


def _tags(described: str) -> str:
    """The compressed tags of a wheel's name (PEP 425) from those of its WHEEL."""
    found = [parse_tag(line.split(":", 1)[1].strip()) for line in described.splitlines() if line.startswith("Tag:")]
    each = [tag for tags in found for tag in tags]
    parts = ({tag.interpreter for tag in each}, {tag.abi for tag in each}, {tag.platform for tag in each})
    return "-".join(".".join(sorted(part)) for part in parts)


def _kept(distribution: Distribution, files: Sequence[Recorded], info: str) -> Iterator[tuple[str, Recorded]]:
    """Each file with its place in a wheel; what pip makes itself at the next site is left out."""
    made_by_pip = {
        point.name for point in distribution.entry_points if point.group in {"console_scripts", "gui_scripts"}
    }
    site = Path(os.path.normpath(str(distribution.locate_file(""))))
    data = f"{info.removesuffix('.dist-info')}.data"
    for file in files:
        path, parts = Path(os.path.normpath(site / file.path)), file.path.parts
        if path.suffix == ".pyc" or (parts[0] == info and parts[-1] in _OF_INSTALLER and len(parts) == 2):
            continue
        if path.is_relative_to(site):
            yield path.relative_to(site).as_posix(), file
            continue
        prefix = site.parents[2]  # of lib/python3.11/site-packages
        if not path.is_relative_to(prefix):
            raise InputError(f"{distribution.name}: {file.path} lies outside of {prefix}; install it anew")
        place = path.relative_to(prefix)
        if place.parts[0] != "bin":
            yield f"{data}/data/{place.as_posix()}", file
        elif place.name not in made_by_pip:
            yield f"{data}/scripts/{place.name}", file


def _content(distribution: Distribution, file: Recorded, name: str) -> bytes:
    path = Path(str(distribution.locate_file(file.path)))
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}); install {name} anew") from None
    if not _is(file, content) and not _installed_by_another(path, content):
        raise InputError(f"{path}: was changed since {name} was installed; install it anew")
    return content


def _is(file: Recorded, content: bytes) -> bool:
    return file.digest == _digest(content)


def _installed_by_another(path: Path, content: bytes) -> bool:
    """Some packages bring the same file, such as a README.md beside all packages: the last one's is what is there."""
    mine = os.path.normpath(path)
    return any(
        os.path.normpath(str(other.locate_file(file.path))) == mine and _is(file, content)
        for other in importlib.metadata.distributions()
        for file in recorded(other)
        if file.path.name == path.name
    )


def _for_any_python(script: bytes) -> bytes:
    """A script as wheels have it: pip writes the Python of its environment into the first line."""
    first, line_end, rest = script.partition(b"\n")
    return b"#!python" + line_end + rest if first.startswith(b"#!") and b"python" in first else script


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def _quoted(place: str) -> str:
    return f'"{place}"' if "," in place else place


def _add(archive: zipfile.ZipFile, place: str, content: bytes, mode: int) -> None:
    entry = zipfile.ZipInfo(place, _EPOCH)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = (0o100000 | (0o755 if mode & 0o111 else 0o644)) << 16
    archive.writestr(entry, content, compresslevel=_FAST)
