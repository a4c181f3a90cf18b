"""A relay runs code that arrives in Flower's bundles, so its user must have no way to what a silo keeps.

The operating system's own permissions are walked: every folder on the way, owner, groups and others. What it can't see
from there (a sudo rule, the docker group, a mounted copy) stays with the machine's administrator.
"""

import grp
import os
import pwd
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from configs.errors import InputError
from configs.silo import SiloConfig
from privacy.journal import default_anchor_dir

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

    def may(self, path: Path, wanted: int) -> bool:
        """Whether one of the wanted permissions is given on exactly this file or folder."""
        status = path.lstat()
        if self.uid == status.st_uid:
            return bool(status.st_mode >> 6 & wanted)  # an owner may give the rest, too, but see ``owns``
        group, others = status.st_mode >> 3 & 7, status.st_mode & 7
        if _has_access_list(path):  # its mask, the most that anybody named in it has, is where the group's bits were
            return bool((group | others) & wanted)
        return bool((group if status.st_gid in self.gids else others) & wanted)

    def owns(self, path: Path) -> bool:
        """Whether the file is the user's own: an owner may change its mode."""
        return self.uid == path.lstat().st_uid


def check_separation(config: SiloConfig, settings: Path) -> None:
    """Refuses a relay whose user could reach what the silo keeps.

    Args:
        config: the silo's settings.
        settings: their file, which holds the policy.

    Raises:
        InputError: the relay's user is the service's own, is as good as root, or can read or change data, policy, keys
            or ledger; the message names the file.
    """
    relay = Account.of(config.silo.relay_user)
    if relay.uid in (0, os.geteuid()):
        raise InputError(
            f"silo.relay_user is {relay.name!r}: the relay needs a user of its own, neither root nor the service's; "
            "make one (`useradd --system siloweave-relay`)"
        )
    powerful = sorted(_POWERFUL_GROUPS & {grp.getgrgid(gid).gr_name for gid in relay.gids if _is_group(gid)})
    if powerful:
        raise InputError(f"silo.relay_user is {relay.name!r}: is in group {powerful[0]}; take it out of that group")
    for what, path in kept(config, settings):
        _check(relay, what, path)
    for code in (Path(__file__).parent, Path(sys.prefix)):
        for folder in (code, *code.parents):
            _check_unchangeable(relay, "the installed code", folder)


def kept(config: SiloConfig, settings: Path) -> Iterator[tuple[str, Path]]:
    """What a relay must not reach: policy, keys and ledger, anchor, data."""
    silo, data = config.silo, config.data
    state_dir = Path(silo.state_dir)
    yield "the policy", settings
    yield "keys and ledger", state_dir
    yield "the ledger's anchor", Path(silo.anchor_dir) if silo.anchor_dir else default_anchor_dir(state_dir)
    if silo.encryption_key_file not in ("", "env:"):
        yield "the encryption key", Path(silo.encryption_key_file)
    if not data.public and not data.source.startswith(("embedded:", "hf:")):
        yield "the data", Path(data.source)


def _check(relay: Account, what: str, path: Path) -> None:
    for place in {path.absolute(), path.resolve()}:
        if not place.exists():
            continue
        for folder in reversed(place.parents):
            _check_unchangeable(relay, what, folder)
            if not relay.may(folder, ENTER):
                break  # nothing below is within reach
        else:
            if not place.is_symlink():  # a link has no permissions; what it names is the other place
                _check_tree(relay, what, place)


def _check_unchangeable(relay: Account, what: str, folder: Path) -> None:
    changeable = relay.may(folder, WRITE) and not folder.lstat().st_mode & stat.S_ISVTX
    if changeable or relay.owns(folder):
        _refuse(relay, what, folder, "replace what is in")


def _check_tree(relay: Account, what: str, place: Path) -> None:
    if relay.owns(place):
        _refuse(relay, what, place, "change the mode of")
    if relay.may(place, WRITE):
        _refuse(relay, what, place, "change")
    if not place.is_dir():
        if relay.may(place, READ):
            _refuse(relay, what, place, "read")
    elif relay.may(place, ENTER):
        for entry in place.iterdir():
            if entry.is_symlink():
                _check(relay, what, entry)
            else:
                _check_tree(relay, what, entry)


def _refuse(relay: Account, what: str, path: Path, can: str) -> None:
    raise InputError(
        f"silo.relay_user is {relay.name!r}: can {can} {path} ({what}); take that permission away, for instance with "
        f"`chmod -R go-rwx {path}`"
    )


def _has_access_list(path: Path) -> bool:
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


def share_socket(socket: Path, relay_user: str) -> None:
    """Opens a service's socket to the relay's group and nobody else, and its folder where the relay can't enter it.

    Raises:
        InputError: this user may not give files to that group, or the folder holds more than the socket.
    """
    relay, folder = Account.of(relay_user), socket.parent
    try:
        if not relay.may(folder, ENTER):
            if any(entry != socket for entry in folder.iterdir()):
                raise InputError(
                    f"{folder}: {relay.name} can't enter it, and it holds other files; give the socket its own folder"
                )
            os.chown(folder, -1, relay.gid)
            folder.chmod(0o750)
        os.chown(socket, -1, relay.gid)
        socket.chmod(0o660)
    except PermissionError:
        group = grp.getgrgid(relay.gid).gr_name
        raise InputError(
            f"{socket}: can't be given to group {group}; add the service's user to it (`usermod -aG {group} USER`)"
        ) from None
