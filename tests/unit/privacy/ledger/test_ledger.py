"""The ledger: never a lost spend without a refusal, never a double one."""

import json
import multiprocessing
import re
import signal
import sqlite3
import subprocess
import sys

import pytest

from configs.errors import InputError, PolicyRefusal, SiloweaveError
from privacy.ledger import chain, kept_replies
from privacy.ledger.chain import Budget, left, verify_entries
from privacy.ledger.file import read_only
from privacy.ledger.ledger import Ledger
from privacy.ledger.replay import replay
from privacy.ledger.statements import Receipt
from privacy.plan import PlanTerms

BUDGET = Budget(20.0, 3e-5)
REQUEST = PlanTerms(
    sampling_rate=0.02, max_grad_norm=1.0, noise_multiplier=0.5, rounds=3, steps_per_round=4, delta=1e-5
)
PLAN = REQUEST.bind(5000)
DIGEST, OTHER = "aa" * 32, "bb" * 32


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger.open(tmp_path, "north", "hospital-1", BUDGET)
    yield ledger
    ledger.close_file()


def reopen(tmp_path):
    return Ledger.open(tmp_path, "north", "hospital-1", BUDGET)


def bodies(ledger):
    return verify_entries(ledger.entries(), "test")


def test_a_run_reserves_its_whole_schedule_once(ledger):
    first = ledger.reserve("run-1", PLAN)
    assert first.epsilon_reserved == pytest.approx(REQUEST.epsilon)
    assert first.epsilon_left == pytest.approx(20 - REQUEST.epsilon)
    assert ledger.reserve("run-1", PLAN) == first


def test_another_plan_under_the_same_run_is_refused(ledger):
    ledger.reserve("run-1", PLAN)
    with pytest.raises(PolicyRefusal, match="reserved another plan"):
        ledger.reserve("run-1", REQUEST.model_copy(update={"noise_multiplier": 0.6}).bind(5000))


