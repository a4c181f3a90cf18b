"""How far a user's permissions reach: every folder and every link on the way to a file, and all that is below a folder.

What can't be seen from permissions (a sudo rule, the docker group, another mount of the same disk) stays with the
machine's administrator.
"""

import contextlib
import os
import stat
from pathlib import Path

from configs.errors import InputError
from configs.storage.files import unreadable
from federated.deployment.separation.account import ENTER, READ, WRITE, Account, is_sticky

_MOST_LINKS = 40  # links on one path: as many as the system follows


class Reach:
    """What a relay's user can do to files. What it must not be able to do is an InputError, which names the file."""

    def __init__(self, relay: Account) -> None:
        self._relay = relay
        self._entered: dict[Path, bool] = {}
        self._seen: set[tuple[Path, bool]] = set()

    def check(self, what: str, path: Path, *, secret: bool) -> None:
        """Refuses a relay that can change a file or folder, what is in it, or the way to it; or can read a secret one.

        Args:
            what: for the message.
            path: may pass through links, and may be missing.
            secret: whether it must not be read either. A folder may be entered where the files in it are closed.
        """
        place = self._followed(what, path)
        if place is not None and self._enters(what, place.parent):
            self._check_tree(what, place, secret=secret)

    def check_entries(self, what: str, folder: Path) -> list[Path]:
        """The same for a folder that holds other things besides code, or a file: itself and what is right in it.

        Returns:
            What else Python may import from in it, where the relay can come near: folders, with or without
            ``__init__.py``, and where links to files end.
        """
        place = self._followed(what, folder)
        if place is None or not self._enters(what, place.parent):
            return []
        status = place.lstat()
        self._check_entry(what, place, status)  # no sticky bit helps where the danger is a new file
        if not stat.S_ISDIR(status.st_mode) or not self._relay.is_given(place, status, ENTER):
            return []
        entries = _listed(place, secret=False)
        for entry in entries:
            if entry.is_symlink():
                self._followed(what, Path(entry.path))
            else:
                self._check_entry(what, entry.path, entry.stat(follow_symlinks=False))
        return [Path(entry.path) for entry in entries if _imports(entry)]

    def _followed(self, what: str, path: Path) -> Path | None:
        """Where a path ends after all its links, each looked at; None where it ends nowhere."""
        place, ahead, links = Path("/"), list(path.absolute().parts[1:]), 0
        while ahead:
            part = ahead.pop(0)
            if part == "..":
                place = place.parent
                continue
            near, step = self._enters(what, place), place / part
            try:
                status = step.lstat()
            except FileNotFoundError:
                if near and self._relay.may(place, WRITE):
                    self._refuse(what, place, f"make {part} in")
                return None
            except PermissionError:
                raise InputError(unreadable(step)) from None
            if near and status.st_uid == self._relay.uid:
                self._refuse(what, step, "replace" if stat.S_ISLNK(status.st_mode) else "change the mode of")
            if not stat.S_ISLNK(status.st_mode):
                place = step
                continue
            target, links = step.readlink(), links + 1
            if links > _MOST_LINKS:
                raise InputError(f"{path}: more than {_MOST_LINKS} links on the way; give the folder itself")
            if target.is_absolute():
                place = Path("/")
            ahead = [part for part in target.parts if part != "/"] + ahead
        return place

    def _enters(self, what: str, folder: Path) -> bool:
        """Whether the relay can enter a folder, which is no link, and all above it; it may replace nothing in them."""
        if folder not in self._entered:
            above = folder == folder.parent or self._enters(what, folder.parent)
            self._entered[folder] = above and self._enters_this(what, folder)
        return self._entered[folder]

    def _enters_this(self, what: str, folder: Path) -> bool:
        status = folder.lstat()
        if self._relay.uid == status.st_uid or (self._relay.is_given(folder, status, WRITE) and not is_sticky(status)):
            self._refuse(what, folder, "replace what is in")
        return self._relay.is_given(folder, status, ENTER)

    def _check_tree(self, what: str, place: Path, *, secret: bool) -> None:
        if (place, secret) in self._seen:
            return
        self._seen.add((place, secret))
        status = place.lstat()
        self._check_entry(what, place, status, secret=secret)
        if not stat.S_ISDIR(status.st_mode) or not self._relay.is_given(place, status, ENTER):
            return
        for entry in _listed(place, secret=secret):
            with contextlib.suppress(FileNotFoundError):  # another process's temporary file
                if entry.is_symlink():
                    self.check(what, Path(entry.path), secret=secret)
                elif entry.is_dir(follow_symlinks=False):
                    self._check_tree(what, Path(entry.path), secret=secret)
                else:  # the short way: an installation has a hundred thousand files
                    self._check_entry(what, entry.path, entry.stat(follow_symlinks=False), secret=secret)

    def _check_entry(self, what: str, path: str | Path, status: os.stat_result, *, secret: bool = False) -> None:
        """Checks a file, or a folder by itself: one may be entered where the files in it are closed, but not listed."""
        if self._relay.uid == status.st_uid:
            self._refuse(what, Path(path), "change the mode of")
        if self._relay.is_given(path, status, WRITE):
            self._refuse(what, Path(path), "change")
        if secret and self._relay.is_given(path, status, READ):
            self._refuse(what, Path(path), "read")

    def _refuse(self, what: str, path: Path, can: str) -> None:
        instead = f"`chmod -R {'go-rwx' if can == 'read' else 'go-w'} {path}`, or another owner"
        raise InputError(
            f"silo.relay_user is {self._relay.name!r}: can {can} {path} ({what}); take that away, for instance by "
            f"{instead}"
        )


def _imports(entry: "os.DirEntry[str]") -> bool:
    """Whether an import may go on behind it: a folder's name is part of the module's."""
    return entry.name.isidentifier() if entry.is_dir() else entry.is_symlink()


def _listed(folder: Path, *, secret: bool) -> list["os.DirEntry[str]"]:
    """What is in a folder. Where this process may not look, Python doesn't find code to import either."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except PermissionError:
        if secret:
            raise InputError(unreadable(folder)) from None
        return []
