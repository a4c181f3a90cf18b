"""Where the files and folders that settings name are: one rule for every path.

A relative path means one below the folder of the file that holds it, and one below where one stands where it has no
such file: in a preset, or after ``--set``. It is made absolute where it is read, so that nothing that starts elsewhere
(a worker, a job, a second command) can take it for another one.
"""

import os
import pwd
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from configs.errors import InputError


@dataclass(frozen=True)
class Place:
    """Marks a text in settings as the name of a file or folder.

    Attributes:
        what: what the place holds, for messages.
        secret: whether a silo's relay must not read it; it must not change any.
        made: whether it is a folder that is made where it is missing.
        unless: regular expression of a text that names no place of this machine's.
        prefix: what may stand before the path, to say of which kind the file is.
        lasting: whether an empty text means the user's own folder of ledgers; else one that may be empty means none.
    """

    what: str
    secret: bool = True
    made: bool = False
    unless: str = ""
    prefix: str = ""
    lasting: bool = False


def named_places(settings: BaseModel) -> Iterator[tuple[Place, str]]:
    """Every text that names a place, in all groups. A test over the schema checks that none is forgotten."""
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            yield from named_places(value)
        if place := _place(field):
            yield place, value


def rooted(
    schema: type[BaseModel], tree: dict[str, Any], folder: Path | None, origin: str, *, fill: bool = False
) -> dict[str, Any]:
    """The tree with every path in it absolute.

    Args:
        schema: the settings that the tree is, or is a part of.
        tree: as it was read.
        folder: what relative paths are relative to; None where they have no meaning, since others will read them.
        origin: where the tree is from, for messages.
        fill: put in the paths that settings have when they are left out, too.

    Raises:
        InputError: a path is empty, a URL, relative without a folder, or of a home that there is not.
    """
    return _rooted(schema, tree, folder, f"{origin}: ", fill)


def _rooted(
    schema: type[BaseModel], tree: dict[str, Any], folder: Path | None, prefix: str, fill: bool
) -> dict[str, Any]:
    """``prefix`` is what messages put before a setting's name. What is no tree or text is left to the schema."""
    done = dict(tree)
    for name, field in schema.model_fields.items():
        where, inner, place = f"{prefix}{name}", _group(field.annotation), _place(field)
        missing: dict[str, Any] | None = {} if fill and inner and not field.is_required() else None
        value = tree.get(name, field.default if fill and place else missing)
        if place and isinstance(value, str):
            done[name] = _absolute(value, place, field, folder, where)
        elif inner and isinstance(value, dict):
            found = _rooted(inner, value, folder, f"{where}.", fill)
            done.update({name: found} if found or name in tree else {})
        elif (each := _group_by_name(field.annotation)) and isinstance(value, dict):
            done[name] = {
                key: _rooted(each, item, folder, f"{where}.{key}.", fill) if isinstance(item, dict) else item
                for key, item in value.items()
            }
    return done


def _absolute(text: str, place: Place, field: FieldInfo, folder: Path | None, where: str) -> str:
    if place.unless and re.fullmatch(place.unless, text):
        return text
    if place.prefix and text.startswith(place.prefix):
        kind, path = place.prefix, text.removeprefix(place.prefix)
        return kind + _absolute(path, replace(place, prefix=""), FieldInfo(), folder, where)
    if not text and field.default == "":
        return str(ledgers()) if place.lasting and folder is not None else text
    if not text.strip():
        raise InputError(f"{where} is empty: give the path of {place.what}")
    if folder is None and not text.startswith("/"):
        raise InputError(f"{where} is {text!r}: give an absolute path that all nodes of the cluster share")
    return _below(text, folder or Path("/"), f"{where} is {text!r}")


def _below(text: str, folder: Path, what: str) -> str:
    if "://" in text or "\0" in text:
        raise InputError(f"{what}: no path; give a file or folder of this machine")
    if text == "~" or text.startswith("~/"):
        return str(home() / text[2:])
    try:
        return str(folder / Path(text).expanduser())
    except RuntimeError:
        raise InputError(f"{what}: there is no such user's home; give the path itself") from None


def here() -> Path:
    """The folder where one stands.

    Raises:
        InputError: it was deleted.
    """
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise InputError("the folder where this command was given is gone; give it in another one") from None


def home() -> Path:
    """The user's home: HOME, or what the system says where it is not set, or no absolute path.

    Raises:
        InputError: there is none.
    """
    given, user = os.environ.get("HOME", ""), os.getuid()
    if given.startswith("/"):
        return Path(given)
    try:
        return Path(pwd.getpwuid(user).pw_dir)
    except KeyError:
        raise InputError(
            f"HOME is not set, and user {user} has no home: set HOME, or XDG_STATE_HOME, to a folder of this user's "
            "that lasts"
        ) from None


def user_state() -> Path:
    """This user's one folder for what outlives runs, wherever a command is given.

    Raises:
        InputError: the user has no home.
    """
    given = os.environ.get("XDG_STATE_HOME", "")
    # As its specification has it, a relative one doesn't count: it would be another folder everywhere.
    return (Path(given) if given.startswith("/") else home() / ".local" / "state") / "siloweave"


def ledgers() -> Path:
    """Folder of simulated silos' keys and ledgers, where settings give none."""
    return user_state() / "ledgers"


def _place(field: FieldInfo) -> Place | None:
    return next((item for item in field.metadata if isinstance(item, Place)), None)


def _group(annotation: Any) -> type[BaseModel] | None:
    """The group, also of one that may be left out."""
    choices = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    groups = (choice for choice in choices if isinstance(choice, type) and issubclass(choice, BaseModel))
    return next(groups, None)


def _group_by_name(annotation: Any) -> type[BaseModel] | None:
    return _group(get_args(annotation)[1]) if get_origin(annotation) is dict else None