def test_reservations_add_up_to_the_budget_and_no_further(ledger):
    affordable = int(20 // REQUEST.epsilon)
    for number in range(affordable):
        ledger.reserve(f"run-{number}", PLAN)
    with pytest.raises(PolicyRefusal, match=r"needs epsilon .* left; lower privacy.epsilon") as caught:
        ledger.reserve("one-more", PLAN)
    assert caught.value.rule == "budget_epsilon"
    assert ledger.left().epsilon == pytest.approx(20 - affordable * REQUEST.epsilon)


def test_delta_is_a_budget_too(tmp_path):
    ledger = Ledger.open(tmp_path, "north", "hospital-1", Budget(1000.0, 2e-5))
    ledger.reserve("run-1", PLAN)
    ledger.reserve("run-2", PLAN)
    with pytest.raises(PolicyRefusal, match="needs delta"):
        ledger.reserve("run-3", PLAN)


def test_a_receipt_never_grows_beyond_what_is_read(tmp_path):
    tiny = REQUEST.model_copy(update={"noise_multiplier": 30.0, "rounds": 1, "steps_per_round": 1, "delta": 1e-15})
    ledger = Ledger.open(tmp_path, "north", "hospital-1", Budget(1e4, 3e-5))
    ledger.reserve("run-0", tiny.bind(5000))
    same = {
        name: value for name, value in ledger.reservation("run-0").items() if name not in ("kind", "number", "time")
    }
    with ledger.journal.transaction():
        for number in range(1, 4999):
            ledger.journal.append("reserve", **{**same, "run": f"run-{number}"})
    last = ledger.reserve("run-4999", tiny.bind(5000))
    assert Receipt.from_bytes(last.to_bytes(), "test") == last
    assert len(last.spends) == 5000
    with pytest.raises(PolicyRefusal, match="takes no more") as caught:
        ledger.reserve("run-5000", tiny.bind(5000))
    assert caught.value.rule == "max_reservations"
    assert ledger.charge("run-4999", "round-1", DIGEST, 1).seed
    ledger.close_file()


def test_a_receipt_is_of_one_instant(ledger, tmp_path, monkeypatch):
    other, read = reopen(tmp_path), chain.read_entries
    appended = []

    def reads(connection, first=1):
        found = read(connection, first)
        if not appended:
            appended.append("run-1")
            other.reserve("run-1", PLAN)
        return found

    monkeypatch.setattr(chain, "read_entries", reads)
    torn = ledger.receipt("run-1")
    assert (torn.number, torn.epsilon_left, torn.plan_digest, torn.spends) == (1, 20.0, "", ())
    other.close_file()


def test_an_entry_is_read_once_by_whoever_asks(ledger, tmp_path):
    """Before: a training request read and decoded the whole ledger eleven times."""
    ledger.reserve("run-1", PLAN)
    read = []
    ledger.journal.db.set_trace_callback(read.append)
    ledger.accept(ledger.receipt("run-1"))
    charge = ledger.charge("run-1", "round-1", DIGEST, 1)
    ledger.release(charge.number, "run-1", b"reply")
    looks = [re.search(r"number >= (\d+)", statement) for statement in read if "FROM entries" in statement]
    assert {int(look[1]) for look in looks if look} <= {2, 3, 4}  # the last that was known, and what follows it
    other = reopen(tmp_path)
    other.charge("run-1", "round-2", OTHER, 2)  # another process
    assert ledger.entries() == other.entries() == read_only(ledger.path)
    other.close_file()


def test_entries_that_are_not_there_any_more_are_forgotten(ledger):
    ledger.reserve("run-1", PLAN)

    def dies(_):
        assert len(ledger.entries()) == 3  # the charge is among them
        raise RuntimeError

    ledger._seed_source = dies
    with pytest.raises(RuntimeError):
        ledger.charge("run-1", "round-1", DIGEST, 1)
    assert ledger.entries() == read_only(ledger.path)
    assert len(ledger.entries()) == 2
    ledger.journal.db.execute("DROP TRIGGER entries_stay")  # the file put back under a silo that has it open
    ledger.journal.db.execute("DELETE FROM entries WHERE number = 2")
    assert len(ledger.entries()) == 1
    with pytest.raises(PolicyRefusal, match="rollback"):
        ledger.reserve("run-2", PLAN)


def test_a_request_is_charged_once_and_answered_alike(ledger):
    ledger.reserve("run-1", PLAN)
    first = ledger.charge("run-1", "round-1", DIGEST, 1)
    again = ledger.charge("run-1", "round-1", DIGEST, 1)
    assert (again.number, again.seed) == (first.number, first.seed)
    assert ledger.release(first.number, "run-1", b"reply") == b"reply"
    assert ledger.release(first.number, "run-1", b"a later answer") == b"reply"
    stored = ledger.charge("run-1", "round-1", DIGEST, 1)
    assert (stored.reply, stored.seed) == (b"reply", None)
    assert sum(body["kind"] == "charge" for body in bodies(ledger)) == 1


def test_every_charge_has_a_fresh_seed(ledger):
    ledger.reserve("run-1", PLAN)
    seeds = {ledger.charge("run-1", f"round-{i}", DIGEST, i).seed for i in (1, 2, 3)}
    assert len(seeds) == 3
    assert all(len(seed) == 32 for seed in seeds)


def test_the_seed_is_nowhere_in_the_files_after_the_release(ledger, tmp_path):
    ledger.reserve("run-1", PLAN)
    charge = ledger.charge("run-1", "round-1", DIGEST, 1)
    assert any(charge.seed in path.read_bytes() for path in tmp_path.iterdir())
    ledger.release(charge.number, "run-1", b"reply")
    assert not any(charge.seed in path.read_bytes() for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (("run-2", "round-1", DIGEST, 1), "reservation"),
        (("run-1", "done", OTHER, 1), "request_id"),
        (("run-1", "new-id", DIGEST, 1), "schedule"),
        (("run-1", "round-4", DIGEST, 4), "schedule"),
        (("run-1", "round-0", DIGEST, 0), "schedule"),
    ],
)
def test_charges_outside_the_reservation_are_refused(ledger, arguments, rule):
    ledger.reserve("run-1", PLAN)
    ledger.charge("run-1", "done", DIGEST, 1)
    before = ledger.entries()
    with pytest.raises(PolicyRefusal) as caught:
        ledger.charge(*arguments)
    assert caught.value.rule == rule
    assert ledger.entries() == before


