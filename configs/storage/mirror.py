"""A run whose storage is an object store, and the copy of it on which a machine works.

Stages read and write plain folders, so every machine has a mirror of the run below its cache. What a stage has finished
is pushed, its manifest last; what is missing here is pulled. The store is what counts: a mirror may be deleted at any
time, and another machine goes on from an empty one. Checkpoints never pass through it.
"""

import os
import shutil
from pathlib import Path, PurePosixPath

from configs.errors import SiloweaveError
from configs.schema.places import home
from configs.schema.schema import RunConfig
from configs.storage.bucket import Bucket
from configs.storage.files import digest_bytes, write_atomic
from configs.storage.layout import CONFIG, EVENTS, RunFiles
from configs.storage.manifests import MANIFEST, Manifest, damaged_file
from configs.storage.storage import COMMITTED

_NAMES = RunFiles(Path())
_CHECKPOINTS = f"{_NAMES.checkpoints.parent}/"
_LOOSE = {_NAMES.audit.name, _NAMES.tensorboard.name}  # folders without a manifest of their own


def mirror_directory(config: RunConfig) -> Path:
    """Where this machine works on a run of an object store: below SILOWEAVE_CACHE, else ``~/.cache/siloweave``.

    Raises:
        InputError: neither is there.
    """
    cache = os.environ.get("SILOWEAVE_CACHE") or home() / ".cache" / "siloweave"
    return (Path(cache) / digest_bytes(config.run.storage.rstrip("/").encode())[:16] / config.run.name).absolute()


def local_stage(config: RunConfig, folder: Path) -> Path:
    """A stage's folder on this machine, pulled where it is not here yet.

    Args:
        config: the run's settings.
        folder: the stage's on the driver; the same for every machine where ``run.storage`` is a folder.

    Raises:
        SiloweaveError: the store does not answer, or holds something else than its manifest says.
    """
    mirror = open_mirror(config)
    if mirror is None:
        return folder
    mirror.pull_stage(f"{folder.name}/{MANIFEST}")
    return mirror.directory / folder.name


def open_mirror(config: RunConfig) -> "Mirror | None":
    """The mirror of a run in an object store; None where its storage is a folder.

    Raises:
        InputError: there is no such kind of store, or its package is not installed.
    """
    return None if config.run.url is None else Mirror(config.run.url, mirror_directory(config))


class Mirror:
    """A run's store and its copy on this machine."""

    def __init__(self, url: str, directory: Path) -> None:
        self.directory = directory
        self.bucket = Bucket(url, directory)
        self._pushed: dict[str, str] = {}

    def pull(self) -> None:
        """Brings what the store has and this machine has not; of what both have, the store's counts.

        Raises:
            SiloweaveError: the store does not answer, or holds something else than a manifest says.
        """
        names = {name: size for name, size in self.bucket.all_names().items() if not name.startswith(_CHECKPOINTS)}
        if CONFIG not in names:  # a new run, or one that was deleted: its copy must not come back to life
            shutil.rmtree(self.directory, ignore_errors=True)
            return
        for name in sorted((name for name in names if _is_manifest(name)), key=lambda name: -name.count("/")):
            self.pull_stage(name)
        for name, size in names.items():
            path = self.directory / name
            have = path.stat().st_size if path.is_file() else -1
            # A log only grows, so the longer one knows more.
            if _is_loose(name) and (name == CONFIG or have < 0 or (name == EVENTS and have < size)):
                self.bucket.get(name, path)

    def pull_stage(self, name: str) -> None:
        """Brings one finished folder, by the name of its manifest.

        Raises:
            SiloweaveError: the store does not answer, or its files are not what the manifest says.
        """
        content, target = self.bucket.read(name), self.directory / name
        if content is None or (target.exists() and target.read_bytes() == content):
            return
        manifest, folder = Manifest.decode(content), target.parent
        target.unlink(missing_ok=True)
        prefix = PurePosixPath(name).parent
        for file, entry in manifest.files.items():
            one = Manifest(manifest.kind, "", files={file: entry})
            if damaged_file(folder, one) is not None:
                self.bucket.get(f"{prefix}/{file}", folder / file)
        broken = damaged_file(folder, manifest)
        if broken is not None:
            raise SiloweaveError(
                f"{self.bucket}/{prefix}/{broken}: its digest is not the manifest's; delete {self.bucket}/{prefix} and "
                "run its stage again"
            )
        write_atomic(target, content)
        self._pushed[name] = digest_bytes(content)

    def push(self) -> None:
        """Takes what is finished here, and not there yet, to the store; every folder's manifest goes last.

        Raises:
            SiloweaveError: the store does not take it.
        """
        files = [path for path in sorted(self.directory.rglob("*")) if path.is_file()]
        names = [path.relative_to(self.directory).as_posix() for path in files]
        names = [name for name in names if not name.startswith(_CHECKPOINTS) and not _is_temporary(name)]
        for name in sorted((name for name in names if _is_manifest(name)), key=lambda name: -name.count("/")):
            self._push_stage(name)
        for name in names:
            if _is_loose(name):
                self.push_file(name)

    def _push_stage(self, name: str) -> None:
        content = (self.directory / name).read_bytes()
        if self._pushed.get(name) == digest_bytes(content):
            return
        there = self.bucket.read(name)
        if there != content:
            if there is not None:  # while its files change, it is not finished
                self.bucket.remove_file(name)
            prefix = PurePosixPath(name).parent
            for file in Manifest.decode(content).files:
                self.bucket.put(self.directory / prefix / file, f"{prefix}/{file}")
            self.bucket.write(name, content)
        self._pushed[name] = digest_bytes(content)

    def push_file(self, name: str) -> None:
        """Takes one file to the store, where it has changed since this process did so."""
        content = (self.directory / name).read_bytes()
        if self._pushed.get(name) != digest_bytes(content):
            self.bucket.write(name, content)
            self._pushed[name] = digest_bytes(content)

    def move(self, name: str) -> None:
        """Gives the run another name, in the store and here."""
        source, target = self.bucket, Bucket(f"{self.bucket.url.rsplit('/', 1)[0]}/{name}", self.directory)
        names = sorted(source.all_names(), key=lambda found: found != CONFIG)  # without it, the rest is garbage
        for found in reversed(names):
            source.copy(found, target)
        for found in names:
            source.remove_file(found)
        if self.directory.exists():
            self.directory.rename(self.directory.with_name(name))


def _is_manifest(name: str) -> bool:
    return PurePosixPath(name).name in (MANIFEST, COMMITTED)


def _is_loose(name: str) -> bool:
    """A file that belongs to no finished folder."""
    return "/" not in name or name.split("/", maxsplit=1)[0] in _LOOSE


def _is_temporary(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)
