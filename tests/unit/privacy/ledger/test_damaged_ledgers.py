"""`siloweave ledger show` of a damaged ledger: what can be read, where it breaks, and never that it is sound."""

import json
import shutil

import pytest
from damage import KINDS, command, damaged, is_clear
from hypothesis import given, settings

from privacy.ledger.chain import Budget
from privacy.ledger.file import export
from privacy.ledger.ledger import Ledger
from privacy.plan import PlanTerms

PLAN = PlanTerms(
    sampling_rate=0.02, max_grad_norm=1.0, noise_multiplier=0.9, rounds=3, steps_per_round=4, delta=1e-5
).bind(5000)


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ledger") / "north"
    ledger = Ledger.open(folder, "north", "ward", Budget(20.0, 3e-5))
    ledger.reserve("run-1", PLAN)
    for number in (1, 2, 3):
        charge = ledger.charge("run-1", f"round-{number}", "aa" * 32, number)
        ledger.release(charge.number, "run-1", b"the reply")
    ledger.close_file()
    export(folder / "ledger.sqlite", folder / "out.jsonl")
    return folder


def shown(path):
    return command("ledger", "show", str(path))


@pytest.mark.parametrize("name", ["ledger.sqlite", "out.jsonl"])
def test_whatever_is_damaged_there_is_one_line_and_no_word_of_soundness(state, name):
    status, sound, _ = shown(state / name)
    assert (status, "left: epsilon" in sound) == (0, True)

    @settings(max_examples=40, deadline=None)
    @given(KINDS)
    def check(kind):
        with damaged(state / name, *kind):
            status, out, err = shown(state / name)
            assert is_clear(status, err), (status, err)
            if status == 0:  # a change that says the same: bytes that SQLite doesn't use, a blank of JSON
                assert out == sound
            else:
                assert "left:" not in out
                assert str(state / name) in err
                proven = [line for line in out.splitlines() if not line.startswith("not proven: ")]
                assert proven == sound.splitlines()[: len(proven)]
            verified = command("ledger", "verify", str(state / name))
            assert is_clear(verified[0], verified[2]), verified
            assert bool(verified[0]) >= bool(status), "show refuses what verify takes for sound"
            as_json = command("ledger", "show", str(state / name), "--json")
            assert as_json[0] == status
            (document,) = map(json.loads, as_json[1].splitlines())
            assert status == 0 or document.get("sound", False) is False

    check()


@pytest.mark.parametrize("at", [0, 2, 4])
def test_entries_before_a_break_are_shown_and_those_after_it_are_not_proven(state, tmp_path, at):
    lines = (state / "out.jsonl").read_bytes().splitlines()
    lines[at] = lines[at][:40]
    (tmp_path / "cut.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    status, out, err = shown(tmp_path / "cut.jsonl")
    assert (status, err.count("\n")) == (2, 1)
    assert f"entry {at + 1} does not hold or can't be read" in err
    assert f"line {at + 1} is not JSON" in err
    rows = out.splitlines()
    assert len(rows) == len(lines)
    assert [row.startswith("not proven: ") for row in rows] == [number >= at for number in range(len(lines))]
    assert rows[at] == "not proven: an entry that can't be read"


def test_a_ledger_that_breaks_off_shows_what_is_before_the_damage(state, tmp_path):
    copy = tmp_path / "ledger.sqlite"
    shutil.copyfile(state / "ledger.sqlite", copy)
    content = bytearray(copy.read_bytes())
    pages = [at for at in range(0, len(content), 4096) if b'"kind":"charge"' in content[at : at + 4096]]
    content[pages[-1] : pages[-1] + 4096] = bytes(4096)
    copy.write_bytes(content)
    status, out, err = shown(copy)
    assert (status, err.count("\n")) == (2, 1)
    assert "left:" not in out
    assert str(copy) in err


def test_a_newer_ledger_is_refused_by_its_version(state, tmp_path):
    import sqlite3

    copy = tmp_path / "ledger.sqlite"
    shutil.copyfile(state / "ledger.sqlite", copy)
    with sqlite3.connect(copy) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    status, out, err = shown(copy)
    assert (status, out) == (2, "")
    assert "version 99 is newer than this Siloweave reads; upgrade Siloweave" in err
