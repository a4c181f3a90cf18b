"""Copies of a ledger: exports verified without the silo, backups that hold no seed, files of an older version."""

import json
import shutil
import sqlite3

import pytest

from configs.errors import InputError
from configs.storage.files import canonical_json
from privacy.ledger.chain import GENESIS, Budget, entry_hash, verify_entries
from privacy.ledger.file import SCHEMA_VERSION, backup, export, read_only
from privacy.ledger.journal import default_anchor_dir
from privacy.ledger.ledger import Ledger
from privacy.ledger.replay import replay
from privacy.plan import PlanRequest
from privacy.signing import Signer

BUDGET = Budget(20.0, 3e-5)
REQUEST = PlanRequest(
    sampling_rate=0.02, max_grad_norm=1.0, noise_multiplier=0.9, rounds=3, steps_per_round=4, delta=1e-5
)
PLAN = REQUEST.bind(5000)
DIGEST = "aa" * 32


@pytest.fixture
def state(tmp_path):
    return tmp_path / "north"


@pytest.fixture
def ledger(state):
    """Open, with one charge that is answered and one that waits."""
    ledger = Ledger.open(state, "north", "ward", BUDGET)
    ledger.reserve("run-1", PLAN)
    charge = ledger.charge("run-1", "round-1", DIGEST, 1)
    ledger.release(charge.number, "run-1", b"the reply")
    yield ledger
    ledger.close_file()


def test_an_export_is_verified_alone_and_holds_neither_seed_nor_reply(ledger, state, tmp_path, siloweave):
    waiting = ledger.charge("run-1", "round-2", DIGEST, 2)
    done = siloweave("ledger", "export", str(state), "--to", "out.jsonl", "--json", cwd=tmp_path)
    assert json.loads(done.stdout) == {"file": "out.jsonl", "entries": 5}
    content = (tmp_path / "out.jsonl").read_bytes()
    assert waiting.seed not in content
    assert waiting.seed.hex().encode() not in content
    assert b"the reply" not in content
    assert read_only(tmp_path / "out.jsonl") == ledger.entries()
    verified = siloweave("ledger", "verify", "out.jsonl", "--json", cwd=tmp_path)
    assert json.loads(verified.stdout)["head"] == ledger.entries()[-1]["hash"]
    again = siloweave("ledger", "export", str(state), "--to", "out.jsonl", cwd=tmp_path)
    assert (again.returncode, "nothing is overwritten" in again.stderr) == (2, True)
    assert (tmp_path / "out.jsonl").read_bytes() == content


def test_an_export_is_sealed_where_the_environment_has_a_key(ledger, state, tmp_path, siloweave):
    key = {"SILOWEAVE_ENCRYPTION_KEY": bytes(range(9, 41)).hex()}
    assert siloweave("ledger", "export", str(state), "--to", "out.jsonl", cwd=tmp_path, **key).returncode == 0
    assert b"run-1" not in (tmp_path / "out.jsonl").read_bytes()
    verified = siloweave("ledger", "verify", "out.jsonl", "--json", cwd=tmp_path, **key)
    assert json.loads(verified.stdout)["head"] == ledger.entries()[-1]["hash"]
    for wrong in ({}, {"SILOWEAVE_ENCRYPTION_KEY": bytes(range(10, 42)).hex()}):
        refused = siloweave("ledger", "verify", "out.jsonl", cwd=tmp_path, **wrong)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert "KEY" in refused.stderr or "key" in refused.stderr


def test_an_export_is_sealed_by_a_key_file(ledger, state, tmp_path, siloweave):
    for name, first in (("mine", 9), ("other", 10)):
        (tmp_path / name).touch(mode=0o600)
        (tmp_path / name).write_text(bytes(range(first, first + 32)).hex())
    done = siloweave("ledger", "export", str(state), "--to", "out.jsonl", "--key-file", "mine", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert b"run-1" not in (tmp_path / "out.jsonl").read_bytes()
    verified = siloweave("ledger", "verify", "out.jsonl", "--key-file", "mine", "--json", cwd=tmp_path)
    assert json.loads(verified.stdout)["head"] == ledger.entries()[-1]["hash"]
    for options, word in (([], "give --key-file FILE"), (["--key-file", "other"], "key"), (["--key-file", "no"], "no")):
        refused = siloweave("ledger", "verify", "out.jsonl", *options, cwd=tmp_path)
        assert (refused.returncode, refused.stderr.count("\n"), word in refused.stderr) == (2, 1, True)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda lines: [lines[0], lines[2]], "entry 2 does not hold"),
        (lambda lines: [lines[0], lines[1].replace(b'delta\\":1e-05', b'delta\\":1e-06')], "entry 2 does not hold"),
        (lambda lines: [lines[0], b"{}"], "entry 2 does not hold"),
        (lambda lines: [lines[0], b'{"body": "["}'], "entry 2 does not hold"),
        (lambda lines: [lines[0], b"[1]"], "line 2 is no entry"),
        (lambda lines: [lines[0], lines[1][:40]], "line 2 is not JSON"),
    ],
)
def test_an_edited_export_is_noticed(ledger, state, tmp_path, edit, message):
    export(state / "ledger.sqlite", tmp_path / "out.jsonl")
    lines = (tmp_path / "out.jsonl").read_bytes().splitlines()
    (tmp_path / "out.jsonl").write_bytes(b"\n".join(edit(lines)))
    with pytest.raises(InputError, match=message):
        verify_entries(read_only(tmp_path / "out.jsonl"), "out.jsonl")


