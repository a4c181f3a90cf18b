"""A relay runs code that arrives in Flower's bundles, so its user must have no way to what a silo keeps, or runs."""

import grp
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from configs.errors import InputError
from configs.schema.places import named_places
from configs.schema.silo import SiloConfig
from federated.deployment.separation.account import ENTER, Account
from federated.deployment.separation.reach import Reach
from privacy.ledger.journal import default_anchor_dir
from privacy.register import register_file

_PACKAGES = ("configs", "trainer", "privacy", "federated", "cluster", "siloweave")
# Variables by which the system finds libraries before all others, and the characters that separate their parts.
_LIBRARIES = {"LD_LIBRARY_PATH": "[:;]", "LD_PRELOAD": "[: ]", "LD_AUDIT": ":"}


@dataclass(frozen=True)
class Kept:
    """A file or folder that the relay must not change.

    Attributes:
        what: for the message.
        path: where it is.
        secret: whether the relay must not read it either.
        made: whether it is a folder that is made, closed, where it is missing: others would make it open.
    """

    what: str
    path: Path
    secret: bool
    made: bool = False


def check_separation(config: SiloConfig, settings: Path) -> None:
    """Refuses a relay whose user could reach what the silo keeps, or change what it runs.

    Args:
        config: the silo's settings.
        settings: their file, which holds the policy.

    Raises:
        InputError: the relay's user is the service's own, is as good as root, can read or change data, policy, keys
            or ledger, or can change code; the message names the file.
    """
    relay = Account.of(config.silo.relay_user)
    if relay.uid in (0, os.geteuid()):
        raise InputError(
            f"silo.relay_user is {relay.name!r}: the relay needs a user of its own, neither root nor the service's; "
            "make one (`useradd --system siloweave-relay`)"
        )
    if relay.powerful_groups:
        raise InputError(
            f"silo.relay_user is {relay.name!r}: is in group {relay.powerful_groups[0]}; take it out of that group"
        )
    reach = Reach(relay)
    for kept in kept_by(config, settings):
        if kept.made:
            _make_closed(kept.path)
        reach.check(kept.what, kept.path, secret=kept.secret)
    _check_code(reach)


def kept_by(config: SiloConfig, settings: Path) -> Iterator[Kept]:
    """All that the settings name on the disk, by their schema, and the settings themselves."""
    yield Kept("the policy", settings, secret=True)
    for place, value in named_places(config):
        secret = place.secret and not (config.data.public and value == config.data.source)
        if value.startswith("hf:"):
            yield from (Kept("a copy of the data", folder, secret, made=True) for folder in _copies())
        if value and not value.startswith(("embedded:", "env:")):  # what follows hf: may be a folder of this machine
            yield Kept(place.what, Path(value.removeprefix("hf:")), secret, place.made)
    if not config.silo.anchor_dir:
        yield Kept("the ledger's anchor", default_anchor_dir(Path(config.silo.state_dir)), secret=True, made=True)
    if not config.data.public:
        yield Kept("where each dataset's ledger is", register_file(), secret=True)


def _make_closed(folder: Path) -> None:
    try:
        if not folder.exists():
            folder.mkdir(parents=True, mode=0o700)
    except OSError as error:
        raise InputError(
            f"{folder}: can't be made ({error.strerror}); make it with mode 700, as the service's user"
        ) from None


def _copies() -> list[Path]:
    from trainer.data.reading.hugging_face import hugging_face_folders

    return hugging_face_folders()


def _check_code(reach: Reach) -> None:
    """Checks all that the service may import, and what it is run by.

    The standard library and what is installed are checked file by file. Of other folders that code is looked for in,
    such as the current one, what is right in them is checked, and what is in those whose names an import may have.
    """
    what = "the installed code"
    reach.check(what, Path(sys.executable), secret=False)
    for spec in filter(None, map(find_spec, _PACKAGES)):
        for place in spec.submodule_search_locations or [str(spec.origin)]:
            reach.check(what, Path(place), secret=False)
    roots = [Path(prefix).resolve() for prefix in {sys.prefix, sys.base_prefix}]
    for root in roots:  # pyvenv.cfg says where everything else is
        reach.check_entries(what, root)
    for entry in sys.path:
        folder = Path(entry)
        if any(folder.resolve().is_relative_to(root) for root in roots):
            reach.check(what, folder, secret=False)
        else:
            for inner in reach.check_entries(what, folder):
                reach.check(what, inner, secret=False)
    for name, path in _libraries():
        reach.check(f"the libraries of {name}", path, secret=False)


def _libraries() -> Iterator[tuple[str, Path]]:
    for name, between in _LIBRARIES.items():
        value = os.environ.get(name, "")
        if "$" in value:
            raise InputError(f"{name}: is {value!r}, and the system replaces what begins with $; give folders in full")
        for part in re.split(between, value) if value else ():
            if "/" in part or name == "LD_LIBRARY_PATH":  # a name without / is looked for in LD_LIBRARY_PATH
                yield name, Path(part)  # empty: the current folder


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
