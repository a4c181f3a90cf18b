"""What becomes of a file when disks, people and other versions have been at it."""

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from hypothesis import strategies as st

import siloweave

JUNK = (None, True, -1, 0, 1e308, float("nan"), float("inf"), 10**400, 2**53, "", "x", "\ud800", "\x1b[2J\n", [], {})
JUNK += ([[1]], {"a": {}}, 99)
LINES = (b"\xff\xfe\x00", b"{", b"[]", b"null", b'"x"', b'{"stage": 1}', b"[" * 5000, b'{"event": "end"}', b"\r\n\n")

KINDS = st.one_of(
    st.sampled_from(("empty", "binary", "folder", "loop", "missing", "pipe")).map(lambda kind: (kind, 0, None)),
    st.tuples(st.just("cut"), st.integers(0, 10**6), st.none()),
    st.tuples(st.just("flip"), st.integers(0, 10**6), st.integers(1, 255)),
    st.tuples(st.just("insert"), st.integers(0, 10**6), st.sampled_from(LINES)),
    st.tuples(st.just("value"), st.integers(0, 10**6), st.sampled_from(JUNK)),
    st.tuples(st.just("value"), st.integers(0, 10**6), st.sampled_from(JUNK)),
    st.tuples(st.just("drop"), st.integers(0, 10**6), st.none()),
)


@contextlib.contextmanager
def damaged(path: Path, kind: str, at: int, with_: object) -> Iterator[None]:
    """A file that is damaged for a while."""
    before = path.read_bytes()
    try:
        _damage(path, before, kind, at, with_)
        yield
    finally:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.write_bytes(before)


def _damage(path: Path, before: bytes, kind: str, at: int, with_: object) -> None:
    whole = {"empty": b"", "binary": bytes(range(256)) * 8}
    if kind in whole:
        path.write_bytes(whole[kind])
    elif kind in ("folder", "loop", "missing", "pipe"):
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        if kind == "folder":
            path.mkdir()
        elif kind == "loop":
            path.symlink_to(path.name)
    elif kind == "cut":
        path.write_bytes(before[: at % len(before)])
    elif kind == "flip":
        at %= len(before)
        path.write_bytes(before[:at] + bytes([before[at] ^ with_]) + before[at + 1 :])
    elif kind == "insert":
        lines = before.split(b"\n")
        lines.insert(at % len(lines), with_)
        path.write_bytes(b"\n".join(lines))
    else:
        path.write_bytes(_changed(before, at, with_, drop=kind == "drop"))


def _changed(before: bytes, at: int, value: object, *, drop: bool) -> bytes:
    """A JSON document, or one line of a file of them, with one value changed or left out."""
    lines = [before] if _is_json(before) else before.split(b"\n")
    chosen = at % len(lines)
    if not _is_json(lines[chosen]):
        return before
    document = json.loads(lines[chosen])
    places = list(_places(document))
    if not places:
        return json.dumps(value).encode()
    parent, key = places[at // 7 % len(places)]
    if drop:
        del parent[key]
    else:
        parent[key] = value
    lines[chosen] = json.dumps(document).encode()
    return b"\n".join(lines)


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except ValueError:
        return False
    return True


def _places(value: object) -> Iterator[tuple[object, object]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield value, key
        yield from _places(child)


def command(*arguments: str) -> tuple[int, str, str]:
    """Exit status, output and errors of a command, in this process."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["siloweave", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            siloweave.main()
        status = 0
    except SystemExit as ended:
        status = ended.code or 0
    finally:
        sys.argv = before
    return status, out.getvalue(), err.getvalue()


def is_clear(status: int, err: str) -> bool:
    """Whether a command ended as commands do: a status of ours, one line where it failed, and no stray exception."""
    lines = err.splitlines()
    return status == 0 or (status in (1, 2, 3) and len(lines) == 1 and "--debug shows where" not in err)