def test_a_backup_is_whole_private_and_without_seeds(ledger, state, tmp_path, siloweave):
    waiting = ledger.charge("run-1", "round-2", DIGEST, 2)  # in the -wal
    done = siloweave("ledger", "backup", str(state), "--to", "copies/kept.sqlite", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    copy = tmp_path / "copies" / "kept.sqlite"
    assert verify_entries(read_only(copy), "copy") == verify_entries(ledger.entries(), "ledger")
    assert waiting.seed not in copy.read_bytes()
    assert b"the reply" in copy.read_bytes()
    assert oct(copy.stat().st_mode)[-3:] == "600"
    assert [path.name for path in copy.parent.iterdir()] == ["kept.sqlite"]
    with pytest.raises(InputError, match="nothing is overwritten"):
        backup(state / "ledger.sqlite", copy)


def test_a_backup_of_today_serves_and_one_of_last_week_is_refused(ledger, state, tmp_path):
    ledger.charge("run-1", "round-2", DIGEST, 2)
    backup(state / "ledger.sqlite", tmp_path / "today.sqlite")
    ledger.close_file()
    shutil.copy(tmp_path / "today.sqlite", state / "ledger.sqlite")
    again = Ledger.open(state, "north", "ward", BUDGET)
    assert again.charge("run-1", "round-1", DIGEST, 1).reply == b"the reply"
    with pytest.raises(Exception, match="has lost its seed; it stays spent"):
        again.charge("run-1", "round-2", DIGEST, 2)
    again.charge("run-1", "round-3", DIGEST, 3)
    again.close_file()
    shutil.copy(tmp_path / "today.sqlite", state / "ledger.sqlite")
    with pytest.raises(InputError, match="put back"):
        Ledger.open(state, "north", "ward", BUDGET)


def test_a_failed_backup_leaves_nothing(state, tmp_path):
    state.mkdir()
    (state / "ledger.sqlite").write_bytes(b"not a database, though long enough to be read as one" * 30)
    with pytest.raises(InputError, match="not a sound ledger"):
        backup(state / "ledger.sqlite", tmp_path / "copy.sqlite")
    with pytest.raises(InputError, match="no such ledger"):
        export(tmp_path / "nowhere.sqlite", tmp_path / "copy.jsonl")
    with pytest.raises(InputError, match=r"named \*.jsonl"):
        export(state / "ledger.sqlite", tmp_path / "copy.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["north"]


VERSION_1 = """
CREATE TABLE entries (number INTEGER PRIMARY KEY, body TEXT NOT NULL, previous TEXT NOT NULL, hash TEXT NOT NULL,
                      signature TEXT NOT NULL);
CREATE TABLE seeds (charge INTEGER PRIMARY KEY REFERENCES entries(number), seed BLOB NOT NULL);
CREATE TABLE replies (charge INTEGER PRIMARY KEY REFERENCES entries(number), reply BLOB NOT NULL);
CREATE TRIGGER entries_keep BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'entries are append-only'); END;
CREATE TRIGGER entries_stay BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'entries are append-only'); END;
PRAGMA user_version = 1;
"""


def version_1(state):
    """A ledger as the first version wrote it: no anchor, and no word on where a seed came from."""
    state.mkdir()
    signer, previous = Signer(state / "silo.key"), GENESIS
    reserved = {
        "run": "run-1",
        "plan": REQUEST.model_dump(),
        "plan_digest": REQUEST.digest,
        "public_record_count": 5000,
        "epsilon": REQUEST.epsilon,
        "delta": REQUEST.delta,
    }
    written = [
        ("open", {"silo": "north", "dataset": "ward", "public_key": signer.public_key, "epsilon": 20.0, "delta": 3e-5}),
        ("reserve", reserved),
        ("charge", {"run": "run-1", "request": "round-1", "digest": DIGEST, "round": 1}),
    ]
    connection = sqlite3.connect(state / "ledger.sqlite")
    connection.executescript(VERSION_1)
    for number, (kind, values) in enumerate(written, 1):
        body = canonical_json({"kind": kind, "number": number, "time": 1.7e9, **values}).decode()
        digest = entry_hash(previous, body)
        row = (number, body, previous, digest, signer.sign(digest.encode()))
        connection.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?)", row)
        previous = digest
    connection.execute("INSERT INTO seeds VALUES (3, ?)", (bytes(range(32)),))
    connection.commit()
    connection.close()


def test_a_version_1_ledger_is_taken_over_whole_and_anchored(state):
    version_1(state)
    ledger = Ledger.open(state, "north", "ward", BUDGET)
    assert ledger.charge("run-1", "round-1", DIGEST, 1).seed == bytes(range(32))
    assert ledger.left().epsilon == pytest.approx(20 - REQUEST.epsilon)
    ledger.close("run-1")
    statement = ledger.statement("run-1", {}, attests_disjoint_units=False)
    assert (statement.seed_source, statement.rounds_charged) == ("not recorded", 1)
    found = verify_entries(ledger.entries(), "test", ledger.public_key)
    replay(found, "test")
    assert [body["kind"] for body in found] == ["open", "reserve", "charge", "close"]
    assert ledger.journal.db.execute("PRAGMA user_version").fetchone()[0] == SCHEMA_VERSION == 3
    ledger.close_file()
    (default_anchor_dir(state) / "ledger.anchor").unlink()
    with pytest.raises(InputError, match="the anchor is missing"):  # it has had one, and says so
        Ledger.open(state, "north", "ward", BUDGET)


def test_a_version_1_copy_of_a_ledger_that_went_on_is_refused(state, tmp_path):
    version_1(state)
    shutil.copytree(state, tmp_path / "copy")
    ledger = Ledger.open(state, "north", "ward", BUDGET)
    ledger.charge("run-1", "round-2", DIGEST, 2)
    ledger.close_file()
    shutil.rmtree(state)
    shutil.copytree(tmp_path / "copy", state)
    with pytest.raises(InputError, match="entry 4 was signed and is not in the ledger"):
        Ledger.open(state, "north", "ward", BUDGET)


def test_a_version_1_file_can_be_looked_at_as_it_is(state, siloweave, tmp_path):
    version_1(state)
    before = (state / "ledger.sqlite").read_bytes()
    done = siloweave("ledger", "verify", str(state), cwd=tmp_path)
    assert (done.returncode, "3 entries hold" in done.stdout) == (0, True)
    assert (state / "ledger.sqlite").read_bytes() == before


SILO_TOML = """
[silo]
id = "north"
dataset_id = "ward"
state_dir = "{state}"
base_model = "{state}/model"
public_record_count = 5000
{more}
[data]
source = "{state}/notes.jsonl"
[policy]
budget_epsilon = 20.0
budget_delta = 3e-5
max_epsilon_per_run = 10.0
"""


LOOKS = ("status -c silo.toml", "runs -c silo.toml", "runs stop run-1 -c silo.toml", "budget reconcile silo.toml")
LOOKS_AT = (
    "ledger show north",
    "ledger verify north",
    "ledger export north --to e.jsonl",
    "ledger backup north --to b",
)


@pytest.mark.parametrize("there", [False, True], ids=["no folder", "an empty folder"])
def test_commands_that_look_make_no_ledger_and_no_key(tmp_path, siloweave, there):
    """Before: `silo status` and `silo budget reconcile` made both, as the user that asked, and said epsilon 20."""
    state = tmp_path / "north"
    state.mkdir() if there else None
    (tmp_path / "silo.toml").write_text(SILO_TOML.format(state=state, more=""))
    before = set(tmp_path.rglob("*"))
    for command in (*(f"silo {look}" for look in LOOKS), "silo budget reconcile north", *LOOKS_AT):
        done = siloweave(*command.split(), cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), (command, done.stderr)
        assert command.endswith("reconcile north") or "no ledger yet" in done.stderr or "no such ledger" in done.stderr
        assert set(tmp_path.rglob("*")) == before, command


@pytest.mark.parametrize("anchored", [True, False])
def test_a_lost_ledger_is_looked_at_in_vain_and_mended_by_its_settings(ledger, state, tmp_path, siloweave, anchored):
    (tmp_path / "receipt.json").write_bytes(ledger.receipt("run-1").to_bytes())
    ledger.close_file()
    if not anchored:  # the coordinator's receipt is all there is, and the key tells whose it is
        (default_anchor_dir(state) / "ledger.anchor").unlink()
    for path in state.glob("ledger.sqlite*"):
        path.unlink()
    (tmp_path / "silo.toml").write_text(SILO_TOML.format(state=state, more=""))
    lost = siloweave("silo", "status", "-c", "silo.toml", cwd=tmp_path)
    assert (lost.returncode, "silo budget reconcile" in lost.stderr) == (2, anchored)
    assert not (state / "ledger.sqlite").exists()
    done = siloweave("silo", "budget", "reconcile", "silo.toml", "receipt.json", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["epsilon_left"] == pytest.approx(20 - REQUEST.epsilon), done.stderr


def test_a_folder_whose_anchor_lies_elsewhere_is_not_reconciled(state, tmp_path, siloweave):
    ledger = Ledger.open(state, "north", "ward", BUDGET, anchor_dir=tmp_path / "elsewhere")
    ledger.reserve("run-1", PLAN)
    done = siloweave("silo", "budget", "reconcile", str(state), cwd=tmp_path)
    assert (done.returncode, "give the silo.toml" in done.stderr) == (2, True)
    assert ledger.charge("run-1", "round-1", DIGEST, 1).seed  # its run is open
    ledger.close_file()
    (tmp_path / "silo.toml").write_text(SILO_TOML.format(state=state, more=f'anchor_dir = "{tmp_path}/elsewhere"'))
    sound = siloweave("silo", "budget", "reconcile", "silo.toml", cwd=tmp_path)
    assert (sound.returncode, "nothing to reconcile" in sound.stdout) == (0, True), sound.stderr


def test_a_lost_ledger_is_mended_from_its_folders_anchor(ledger, state, tmp_path, siloweave):
    ledger.close_file()
    for path in state.glob("ledger.sqlite*"):
        path.unlink()
    with pytest.raises(InputError, match="is not in the ledger"):
        Ledger.open(state, "north", "ward", BUDGET)
    done = siloweave("silo", "budget", "reconcile", str(state), "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["epsilon_left"] == pytest.approx(20 - REQUEST.epsilon), done.stderr
    again = Ledger.open(state, "north", "ward", BUDGET)
    assert verify_entries(again.entries(), "test")[0]["epsilon"] == 20.0
    assert len(again.entries()) == 2
    again.close_file()


def test_verify_looks_at_the_anchor_and_says_what_an_export_cannot_show(ledger, state, tmp_path, siloweave):
    shutil.copytree(state, tmp_path / "copy")
    export(state / "ledger.sqlite", tmp_path / "out.jsonl")
    ledger.charge("run-1", "round-2", DIGEST, 2)
    head = ledger.entries()[-1]["hash"]
    sound = siloweave("ledger", "verify", str(state), "--json", cwd=tmp_path)
    shown = json.loads(sound.stdout)
    assert (shown["anchor"], shown["later_entries_can_be_missing"], shown["head"]) == ("agrees", False, head)
    exported = siloweave("ledger", "verify", "out.jsonl", cwd=tmp_path)
    assert "later entries can be missing" in exported.stdout
    assert ledger.entries()[-2]["hash"] in exported.stdout  # whole, to be compared
    ledger.close_file()
    shutil.rmtree(state)
    shutil.copytree(tmp_path / "copy", state)
    old = siloweave("ledger", "verify", str(state), cwd=tmp_path)
    assert (old.returncode, "is not in the ledger" in old.stderr) == (2, True), old.stdout


def test_the_reconcile_command(ledger, state, tmp_path, siloweave):
    receipt = ledger.receipt("run-1")
    ledger.close_file()
    sound = siloweave("silo", "budget", "reconcile", str(state), cwd=tmp_path)
    assert (sound.returncode, "nothing to reconcile" in sound.stdout) == (0, True), sound.stderr
    (default_anchor_dir(state) / "ledger.anchor").unlink()
    (tmp_path / "silo.toml").write_text(SILO_TOML.format(state=state, more=""))
    (tmp_path / "certificate.json").write_bytes(b'{"silos": {"north": {"receipt": ' + receipt.to_bytes() + b"}}}")
    done = siloweave("silo", "budget", "reconcile", "silo.toml", "certificate.json", "--json", cwd=tmp_path)
    result = json.loads(done.stdout)
    assert "the anchor is missing" in result["doubt"]
    assert (result["epsilon_charged"], result["closed_runs"]) == (0, ["run-1"])
    assert result["epsilon_left"] == pytest.approx(receipt.epsilon_left)
    wrong = siloweave("silo", "budget", "reconcile", str(state), "nowhere.json", cwd=tmp_path)
    assert (wrong.returncode, "nowhere.json: can't be read" in wrong.stderr) == (2, True)
    Ledger.open(state, "north", "ward", BUDGET).close_file()
