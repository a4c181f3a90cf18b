"""Another user than the tests' own, for files that may not be read."""

import contextlib
import os
import pwd
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def another_user() -> Iterator[str]:
    """Acts as a user for whom a closed file is closed: ``nobody`` where the tests run as root. Yields its name."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(pwd.getpwnam("nobody").pw_uid)
    try:
        yield pwd.getpwuid(os.geteuid()).pw_name
    finally:
        os.seteuid(user)


@contextlib.contextmanager
def folder_for_everybody() -> Iterator[Path]:
    """A temporary folder that any user may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="closed-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        try:
            yield folder
        finally:
            for path in (folder, *(found for found in folder.iterdir() if found.is_dir())):
                path.chmod(0o700)