def test_a_closed_run_keeps_its_spend_and_gives_nothing_more(ledger):
    ledger.reserve("run-1", PLAN)
    charge = ledger.charge("run-1", "round-1", DIGEST, 1)
    ledger.release(charge.number, "run-1", b"reply")
    pending = ledger.charge("run-1", "round-2", DIGEST, 2)
    receipt = ledger.close("run-1")
    assert receipt.epsilon_left == pytest.approx(20 - REQUEST.epsilon)
    for request, number in (("round-1", 1), ("round-2", 2), ("round-3", 3)):
        with pytest.raises(PolicyRefusal, match="closed"):
            ledger.charge("run-1", request, DIGEST, number)
    with pytest.raises(PolicyRefusal, match="is closed"):
        ledger.release(pending.number, "run-1", b"late")
    ledger.close("run-1")
    assert sum(body["kind"] == "close" for body in bodies(ledger)) == 1


LONG = REQUEST.model_copy(update={"rounds": 12, "noise_multiplier": 0.9}).bind(5000)


def released(ledger, number, reply=b"reply", run="run-1"):
    charge = ledger.charge(run, f"round-{number}", DIGEST, number)
    return ledger.release(charge.number, run, reply)


@pytest.mark.parametrize(("size", "kept"), [(2**30, 7), (36, 5), (0, 4)])
def test_the_newest_replies_of_a_run_stay_and_one_that_is_gone_is_refused_for_good(ledger, monkeypatch, size, kept):
    """At least two rounds and their evaluations, whatever their size; others while all together are small."""
    monkeypatch.setattr(kept_replies, "KEPT_BYTES", size)
    ledger.reserve("run-1", LONG)
    ledger.reserve("run-2", REQUEST.model_copy(update={"noise_multiplier": 2.0}).bind(5000))
    released(ledger, 1, run="run-2")
    for number in range(1, 8):
        released(ledger, number, b"reply %d" % (number % 10))
        released(ledger, number, b"not this")  # asked for again at once
    before = bodies(ledger)
    for number in range(1, 8):
        if number > 7 - kept:
            assert ledger.charge("run-1", f"round-{number}", DIGEST, number).reply == b"reply %d" % number
            continue
        for ask in (ledger.charge, ledger.reply):  # the same request again, another one, another id
            for request, digest, rule in (
                (f"round-{number}", DIGEST, "reply"),
                (f"round-{number}", OTHER, "request_id"),
                ("another", DIGEST, "schedule"),
            ):
                with pytest.raises(PolicyRefusal) as caught:
                    ask("run-1", request, digest, number)
                assert caught.value.rule == rule
        charge = next(
            body for body in before if body["kind"] == "charge" and (body["run"], body["round"]) == ("run-1", number)
        )
        with pytest.raises(PolicyRefusal, match="never computed again"):  # a process that was slow to answer
            ledger.release(charge["number"], "run-1", b"late")
    assert ledger.charge("run-2", "round-1", DIGEST, 1).reply == b"reply"  # another run's are its own
    assert bodies(ledger) == before
    assert ledger.journal.db.execute("SELECT count(*) FROM seeds").fetchone() == (0,)
    replay(before, "test")
    ledger.close("run-1")
    with pytest.raises(PolicyRefusal, match="is closed"):
        ledger.charge("run-1", "round-1", DIGEST, 1)


