"""An old ledger put back: noticed by the anchor or by a receipt, refused, and reconciled without losing a spend."""

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import InputError, PolicyRefusal, SiloweaveError
from privacy.ledger import anchor as anchor_module
from privacy.ledger.anchor import Anchor
from privacy.ledger.chain import Budget, verify_entries
from privacy.ledger.journal import Journal, default_anchor_dir
from privacy.ledger.ledger import Ledger
from privacy.ledger.limits import Limits
from privacy.ledger.reconcile import read_receipts, reconcile
from privacy.ledger.replay import replay
from privacy.ledger.statements import Receipt
from privacy.plan import PlanTerms

BUDGET = Budget(20.0, 3e-4)
REQUEST = PlanTerms(
    sampling_rate=0.02, max_grad_norm=1.0, noise_multiplier=0.9, rounds=3, steps_per_round=4, delta=1e-5
)
PLAN, EPSILON = REQUEST.bind(5000), REQUEST.epsilon
OTHER = REQUEST.model_copy(update={"noise_multiplier": 0.8}).bind(5000)
DIGEST = "aa" * 32


@pytest.fixture
def state(tmp_path) -> Path:
    return tmp_path / "north"


def open_ledger(state, silo="north", dataset="ward"):
    return Ledger.open(state, silo, dataset, BUDGET)


def mend(state, receipts=(), silo="north"):
    journal = Journal(state, default_anchor_dir(state), silo, "ward")
    try:
        return reconcile(journal, BUDGET, list(receipts))
    finally:
        journal.db.close()


def anchor_file(state):
    return default_anchor_dir(state) / "ledger.anchor"


def kinds(state):
    ledger = open_ledger(state)
    found = verify_entries(ledger.entries(), "test", ledger.public_key)
    replay(found, "test")
    ledger.close_file()
    return [body["kind"] for body in found]


def begun(state, release=True):
    """A run that has reserved and charged, and its last receipt."""
    ledger = open_ledger(state)
    ledger.reserve("run-1", PLAN)
    charge = ledger.charge("run-1", "round-1", DIGEST, 1)
    if release:
        ledger.release(charge.number, "run-1", b"reply")
    receipt = ledger.receipt("run-1")
    ledger.close_file()
    return receipt


@pytest.fixture
def put_back(state, tmp_path):
    """Last week's files, put back after a run; with its last receipt."""

    def back(*, with_anchor=False):
        open_ledger(state).close_file()
        places = [state, *([default_anchor_dir(state)] if with_anchor else [])]
        for place in places:
            shutil.copytree(place, tmp_path / "last week" / place.name)
        receipt = begun(state)
        for place in places:
            shutil.rmtree(place)
            shutil.copytree(tmp_path / "last week" / place.name, place)
        return receipt

    return back


def test_the_anchor_is_outside_the_state_directory_and_follows_every_entry(state):
    ledger = open_ledger(state)
    charge = None
    steps = [
        lambda: None,
        lambda: ledger.reserve("run-1", PLAN),
        lambda: ledger.charge("run-1", "round-1", DIGEST, 1),
        lambda: ledger.release(charge.number, "run-1", b"reply"),
        lambda: ledger.close("run-1"),
    ]
    for number, step in enumerate(steps, 1):
        charge = step() or charge
        (held,) = json.loads(anchor_file(state).read_bytes())
        assert (held["number"], held["head"]) == (number, ledger.entries()[-1]["hash"])
    ledger.close_file()
    assert not list(state.rglob("*.anchor"))


def test_receipts_are_signed_and_name_every_spend(state):
    ledger = open_ledger(state)
    first, second = ledger.reserve("run-1", PLAN), ledger.reserve("run-2", OTHER)
    ledger.close_file()
    assert second.holds()
    assert second.spends[:1] == first.spends
    assert sum(spend.epsilon for spend in second.spends) == pytest.approx(20 - second.epsilon_left)
    assert not second.model_copy(update={"epsilon_left": 20.0}).holds()
    assert Receipt.from_bytes(second.to_bytes(), "test") == second


# Old files


