"""What the public corpora were read from, and what has become of it since they were prepared."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.schema.data import corpora, field_of
from configs.schema.schema import RunConfig
from configs.storage.files import digest_json
from configs.storage.manifests import Manifest
from trainer.data.embedded import version_of
from trainer.data.reading.files import SourceFile, SourceFiles, shown, source_files

ORIGINS = "origins"  # in a corpus' metadata: by corpus, what it was read from
Origin = dict[str, Any]


@dataclass(frozen=True)
class Since:
    """What is otherwise than it was when a corpus was prepared, a line for each source.

    Attributes:
        changed: files of these sources were changed, added or removed.
        unknown: these sources can't be compared, or are texts of a package that is of another version here.
    """

    changed: tuple[str, ...]
    unknown: tuple[str, ...]


def origin(source: str, files: SourceFiles | None) -> Origin:
    """What a source is now, after it was read. Nothing is known of a Hugging Face dataset without its hub.

    Raises:
        InputError: a file has changed since it was found.
    """
    if files is None:
        return {"version": version_of(source.removeprefix("embedded:"))} if source.startswith("embedded:") else {}
    return {"files": {file.name: _described(file) for file in files.files}}


def _described(file: SourceFile) -> dict[str, Any]:
    described = {"size_bytes": file.size_bytes, "mtime_ns": file.mtime_ns, "sha256": file.sha256}
    file.check_unchanged()
    return described


def digests(origins: Mapping[str, Origin]) -> dict[str, str]:
    """One digest for the files of each corpus, by its name."""
    return {
        name: digest_json({file: found["sha256"] for file, found in known["files"].items()})
        for name, known in origins.items()
        if "files" in known
    }


def since(config: RunConfig, origins: Mapping[str, Origin]) -> Since:
    """Compares what a corpus was read from with what is there now: by size and time, and by digest where these differ.

    Args:
        config: the run's settings.
        origins: what was recorded; nothing of a corpus that was prepared before origins were.
    """
    changed, unknown = [], []
    for name, source in corpora(config.data).items():
        known, field = origins.get(name, {}), f"{field_of(name)} {source.source!r}"
        if "version" in known and (now := version_of(source.source.removeprefix("embedded:"))) != known["version"]:
            unknown.append(f"{field}: is of {now} here, and was prepared of {known['version']}")
        if "files" not in known:
            continue
        try:
            found = differences(known["files"], source_files(Path(source.source)))
        except InputError as error:
            unknown.append(f"{field}: can't be compared with what was prepared ({error})")
            continue
        if found:
            changed.append(f"{field}: other files than were prepared: {found}")
    return Since(tuple(changed), tuple(unknown))


def since_prepared(config: RunConfig, corpus: Manifest) -> Since:
    """``since`` for a corpus that is finished."""
    return since(config, corpus.metadata.get(ORIGINS, {}))


def differences(before: Mapping[str, Mapping[str, Any]], source: SourceFiles) -> str:
    """Files that were changed, added or removed since, in words; empty for none."""
    now = {file.name: file for file in source.files}
    found = {
        "changed": [name for name, file in now.items() if name in before and not _same(before[name], file)],
        "new": [name for name in now if name not in before],
        "gone": [name for name in before if name not in now],
    }
    return ", ".join(f"{len(names)} {what} ({shown(names)})" for what, names in found.items() if names)


def _same(before: Mapping[str, Any], file: SourceFile) -> bool:
    if (before["size_bytes"], before["mtime_ns"]) == (file.size_bytes, file.mtime_ns):
        return True
    return bool(before["sha256"] == file.sha256)