def test_a_reply_that_was_released_late_is_among_the_newest(ledger, monkeypatch):
    monkeypatch.setattr(kept_replies, "KEPT_BYTES", 0)
    ledger.reserve("run-1", LONG)
    late = ledger.charge("run-1", "round-1", DIGEST, 1)  # and its process is killed
    for number in range(2, 9):
        released(ledger, number)
    assert ledger.release(late.number, "run-1", b"late") == b"late"
    assert ledger.charge("run-1", "round-1", DIGEST, 1).reply == b"late"


def test_a_long_runs_replies_do_not_fill_the_disk(ledger, tmp_path, monkeypatch):
    """Before: 12 of 12 stayed until the run was closed."""
    monkeypatch.setattr(kept_replies, "KEPT_BYTES", 2**20)
    ledger.reserve("run-1", LONG)
    for number in range(1, 13):
        released(ledger, number, bytes([number]) * 2**20)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 6 * 2**20
    assert not any(b"\1" * 2**10 in path.read_bytes() for path in tmp_path.iterdir())


def test_a_changed_policy_is_an_entry(ledger, tmp_path):
    ledger.reserve("run-1", PLAN)
    raised = Ledger.open(tmp_path, "north", "hospital-1", Budget(50.0, 3e-5))
    assert raised.left().epsilon == pytest.approx(50 - REQUEST.epsilon)
    assert [body["kind"] for body in bodies(raised)] == ["open", "reserve", "policy"]


def test_a_ledger_belongs_to_one_silo_and_dataset(ledger, tmp_path):
    with pytest.raises(InputError, match="a state_dir of its own"):
        Ledger.open(tmp_path, "north", "hospital-2", BUDGET)


def test_nobody_else_can_read_a_seed(ledger, tmp_path):
    ledger.reserve("run-1", PLAN)
    ledger.charge("run-1", "round-1", DIGEST, 1)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"ledger.sqlite", "ledger.sqlite-wal", "silo.key"} <= names
    assert {oct(path.stat().st_mode)[-3:] for path in tmp_path.iterdir()} == {"600"}
    assert oct(tmp_path.stat().st_mode)[-3:] == "700"


def test_a_lost_key_never_spoils_a_sound_ledger(ledger, tmp_path):
    ledger.reserve("run-1", PLAN)
    ledger.close_file()
    key = (tmp_path / "silo.key").read_bytes()
    (tmp_path / "silo.key").unlink()
    with pytest.raises(InputError, match="the key that signed"):
        reopen(tmp_path)
    (tmp_path / "silo.key").write_bytes(bytes(32))
    with pytest.raises(InputError, match="mode 644 lets others read it"):
        reopen(tmp_path)
    (tmp_path / "silo.key").chmod(0o600)
    with pytest.raises(InputError, match="does not hold"):
        Ledger.open(tmp_path, "north", "hospital-1", Budget(99.0, 3e-5))
    (tmp_path / "silo.key").write_bytes(key)
    assert [body["kind"] for body in bodies(reopen(tmp_path))] == ["open", "reserve"]


def test_a_seed_that_cannot_be_overwritten_is_not_released(ledger, tmp_path, monkeypatch):
    monkeypatch.setattr("privacy.ledger.file.LOCK_TIMEOUT_S", 1)
    held = reopen(tmp_path)
    held.reserve("run-1", PLAN)
    charge = held.charge("run-1", "round-1", DIGEST, 1)
    reader = sqlite3.connect(tmp_path / "ledger.sqlite")
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM entries").fetchall()
    with pytest.raises(SiloweaveError, match="another program reads it"):
        held.release(charge.number, "run-1", b"reply")
    assert any(charge.seed in path.read_bytes() for path in tmp_path.iterdir())
    for again in (
        lambda: held.charge("run-1", "round-1", DIGEST, 1),
        lambda: held.release(charge.number, "run-1", b"reply"),
    ):
        with pytest.raises(SiloweaveError, match="another program reads it"):
            again()
    reader.close()
    assert reopen(tmp_path).charge("run-1", "round-1", DIGEST, 1).reply == b"reply"
    assert not any(charge.seed in path.read_bytes() for path in tmp_path.iterdir())