def test_last_weeks_file_is_refused_in_one_line_and_left_as_it_is(state, put_back):
    put_back()
    before = (state / "ledger.sqlite").read_bytes()
    with pytest.raises(InputError, match=r"put back; .* until `siloweave silo budget reconcile`") as caught:
        open_ledger(state)
    assert "\n" not in str(caught.value)
    assert (state / "ledger.sqlite").read_bytes() == before


def test_a_copy_without_its_wal_is_refused(state, tmp_path):
    ledger = open_ledger(state)
    ledger.reserve("run-1", PLAN)
    shutil.copy(state / "ledger.sqlite", tmp_path / "copy")  # the reservation is in the -wal
    ledger.close_file()
    shutil.copy(tmp_path / "copy", state / "ledger.sqlite")
    with pytest.raises(InputError, match="entry 2 was signed and is not in the ledger"):
        open_ledger(state)


def test_a_truncated_file_is_refused(state):
    begun(state)
    content = (state / "ledger.sqlite").read_bytes()
    (state / "ledger.sqlite").write_bytes(content[: len(content) // 2])
    with pytest.raises(SiloweaveError):
        open_ledger(state)


def test_a_deleted_ledger_does_not_start_anew(state):
    begun(state)
    for path in state.glob("ledger.sqlite*"):
        path.unlink()
    with pytest.raises(InputError, match="is not in the ledger"):
        open_ledger(state)
    shutil.rmtree(state)  # the key as well
    with pytest.raises(InputError, match="another key"):
        open_ledger(state)
    done = mend(state)
    assert done.left.epsilon == pytest.approx(20 - EPSILON)
    assert kinds(state) == ["open", "reconcile"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "the anchor is missing"),
        (
            lambda path: path.write_bytes(path.read_bytes().replace(b'"number":4', b'"number":2')),
            "signature doesn't hold",
        ),
        (lambda path: path.write_bytes(path.read_bytes()[:50]), "not JSON"),
        (lambda path: path.write_bytes(b"[]"), "no list of receipts"),
        (lambda path: path.write_bytes(b'[{"number":1}]'), "missing"),
    ],
)
def test_a_deleted_or_edited_anchor_is_refused_until_it_is_reconciled(state, change, message):
    begun(state)
    serving = open_ledger(state)
    change(anchor_file(state))
    with pytest.raises(PolicyRefusal, match="in doubt") as caught:
        serving.charge("run-1", "round-2", DIGEST, 2)
    assert caught.value.rule == "rollback"
    assert str(state) not in str(caught.value)
    with pytest.raises(InputError, match=message):
        open_ledger(state)
    done = mend(state)
    assert done.left.epsilon == pytest.approx(20 - EPSILON)
    with pytest.raises(PolicyRefusal, match="closed"):
        serving.charge("run-1", "round-2", DIGEST, 2)  # what was charged before may be lost, so the run is over
    serving.reserve("run-2", PLAN)
    serving.close_file()
    assert kinds(state) == ["open", "reserve", "charge", "release", "close", "reconcile", "reserve"]


def test_the_anchor_of_another_silo_is_neither_used_nor_overwritten(state, tmp_path):
    begun(state)
    with pytest.raises(InputError, match="anchor_dir of its own"):
        Ledger.open(tmp_path / "south", "south", "ward", BUDGET, anchor_dir=default_anchor_dir(state))
    journal = Journal(tmp_path / "south", default_anchor_dir(state), "south", "ward")
    with pytest.raises(InputError, match="anchor_dir of its own"):
        reconcile(journal, BUDGET, [])
    journal.db.close()
    assert kinds(state)[-1] == "release"


# Receipts


def refusal_of(ledger, receipt):
    with pytest.raises(PolicyRefusal) as caught:
        ledger.accept(receipt)
    return caught.value.rule


def test_a_receipt_ahead_of_file_and_anchor_stops_the_silo_for_good(state, put_back):
    receipt = put_back(with_anchor=True)
    ledger = open_ledger(state)  # nothing on this machine can tell
    assert refusal_of(ledger, receipt) == "rollback"
    assert refusal_of(ledger, None) == "rollback"
    with pytest.raises(PolicyRefusal, match="in doubt"):
        ledger.reserve("run-2", PLAN)
    ledger.close_file()
    with pytest.raises(InputError, match="entry 4 was signed"):
        open_ledger(state)


