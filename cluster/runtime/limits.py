"""What this machine allows a process, looked at before Ray starts, which would say it late and in other words."""

import os
import resource
from pathlib import Path

from configs.errors import InputError

LEAST_FILES = 256
LONGEST_SOCKET = 107  # bytes of a Unix socket's path
_SOCKET = "ray/session_2000-01-01_00-00-00_000000_0000000/sockets/plasma_store"  # as long as Ray's longest


def refuse_narrow() -> None:
    """Refuses to start a Ray of our own where it could not run.

    Raises:
        InputError: one of ``narrow``.
    """
    problem = next((problem for problem in (files(), sockets(), temporary()) if problem), None)
    if problem:
        raise InputError(problem)


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def files() -> str | None:
    """Why too few files may be open at once; None where enough may."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if most == resource.RLIM_INFINITY or most >= LEAST_FILES:
        return None
    return f"{most} files may be open at once, and Ray needs {LEAST_FILES}: `ulimit -n 4096` before the command"


def sockets() -> str | None:
    """Why Ray's sockets would have paths that no socket may have; None where they fit."""
    name, folder = temporary_folder()
    length = len(os.fsencode(Path(folder).absolute() / _SOCKET))
    if length <= LONGEST_SOCKET:
        return None
    most = LONGEST_SOCKET - len(_SOCKET) - 1
    return (
        f"{name} is {folder!r}: Ray's sockets below it would have paths of {length} bytes, and {LONGEST_SOCKET} are "
        f"the most; set RAY_TMPDIR to a folder of at most {most} bytes, as /tmp"
    )


def temporary() -> str | None:
    """Why nothing can be written where Ray keeps its session; None where it can."""
    name, folder = temporary_folder()
    place = Path(folder).absolute()
    there = next(path for path in (place, *place.parents) if path.exists())  # Ray makes what is missing
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return None
    what = "can't be written" if there.is_dir() else "is no folder"
    return f"{name} is {folder!r}, and {there} {what}: set RAY_TMPDIR to a folder that can be written, as /tmp"


def temporary_folder() -> tuple[str, str]:
    """The variable that says where Ray keeps its session, and that place."""
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), "TMPDIR")
    return name, os.environ.get(name, "/tmp")  # noqa: S108