def test_looking_changes_nothing(ledger, tmp_path):
    ledger.reserve("run-1", PLAN)
    ledger.close_file()
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    assert [json.loads(entry["body"])["kind"] for entry in read_only(tmp_path / "ledger.sqlite")] == ["open", "reserve"]
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()} == before


def tamper(tmp_path, statement):
    connection = sqlite3.connect(tmp_path / "ledger.sqlite")
    connection.executescript(f"DROP TRIGGER entries_keep; DROP TRIGGER entries_stay; {statement}")
    connection.close()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET body = replace(body, '\"delta\":1e-05', '\"delta\":1e-06') WHERE number = 2",
        "DELETE FROM entries WHERE number = 2",
        "UPDATE entries SET signature = replace(signature, 'a', 'b') WHERE number = 3",
    ],
)
def test_an_edited_row_is_noticed(ledger, tmp_path, statement):
    ledger.reserve("run-1", PLAN)
    ledger.charge("run-1", "round-1", DIGEST, 1)
    ledger.close_file()
    tamper(tmp_path, statement)
    with pytest.raises(InputError, match="does not hold"):
        reopen(tmp_path)


def test_rows_cannot_be_changed_by_accident(ledger):
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        ledger.journal.db.execute("DELETE FROM entries")


def test_damaged_and_newer_files_are_refused(ledger, tmp_path):
    ledger.journal.db.execute("PRAGMA user_version = 99")
    ledger.close_file()
    with pytest.raises(InputError, match="version 99 is newer"):
        reopen(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "silo.key").write_bytes(bytes(32))
    (tmp_path / "other" / "silo.key").chmod(0o600)
    (tmp_path / "other" / "ledger.sqlite").write_bytes(b"not a database, though long enough to be read as one" * 30)
    with pytest.raises(InputError, match="not a sound ledger"):
        Ledger.open(tmp_path / "other", "north", "hospital-1", BUDGET)


CHILD = """
import os, signal, sys
from pathlib import Path
from privacy.ledger import journal as journal_module
from privacy.ledger import kept_replies
from privacy.ledger.chain import Budget
from privacy.ledger.file import read_only
from privacy.ledger.ledger import Ledger
from privacy.plan import PlanTerms
plan = PlanTerms(**{plan!r}).bind(5000)
ledger = Ledger.open(Path(sys.argv[1]), "north", "hospital-1", Budget(20.0, 3e-5))
ledger.reserve("run-1", plan)
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
point = sys.argv[2]
if point == "inside-charge":
    ledger._seed_source = lambda _: die()
charge = ledger.charge("run-1", "round-1", "aa" * 32, 1)
if point == "after-charge":
    die()
if point == "inside-release":
    ledger.journal.append = lambda *a, **k: die()
ledger.release(charge.number, "run-1", charge.seed)
if point == "after-release":
    die()
""".replace("{plan!r}", repr(REQUEST.model_dump()))


@pytest.mark.parametrize(
    ("point", "charges", "has_reply"),
    [("inside-charge", 0, False), ("after-charge", 1, False), ("inside-release", 1, False), ("after-release", 1, True)],
)
def test_kill_9_between_charge_and_release(tmp_path, point, charges, has_reply):
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path), point], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    ledger = reopen(tmp_path)
    assert sum(body["kind"] == "charge" for body in bodies(ledger)) == charges
    seeds = [row[0] for row in ledger.journal.db.execute("SELECT seed FROM seeds")]
    again = ledger.charge("run-1", "round-1", DIGEST, 1)
    assert sum(body["kind"] == "charge" for body in bodies(ledger)) == 1
    assert (again.reply is not None) == has_reply
    if charges and not has_reply:
        assert [again.seed] == seeds  # the same noise again, never a second draw over the same request