def test_receipts_in_the_chain_are_taken_and_leave_no_trace(state):
    ledger = open_ledger(state)
    receipts = [ledger.receipt("run-1"), ledger.reserve("run-1", PLAN), ledger.close("run-1")]
    before = ledger.entries(), anchor_file(state).read_bytes()
    for receipt in (*receipts, None):
        ledger.accept(receipt)
    assert (ledger.entries(), anchor_file(state).read_bytes()) == before
    ledger.close_file()


def test_a_foreign_or_forged_receipt_is_refused_and_leaves_no_mark(state, tmp_path):
    begun(state)
    ledger, own = open_ledger(state), open_ledger(tmp_path / "south", "south")
    other_key = Ledger.open(tmp_path / "impostor", "north", "ward", BUDGET)
    forged = ledger.receipt("run-1").model_copy(update={"number": 99, "head": "00" * 32})
    for receipt in (own.receipt("run-1"), other_key.receipt("run-1"), forged):
        assert refusal_of(ledger, receipt) == "receipt"
    ledger.accept(ledger.receipt("run-1"))
    for opened in (ledger, own, other_key):
        opened.close_file()
    assert kinds(state)[-1] == "release"


# Reconciliation


def test_reconcile_charges_what_is_lost_once_and_ends_what_was_open(state, put_back, tmp_path):
    receipt = put_back(with_anchor=True)
    (tmp_path / "silos.json").write_text(
        json.dumps({"north": {"receipt": json.loads(receipt.to_bytes())}, "south": {}})
    )
    shown = read_receipts(tmp_path / "silos.json", "north", "ward")
    first, second = mend(state, shown), mend(state, shown)
    assert first.left.epsilon == pytest.approx(receipt.epsilon_left)
    assert first.left.delta == pytest.approx(receipt.delta_left)
    assert (second.doubt, second.left) == (None, first.left)
    ledger = open_ledger(state)
    ledger.accept(receipt)  # its coordinator goes on sending it
    with pytest.raises(PolicyRefusal, match="has reserved nothing"):
        ledger.charge("run-1", "round-2", DIGEST, 2)
    assert ledger.reserve("run-1", PLAN).epsilon_left == pytest.approx(20 - 2 * EPSILON)
    ledger.close_file()


def test_lost_charges_close_their_run_though_no_spend_is_lost(state, tmp_path):
    ledger = open_ledger(state)
    ledger.reserve("run-1", PLAN)
    ledger.close_file()
    shutil.copytree(state, tmp_path / "copy")
    ledger = open_ledger(state)
    ledger.charge("run-1", "round-1", DIGEST, 1)
    ledger.close_file()
    shutil.rmtree(state)
    shutil.copytree(tmp_path / "copy", state)
    done = mend(state)
    assert (done.spends, done.closed_runs) == ((), ("run-1",))
    ledger = open_ledger(state)
    with pytest.raises(PolicyRefusal, match="closed"):
        ledger.charge("run-1", "round-1", "bb" * 32, 1)  # would release round one a second time
    ledger.close_file()


def test_both_branches_of_a_ledger_are_paid(state, put_back):
    receipt = put_back(with_anchor=True)
    ledger = open_ledger(state)
    other = ledger.reserve("run-2", OTHER)  # another coordinator, before anyone noticed
    ledger.close_file()
    ledger = open_ledger(state)
    assert refusal_of(ledger, receipt) == "rollback"
    ledger.close_file()
    done = mend(state)  # the receipt that was shown is kept
    assert done.left.epsilon == pytest.approx(20 - EPSILON - OTHER.terms.epsilon)
    assert {spend.entry for spend in done.spends} == {spend.entry for spend in receipt.spends}
    ledger = open_ledger(state)
    ledger.accept(other)
    ledger.close_file()


