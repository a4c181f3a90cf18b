"""A silo's logs where the disk fills, a kill comes, or they grow: a line is whole or an error, and nothing is lost."""

import contextlib
import json
import logging
import os
import resource
import subprocess
import time

import pytest

from configs.errors import PolicyRefusal, SiloweaveError
from federated.silo import line_file
from federated.silo.line_file import LineFile, PrivateLog
from federated.silo.traffic_log import TrafficLog, UnloggedError


@contextlib.contextmanager
def largest_file(size_bytes):
    """The system lets no file grow beyond this; what fits of a write is written, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


MANY = 10**6


def entries(folder):
    return [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]


def test_a_line_that_does_not_fit_is_an_error_and_leaves_no_trace(tmp_path):
    """Before: no error, the reply left, 40 of its line's 133 bytes were there, and the next followed on it."""
    log = TrafficLog(tmp_path)
    log.leaves(b"one")
    size = (tmp_path / "audit.jsonl").stat().st_size
    with largest_file(size + 40), pytest.raises(UnloggedError, match=r"audit\.jsonl: could not be written"):
        log.leaves(b"two")
    assert (tmp_path / "audit.jsonl").stat().st_size == size
    log.leaves(b"three")
    assert [entry["direction"] for entry in entries(tmp_path)] == ["out", "out"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a file system")
def test_on_a_real_full_disk_every_line_is_whole(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=True)
    try:
        log, written = TrafficLog(disk), 0
        with pytest.raises(UnloggedError, match="No space left"):
            for written in range(10_000):
                log.leaves(b"x" * written)
        assert len(entries(disk)) == written > 100
        (disk / "audit.jsonl").write_text("")  # somebody makes room
        log.leaves(b"")
        assert len(entries(disk)) == 1
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_line_that_a_kill_cut_short_stays_a_line_of_its_own(tmp_path):
    """Before: the next line was added to it, and a request after a restart was lost from the day's count."""
    TrafficLog(tmp_path).accepted(b"", "net", MANY)
    with (tmp_path / "audit.jsonl").open("a") as file:
        file.write('{"time": 17')
    assert TrafficLog(tmp_path).accepted(b"", "net", MANY) == 2
    lines = (tmp_path / "audit.jsonl").read_text().splitlines()
    assert (len(lines), lines[1]) == (3, '{"time": 17')
    assert TrafficLog(tmp_path).accepted(b"", "net", MANY) == 3


@pytest.fixture
def small(monkeypatch):
    """Files that are full after a few lines."""
    monkeypatch.setattr(line_file, "LARGEST_BYTES", 2000)
    monkeypatch.setattr(line_file, "KEPT", 3)


def test_files_rotate_and_a_restart_goes_on_counting(tmp_path, small):
    log = TrafficLog(tmp_path)
    for number in range(1, 101):
        assert log.accepted(b"", "net", MANY, run="x" * 100) == number
        if number % 30 == 0:
            log = TrafficLog(tmp_path)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2", "audit.jsonl.3"]
    assert all(file.stat().st_size <= 2000 and file.stat().st_mode & 0o777 == 0o600 for file in files)
    for number in (1, 2, 3):
        (tmp_path / f"audit.jsonl.{number}").unlink()  # put elsewhere
    assert TrafficLog(tmp_path).accepted(b"", "net", MANY) == 101


def test_one_more_than_a_coordinator_may_send_writes_no_line_among_the_accepted(tmp_path):
    """Before: one signed request that was sent over and over pushed out what told of all others."""
    log = TrafficLog(tmp_path)
    for number in range(1, 4):
        assert log.accepted(b"request", "net", 3) == number
    before = (tmp_path / "audit.jsonl").read_bytes()
    for _ in range(50):
        with pytest.raises(PolicyRefusal, match="max_requests_per_day: asked 4, allowed 3"):
            log.accepted(b"request", "net", 3)
    assert (tmp_path / "audit.jsonl").read_bytes() == before
    assert log.accepted(b"request", "other", 3) == 1


def test_strangers_push_no_line_of_a_real_request_away(tmp_path, small):
    """Before: one file for all, and 272 MiB of anybody's nonsense were enough."""
    log = TrafficLog(tmp_path)
    log.accepted(b"request", "net", MANY, run="real")
    log.leaves(b"reply", outcome="answered")
    before = (tmp_path / "audit.jsonl").read_bytes()
    for number in range(50):
        log.turned_away(b"x" * number, b"refusal", outcome="refused: coordinator")
    assert (tmp_path / "audit.jsonl").read_bytes() == before
    assert len(list(tmp_path.glob("audit.jsonl*"))) == 1
    files = [tmp_path / "strangers.jsonl", *(tmp_path / f"strangers.jsonl.{number}" for number in (1, 2, 3))]
    assert all(file.stat().st_size <= 2000 and file.stat().st_mode & 0o777 == 0o600 for file in files)
    newest = [json.loads(line) for line in files[0].read_text().splitlines()]
    assert [(line["direction"], line["bytes"]) for line in newest[-2:]] == [("in", 49), ("out", 7)]
    assert TrafficLog(tmp_path).accepted(b"", "net", MANY) == 2


def test_requests_count_for_a_day_and_not_longer(tmp_path, small, monkeypatch):
    now = [1_800_000_000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    log = TrafficLog(tmp_path)
    for _ in range(50):
        log.accepted(b"", "net", MANY, run="x" * 100)
        now[0] += 60
    now[0] = 1_800_000_000.0 + 24 * 3600 - 1
    assert log.accepted(b"", "net", MANY) == 51
    now[0] += 25 * 60
    expected = log.accepted(b"", "net", MANY)
    assert expected == 28  # 24 minutes have passed as a whole
    assert TrafficLog(tmp_path).accepted(b"", "net", MANY) == expected + 1


def test_each_coordinator_has_a_count_of_its_own(tmp_path, small):
    """Before: one count for all, and a hostile coordinator's requests used up the others' day."""
    log = TrafficLog(tmp_path)
    for number in range(1, 41):
        assert log.accepted(b"", "hostile", MANY, run="x" * 100) == number
    assert log.accepted(b"", "honest", MANY) == 1
    for number in (1, 2, 3):
        (tmp_path / f"audit.jsonl.{number}").unlink()  # the head alone tells of them
    log = TrafficLog(tmp_path)
    assert (log.accepted(b"", "honest", MANY), log.accepted(b"", "hostile", MANY)) == (2, 41)


def test_a_head_that_tells_no_coordinators_apart_counts_against_each(tmp_path):
    """As versions before wrote it: nothing is forgotten on the day of an update."""
    minute = int(time.time() // 60)
    head = {"time": time.time(), "direction": "rotated", "accepted": {str(minute): 7, str(minute - 9): 2, "0": 5}}
    line = {"time": time.time(), "direction": "accepted", "coordinator": "one"}
    (tmp_path / "audit.jsonl").write_text(json.dumps(head) + "\n" + json.dumps(line) + "\n")
    log = TrafficLog(tmp_path)
    assert (log.accepted(b"", "one", MANY), log.accepted(b"", "other", MANY), log.accepted(b"", "one", MANY)) == (
        11,
        10,
        12,
    )


def test_a_full_disk_loses_no_old_file(tmp_path, small):
    log = TrafficLog(tmp_path)
    for _ in range(40):
        log.accepted(b"", "net", MANY, run="x" * 100)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with largest_file(20):
        for _ in range(10):
            with pytest.raises(UnloggedError):
                log.accepted(b"", "net", MANY, run="x" * 2000)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


class KilledError(BaseException):
    """A kill, which nothing catches."""


@pytest.mark.parametrize("steps", range(6))
@pytest.mark.parametrize("rotations", [0, 1, 5], ids=["first rotation", "second", "later"])
def test_a_kill_between_the_steps_of_a_rotation_loses_nothing(tmp_path, small, monkeypatch, steps, rotations):
    """Renames and the link are the steps; the kill comes after so many of them."""
    log, left, counted = TrafficLog(tmp_path), 10**6, 0
    while len(list(tmp_path.glob("audit*"))) < min(1 + rotations, 4):
        counted = log.accepted(b"", "net", MANY, run="x" * 100)

    def step(call):
        def counting(*arguments):
            nonlocal left
            left -= 1
            if left < 0:
                raise KilledError
            return call(*arguments)

        return counting

    with monkeypatch.context() as patched:
        patched.setattr(line_file.Path, "replace", step(line_file.Path.replace))
        patched.setattr(os, "link", step(os.link))
        left = steps
        with contextlib.suppress(KilledError):
            for _ in range(15):  # rotates twice, and not thrice
                counted = log.accepted(b"", "net", MANY, run="x" * 100)
    log = TrafficLog(tmp_path)
    assert log.accepted(b"", "net", MANY) == counted + 1
    for _ in range(30):
        counted = log.accepted(b"", "net", MANY, run="x" * 100)
    assert TrafficLog(tmp_path).accepted(b"", "net", MANY) == counted + 1


def test_silo_log_escapes_what_strangers_say_rotates_and_fails_in_silence(tmp_path, small, capsys):
    """Before: the words of an exception reached the steward's terminal raw, and could begin a line like a refusal."""
    logger = logging.Logger("test")
    logger.addHandler(PrivateLog(tmp_path / "silo.log"))
    logger.warning("refused %s", "\x1b[2J\u202e\n2026-01-01 00:00:00,000 WARNING refused forged")
    lines = (tmp_path / "silo.log").read_text().split("\n")
    assert lines[0].endswith(r"WARNING refused \x1b[2J\u202e")
    assert lines[1].startswith("    2026-01-01")
    for _ in range(60):
        logger.warning("x" * 200)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["silo.log", *(f"silo.log.{n}" for n in (1, 2, 3))]
    with largest_file(20):
        logger.warning("secret")
    assert capsys.readouterr() == ("", "")


def test_an_error_of_the_disk_is_one_line(tmp_path):
    (tmp_path / "log").mkdir()
    with pytest.raises(SiloweaveError, match=r"log: could not be written \(Is a directory\)"):
        LineFile(tmp_path / "log").append("x")