def test_two_processes_at_once_spend_once(tmp_path):
    script = CHILD.replace('reserve("run-1"', 'reserve("run-" + sys.argv[3]').replace(
        'charge("run-1"', 'charge("run-" + sys.argv[3]'
    )
    script = script.replace('release(charge.number, "run-1"', 'release(charge.number, "run-" + sys.argv[3]')
    runs = ["1", "1", "2", "2"]
    children = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path), "never", run], stderr=subprocess.PIPE, text=True)
        for run in runs
    ]
    for child in children:
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors
    found = bodies(reopen(tmp_path))
    kinds = [body["kind"] for body in found]
    assert (kinds.count("reserve"), kinds.count("charge"), kinds.count("release")) == (2, 2, 2)
    assert left(found).epsilon == pytest.approx(20 - 2 * REQUEST.epsilon)


def opens_and_scrubs(folder, together):
    together.wait()
    ledger = reopen(folder)
    together.wait()
    for _ in range(100):  # SQLite's own waiting leaves out both the change to a write-ahead log and its emptying
        ledger.journal.scrub()
        ledger.accept(None)


def test_processes_that_open_and_scrub_at_once_wait_for_each_other(tmp_path):
    context = multiprocessing.get_context("fork")
    together = context.Barrier(4, timeout=300)
    children = [context.Process(target=opens_and_scrubs, args=(tmp_path, together)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout=120)
    assert [child.exitcode for child in children] == [0] * 4


def test_a_full_disk_refuses_and_leaves_the_ledger_sound(tmp_path):
    reopen(tmp_path).close_file()
    size = max(path.stat().st_size for path in tmp_path.iterdir())
    script = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({size + 40_000}, {size + 40_000}))