def test_a_round_that_may_be_released_in_two_branches_is_paid_twice(state, tmp_path, siloweave):
    ledger = open_ledger(state)
    held = ledger.reserve("run-1", PLAN)
    ledger.close_file()
    places = [state, default_anchor_dir(state)]
    for place in places:
        shutil.copytree(place, tmp_path / "copy" / place.name)

    def release_round_one():
        ledger = open_ledger(state)
        ledger.accept(held)
        charge = ledger.charge("run-1", "round-1", DIGEST, 1)
        receipt = ledger.receipt("run-1")
        ledger.release(charge.number, "run-1", b"reply")
        ledger.close_file()
        return charge.seed, receipt

    first, lost = release_round_one()
    for place in places:
        shutil.rmtree(place)
        shutil.copytree(tmp_path / "copy" / place.name, place)
    second, _ = release_round_one()
    assert first != second  # the same value under two draws of noise
    (tmp_path / "silos.json").write_text(json.dumps({"north": {"receipt": json.loads(lost.to_bytes())}}))
    done = siloweave("silo", "budget", "reconcile", str(state), "silos.json", cwd=tmp_path)
    assert "0 lost spends charged, 1 reservations charged again" in done.stdout, done.stderr
    again = mend(state, [lost, lost])
    assert (again.doubt, again.charged_again) == (None, 0)
    assert again.left.epsilon == pytest.approx(20 - 2 * EPSILON)
    assert kinds(state)[-2:] == ["close", "reconcile"]


def test_a_ledger_that_is_put_back_before_its_reconciliation_loses_nothing(state, put_back, tmp_path):
    receipt = put_back(with_anchor=True)
    shutil.copytree(state, tmp_path / "again")
    mend(state, [receipt])
    shutil.rmtree(state)
    shutil.copytree(tmp_path / "again", state)
    done = mend(state)
    assert done.left.epsilon == pytest.approx(20 - EPSILON)


