"""A file in which an interrupted command's results collect, so that the same command goes on with them."""

import fcntl
from pathlib import Path
from typing import BinaryIO

from configs.errors import InputError
from trainer.inference.tables import json_line


def lock(file: BinaryIO, output: Path) -> None:
    """Keeps other commands off until the file is closed.

    Raises:
        InputError: another one has it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{output}: another command is making it; wait for that one") from None


def resumed(file: BinaryIO, identity: str, path: Path, chunk: int = 1) -> int:
    """How many lines earlier tries have left; those of an unfinished chunk, and half a line, are cut off.

    Args:
        file: opened to append and read; what follows is appended.
        identity: digest of all that shapes the lines.
        path: the file's, for the message.
        chunk: lines that are made together.

    Raises:
        InputError: it was begun with another identity.
    """
    file.seek(0)
    head = json_line({"of": identity})
    first = file.readline()
    if not first.endswith(b"\n"):  # nothing, or a first line that was cut short
        file.truncate(0)
        file.write(head)
        return 0
    if first != head:
        raise InputError(f"{path}: was begun with another input, model or settings; delete it, or give those")
    whole, end, place = 0, file.tell(), file.tell()
    for number, line in enumerate(file, 1):
        if not line.endswith(b"\n"):
            break
        place += len(line)
        if number % chunk == 0:
            whole, end = number, place
    file.truncate(end)
    return whole