""" + CHILD.replace("charge.seed)", "b'r' * 200_000)")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), "never"], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 1
    assert "could not be written" in done.stderr
    ledger = reopen(tmp_path)
    assert [body["kind"] for body in bodies(ledger)] == ["open", "reserve", "charge"]
    assert ledger.charge("run-1", "round-1", DIGEST, 1).seed is not None


def test_replay_checks_every_claim(ledger):
    ledger.reserve("run-1", PLAN)
    ledger.charge("run-1", "round-1", DIGEST, 1)
    found = bodies(ledger)
    replay(found, "test")
    cheaper = [{**body, "epsilon": 0.1} if body["kind"] == "reserve" else body for body in found]
    with pytest.raises(InputError, match=r"claims epsilon 0.1, its plan spends"):
        replay(cheaper, "test")
    more = [{**body, "delta": 1e-9} if body["kind"] == "reserve" else body for body in found]
    with pytest.raises(InputError, match="do not trust"):
        replay(more, "test")
    with pytest.raises(InputError, match="no reservation covers"):
        replay([found[0], found[2]], "test")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([{"kind": "charge", "round": 2}, {"kind": "reserve"}], "run run-1 is reserved a second time"),
        ([{"kind": "reserve", "run": f"run-{number}"} for number in range(2, 9)], "entry 7: reserves more than was"),
        ([{"kind": "policy", "epsilon": 0.5}, {"kind": "reserve", "run": "run-2"}], "entry 6: reserves more than was"),
        ([{"kind": "policy", "epsilon": float("nan")}], "a budget of nan"),
        ([{"kind": "reserve", "run": "run-2", "public_record_count": 10**9}], "does not fit its public_record_count"),
        ([{"kind": "refund", "epsilon": -5.0}], "kind 'refund' is not known"),
        ([{"kind": "open"}], "a second time"),
        ([{"kind": "release", "charge": 3}], "release of charge 3"),
        ([{"kind": "release", "charge": 99}], "release of charge 99"),
        ([{"kind": "charge", "round": 2}, {"kind": "release", "charge": 5, "run": "run-2"}], "release of charge 5"),
        ([{"kind": "charge", "round": 2}, {"kind": "close"}, {"kind": "release", "charge": 5}], "release of charge 5"),
        ([{"kind": "close"}, {"kind": "close"}], "run-1, which is not open"),
        ([{"kind": "close"}, {"kind": "charge", "round": 2}], "no reservation covers"),
        ([{"kind": "charge", "round": None}], "a field is missing or of another type"),
    ],
)
def test_replay_refuses_what_no_silo_would_have_written(ledger, changes, message):
    ledger.reserve("run-1", PLAN)
    charge = ledger.charge("run-1", "round-1", DIGEST, 1)
    ledger.release(charge.number, "run-1", b"reply")
    found = bodies(ledger)
    replay(found, "test")
    first = {body["kind"]: body for body in found}
    for number, change in enumerate(changes, len(found) + 1):
        found.append({**first.get(change["kind"], first["open"]), "run": "run-1", **change, "number": number})
    with pytest.raises(InputError, match=message):
        replay(found, "test")


def test_a_budget_that_is_lowered_below_what_is_reserved_replays(ledger, tmp_path):
    ledger.reserve("run-1", PLAN)
    lowered = Ledger.open(tmp_path, "north", "hospital-1", Budget(0.5, 3e-6))
    lowered.charge("run-1", "round-1", DIGEST, 1)
    assert lowered.left().epsilon < 0
    replay(bodies(lowered), "test")


def test_the_ledger_commands(ledger, tmp_path, siloweave):
    ledger.reserve("run-1", PLAN)
    ledger.charge("run-1", "round-1", DIGEST, 1)
    shown = siloweave("ledger", "show", str(tmp_path), "--json", cwd=tmp_path)
    assert [entry["kind"] for entry in json.loads(shown.stdout)["entries"]] == ["open", "reserve", "charge"]
    verified = siloweave("ledger", "verify", str(tmp_path), cwd=tmp_path)
    assert (verified.returncode, "3 entries hold" in verified.stdout) == (0, True)
    ledger.close_file()
    tamper(tmp_path, "UPDATE entries SET body = body || ' ' WHERE number = 3")
    broken = siloweave("ledger", "verify", str(tmp_path), cwd=tmp_path)
    assert broken.returncode == 2
    assert "entry 3 does not hold" in broken.stderr
    missing = siloweave("ledger", "show", str(tmp_path / "nowhere.sqlite"), cwd=tmp_path)
    assert missing.returncode == 2
    assert not (tmp_path / "nowhere.sqlite").exists()


_OPTIMIZED = """
import sys
from pathlib import Path
from configs.errors import PolicyRefusal
from privacy.ledger.chain import Budget, verify_entries
from privacy.ledger.file import read_only
from privacy.ledger.ledger import Ledger
from privacy.plan import PlanTerms

assert False, "is left out"
plan = PlanTerms(sampling_rate=0.02, max_grad_norm=1.0, noise_multiplier=0.9, rounds=2, steps_per_round=4, delta=1e-5)
folder = Path(sys.argv[1])
ledger = Ledger.open(folder, "north", "ward", Budget(1.5 * plan.epsilon, 3e-5))
ledger.reserve("one", plan.bind(5000))
charge = ledger.charge("one", "round-1", "aa" * 32, 1)
ledger.release(charge.number, "one", b"reply")
for refused in (
    lambda: ledger.reserve("two", plan.bind(5000)),
    lambda: ledger.charge("one", "round-1", "bb" * 32, 1),
    lambda: ledger.charge("one", "round-3", "cc" * 32, 3),
    lambda: ledger.charge("none", "round-1", "aa" * 32, 1),
):
    try:
        refused()
    except PolicyRefusal as refusal:
        print(refusal.rule)
ledger.close_file()
path = folder / "ledger.sqlite"
print([body["kind"] for body in verify_entries(read_only(path), str(path))])
"""


def test_an_optimized_python_keeps_the_ledgers_rules(tmp_path):
    done = subprocess.run(
        [sys.executable, "-O", "-c", _OPTIMIZED, str(tmp_path / "state")], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "budget_epsilon",
        "request_id",
        "schedule",
        "reservation",
        "['open', 'reserve', 'charge', 'release']",
    ]