def test_reconcile_refuses_what_is_not_this_silos(state, tmp_path):
    receipt = begun(state)
    with pytest.raises(InputError, match="not signed by the key of silo 'north'"):
        mend(state, [receipt.model_copy(update={"number": 50})])
    (tmp_path / "other.json").write_text(json.dumps({"south": {"receipt": json.loads(receipt.to_bytes())}}))
    with pytest.raises(InputError, match="no receipt of silo 'west'"):
        read_receipts(tmp_path / "other.json", "west", "ward")
    (tmp_path / "other.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        read_receipts(tmp_path / "other.json", "west", "ward")
    assert mend(state).doubt is None


# Kill -9, two processes, a full disk


def in_child(work):
    """Runs something in a process of its own; gives its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except SiloweaveError as error:
            os._exit(40 + error.exit_status)
        except BaseException:
            os._exit(99)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def dies_at(point):
    """Makes this process die at the next anchor write: before, between file and name, or after it."""
    write = anchor_module.write_atomic

    def dying(path, content, mode=0o644):
        if point == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        if point == "inside":
            Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        write(path, content, mode)
        os.kill(os.getpid(), signal.SIGKILL)

    anchor_module.write_atomic = dying


STEPS = {
    "reserve": lambda ledger: ledger.reserve("run-2", PLAN),
    "charge": lambda ledger: ledger.charge("run-1", "round-2", "bb" * 32, 2),
    "release": lambda ledger: ledger.release(3, "run-1", b"reply"),
    "close": lambda ledger: ledger.close("run-1"),
}


@pytest.mark.parametrize("point", ["before", "inside", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_kill_9_around_the_anchor_loses_and_doubles_nothing(state, step, point):
    begun(state, release=False)

    def work():
        ledger = open_ledger(state)
        dies_at(point)
        STEPS[step](ledger)

    assert os.WTERMSIG(in_child(work)) == signal.SIGKILL
    ledger = open_ledger(state)
    assert sum(json.loads(entry["body"])["kind"] == step for entry in ledger.entries()) == 1 + (
        step in ("reserve", "charge")
    )
    STEPS[step](ledger)  # once more: it was done, and is not done again
    after = [json.loads(entry["body"])["kind"] for entry in ledger.entries()]
    assert after.count(step) == 1 + (step in ("reserve", "charge"))
    (held,) = json.loads(anchor_file(state).read_bytes())
    assert held["number"] == len(after)
    ledger.close_file()


@pytest.mark.parametrize("point", ["before", "inside", "after"])
def test_kill_9_at_the_first_start(state, point):
    def work():
        dies_at(point)
        open_ledger(state)

    assert os.WTERMSIG(in_child(work)) == signal.SIGKILL
    assert kinds(state) == ["open"]


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("point", ["before", "inside", "after"])
def test_kill_9_in_a_reconciliation(state, put_back, point, missing):
    receipt = put_back()
    if missing:
        anchor_file(state).unlink()

    def work():
        dies_at(point)
        mend(state, [receipt])

    assert os.WTERMSIG(in_child(work)) == signal.SIGKILL
    if missing and point != "after":
        with pytest.raises(InputError, match="the anchor is missing"):
            open_ledger(state)
    mend(state, [receipt])
    ledger = open_ledger(state)
    ledger.accept(receipt)
    assert ledger.left().epsilon == pytest.approx(receipt.epsilon_left)
    ledger.close_file()


def test_processes_at_once_leave_the_anchor_at_the_newest_head(state):
    open_ledger(state).close_file()

    def work(number):
        ledger = open_ledger(state)
        ledger.reserve(f"run-{number % 3}", PLAN)
        ledger.charge(f"run-{number % 3}", "round-1", DIGEST, 1)

    children = []
    for number in range(6):
        pid = os.fork()
        if pid == 0:
            try:
                work(number)
            except BaseException:
                os._exit(1)
            os._exit(0)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 6
    (held,) = json.loads(anchor_file(state).read_bytes())
    assert held["number"] == 7
    found = kinds(state)
    assert (found.count("reserve"), found.count("charge")) == (3, 3)


def test_a_full_disk_under_the_anchor_lets_nothing_out_and_loses_nothing(state):
    ledger = open_ledger(state)
    ledger.reserve("run-1", PLAN)
    ledger.close_file()
    before = anchor_file(state).read_bytes()
    write = Anchor.write

    def on_a_full_disk(anchor, receipts):
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, most))
        try:
            write(anchor, receipts)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    def work():
        ledger = open_ledger(state)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        Anchor.write = on_a_full_disk
        ledger.charge("run-1", "round-1", DIGEST, 1)

    assert os.WEXITSTATUS(in_child(work)) == 41
    assert anchor_file(state).read_bytes() == before
    assert [path.name for path in anchor_file(state).parent.iterdir()] == ["ledger.anchor"]
    ledger = open_ledger(state)
    assert ledger.charge("run-1", "round-1", DIGEST, 1).number == 3
    ledger.close_file()


# A limit by day


def test_a_day_has_a_limit_that_no_clock_set_back_lifts(state, monkeypatch):
    clock = [1.8e9]
    monkeypatch.setattr("privacy.ledger.journal.time.time", lambda: clock[0])
    ledger = open_ledger(state)
    ledger.reserve("run-1", PLAN, Limits(epsilon_per_day=1.5 * EPSILON))
    for back in (0, 3600, -48 * 3600, 23 * 3600):
        clock[0] = 1.8e9 + back
        with pytest.raises(PolicyRefusal, match=r"is left for 24 hours; (wait|the ledger)") as caught:
            ledger.reserve("run-2", PLAN, Limits(epsilon_per_day=1.5 * EPSILON))
        assert caught.value.rule == "max_epsilon_per_day"
    clock[0] = 1.8e9 - 48 * 3600
    ledger.charge("run-1", "round-1", DIGEST, 1)
    times = [json.loads(entry["body"])["time"] for entry in ledger.entries()]
    assert times == sorted(times)
    clock[0] = 1.8e9 + 24 * 3600 + 1
    ledger.reserve("run-2", PLAN, Limits(epsilon_per_day=1.5 * EPSILON))
    assert ledger.reserve("run-1", PLAN, Limits(epsilon_per_day=0.1)).epsilon_reserved == EPSILON
    ledger.close_file()


def test_a_clock_that_was_ahead_is_named(state, monkeypatch):
    clock = [1.8e9 + 3650 * 86400]
    monkeypatch.setattr("privacy.ledger.journal.time.time", lambda: clock[0])
    ledger = open_ledger(state)
    ledger.reserve("run-1", PLAN, Limits(epsilon_per_day=1.5 * EPSILON))
    clock[0] = 1.8e9
    with pytest.raises(PolicyRefusal, match="3650 days ahead of this machine's clock") as caught:
        ledger.reserve("run-2", PLAN, Limits(epsilon_per_day=1.5 * EPSILON))
    assert "wait" not in str(caught.value)
    ledger.close_file()


# All of it at random


class World:
    """Files are put back at any time; a coordinator shows its last receipt; a steward reconciles what is refused."""

    def __init__(self, root):
        self.state, self.copy = root / "north", root / "copy"
        self.runs, self.receipt, self.charged, self.all = 0, None, [], []
        open_ledger(self.state).close_file()
        self.snapshot()

    def ask(self, work):
        try:
            ledger = open_ledger(self.state)
        except InputError:
            mend(self.state, [self.receipt] if self.receipt else [])
            ledger = open_ledger(self.state)
        try:
            if work != self.charge_unseen:
                ledger.accept(self.receipt)
            work(ledger)
        except PolicyRefusal:
            return
        finally:
            ledger.close_file()
            self.all += [self.receipt] if self.receipt else []

    def reserve(self, ledger):
        self.receipt = ledger.reserve(f"run-{self.runs + 1}", PLAN)
        self.runs += 1

    def charge_unseen(self, ledger):
        """The coordinator has lost the receipt that it held, and gets a new one."""
        self.charge(ledger)

    def charged_here(self):
        """Runs of the file as it is."""
        ledger = open_ledger(self.state)
        found = [json.loads(entry["body"]) for entry in ledger.entries()]
        ledger.close_file()
        return {body["run"] for body in found if body["kind"] == "charge"}

    def charge(self, ledger):
        digest = f"{len(self.charged):064x}"
        ledger.charge(f"run-{self.runs}", digest, digest, 1)
        self.charged.append(self.runs)
        self.receipt = ledger.receipt(f"run-{self.runs}")

    def close(self, ledger):
        self.receipt = ledger.close(f"run-{self.runs}")

    def snapshot(self):
        shutil.rmtree(self.copy, ignore_errors=True)
        for place in (self.state, default_anchor_dir(self.state)):
            shutil.copytree(place, self.copy / place.name)

    def put_back(self, *places):
        for place in places:
            shutil.rmtree(place)
            shutil.copytree(self.copy / place.name, place)

    def step(self, name):
        if name == "copy":
            self.snapshot()
        elif name == "put back":
            self.put_back(self.state)
        elif name == "put back with anchor":
            self.put_back(self.state, default_anchor_dir(self.state))
        else:
            self.ask(getattr(self, name, lambda _: None))


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(
        st.sampled_from(["reserve", "charge", "close", "copy", "put back", "put back with anchor", "nothing"]),
        max_size=14,
    )
)
def test_whatever_is_put_back_no_spend_is_lost_and_no_round_is_charged_twice(tmp_path_factory, steps):
    world = World(tmp_path_factory.mktemp("any"))
    for name in ["reserve", *steps]:
        world.step(name)
    left = []
    for _ in range(2):  # the first may be refused for the receipt that it shows; the second has been reconciled
        world.ask(lambda ledger: left.append(ledger.left().epsilon))
    assert left[-1] <= 20 - world.runs * EPSILON + 1e-9
    assert len(set(world.charged)) == len(world.charged)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.sampled_from(["reserve", "charge", "charge_unseen", "close", "copy", "put back", "put back with anchor"]),
        max_size=12,
    )
)
def test_what_a_file_and_a_lost_branch_may_both_have_released_is_paid_for_each(tmp_path_factory, steps):
    """Coordinators lose receipts, a steward finds them all in the end."""
    world = World(tmp_path_factory.mktemp("any"))
    for name in ["reserve", "copy", "charge", *steps]:
        world.step(name)
    mend(world.state, world.all)
    here = world.charged_here()
    paid = {f"run-{run}": world.charged.count(run) for run in set(world.charged) if f"run-{run}" in here}
    others = world.runs - len(paid)
    ledger = open_ledger(world.state)
    for receipt in world.all:
        ledger.accept(receipt)
    assert ledger.left().epsilon <= 20 - (others + sum(paid.values())) * EPSILON + 1e-9
    ledger.close_file()
