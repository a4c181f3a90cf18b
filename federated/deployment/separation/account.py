"""An operating-system user, and what the permissions of files give it."""

import functools
import grp
import os
import pwd
import stat
from dataclasses import dataclass
from pathlib import Path

from configs.errors import InputError

READ, WRITE, ENTER = 4, 2, 1
ACCESS_LIST = "system.posix_acl_access"
# Members of these are as good as root on usual systems.
_POWERFUL_GROUPS = frozenset({"root", "docker", "disk", "sudo", "wheel", "shadow", "lxd"})


@dataclass(frozen=True)
class Account:
    """An operating-system user with all its groups."""

    name: str
    uid: int
    gids: frozenset[int]

    @classmethod
    def of(cls, name: str) -> "Account":
        """Looks a user up.

        Raises:
            InputError: there is no such user.
        """
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            raise InputError(
                f"silo.relay_user is {name!r}: no such user; make it (`useradd --system {name}`)"
            ) from None
        return cls(name, entry.pw_uid, frozenset(os.getgrouplist(name, entry.pw_gid)))

    @property
    def gid(self) -> int:
        """The user's own group."""
        return pwd.getpwuid(self.uid).pw_gid

    @functools.cached_property
    def powerful_groups(self) -> list[str]:
        """Those of its groups whose members are as good as root."""
        return sorted(_POWERFUL_GROUPS & {grp.getgrgid(gid).gr_name for gid in self.gids if _is_group(gid)})

    def may(self, path: Path, wanted: int) -> bool:
        """Whether one of the wanted permissions is given on exactly this file or folder."""
        return self.is_given(path, path.lstat(), wanted)

    def is_given(self, path: str | Path, status: os.stat_result, wanted: int) -> bool:
        """The same where the file's status is known."""
        if self.uid == status.st_uid:
            return bool(status.st_mode >> 6 & wanted)  # an owner may give the rest, too, but see ``owns``
        group, others = status.st_mode >> 3 & 7, status.st_mode & 7
        if not (group | others) & wanted:
            return False
        if _has_access_list(path):  # the group's bits are then its mask: the most that it gives anybody
            return True
        return bool((group if status.st_gid in self.gids else others) & wanted)

    def owns(self, path: Path) -> bool:
        """Whether the file is the user's own: an owner may change its mode."""
        return self.uid == path.lstat().st_uid


def is_sticky(status: os.stat_result) -> bool:
    """Whether only owners rename and delete what is in a folder; anybody who may write there still adds to it."""
    return bool(status.st_mode & stat.S_ISVTX)


def _has_access_list(path: str | Path) -> bool:
    try:
        return ACCESS_LIST in os.listxattr(path, follow_symlinks=False)
    except OSError:  # a file system without them
        return False


def _is_group(gid: int) -> bool:
    try:
        grp.getgrgid(gid)
    except KeyError:
        return False
    return True
