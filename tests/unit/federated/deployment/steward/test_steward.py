"""The figures of the steward's page: those of ledger and logs, which stay as they are."""

import json
import shutil
import sqlite3
import subprocess
import sys

import pytest
from damage import KINDS, command, damaged, is_clear
from hypothesis import given, settings
from mandates import STUDY
from shown_pages import OTHER, PLAN, REASON, UPDATE, made_up
from silo_requests import COORDINATOR

from configs.errors import InputError
from configs.storage.files import digest_bytes
from configs.storage.layout import SiloFiles
from federated.deployment.steward.steward import figures
from federated.silo.line_file import LineFile
from privacy.ledger.chain import Budget
from privacy.ledger.client_runs import entrust, record_update
from privacy.ledger.ledger import NO_LIMITS, Ledger


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return made_up(tmp_path_factory.mktemp("north"))


@pytest.fixture
def toml(made, tmp_path):
    """A copy of the silo that a test may change."""
    shutil.copytree(made.parent, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "silo.toml"
    path.write_text(path.read_text().replace(str(made.parent), str(tmp_path)))
    return path


def opened(toml):
    return Ledger.open(toml.parent / "state", "north", "ward", Budget(8.0, 1e-4))


def test_the_figures_are_those_of_the_ledger(made):
    found, epsilon = figures(made, None), PLAN.terms.epsilon
    budget = found["budget"]
    assert (budget["epsilon"], budget["max_epsilon_per_day"]) == (8.0, 6.0)
    assert budget["epsilon_spent"] == pytest.approx(2 * epsilon) == pytest.approx(8.0 - budget["epsilon_left"])
    assert budget["epsilon_within_24_hours"] == pytest.approx(2 * epsilon)
    own, other = f"stroke-net {COORDINATOR.public_key[:16]}", OTHER.public_key[:16]
    assert [(row["coordinator"], row["study"], row["runs"]) for row in found["spent"]] == [
        (other, "", 1),
        (own, STUDY, 1),
    ]
    assert [row["epsilon"] for row in found["spent"]] == pytest.approx([epsilon, epsilon])
    newest, oldest = found["runs"]
    assert (newest["state"], newest["rounds_charged"], newest["study"]) == ("open", 2, STUDY)
    assert (oldest["state"], oldest["coordinator"]) == ("closed", other)
    assert "stop" not in oldest
    left = found["left"]
    assert (left["releases"], left["bytes"]) == (2, 2 * len(UPDATE))
    assert [(row["what"], row["digest"]) for row in left["newest"]] == [
        ("round 1", digest_bytes(UPDATE)),
        ("round 2", digest_bytes(UPDATE)),
    ]


def test_refusals_have_their_reason_and_who_asked(made):
    found = figures(made, None)
    (refused,) = found["refused"]
    assert (refused["reason"], refused["run"], refused["kind"]) == (REASON, "late-referrals-1", "reserve")
    assert refused["coordinator"].startswith("stroke-net ")
    assert [(reply["kind"], reply["outcome"]) for reply in found["replies"]] == [
        ("reserve", "answered"),
        ("train", "answered"),
        ("reserve", "refused: max_rounds"),
    ]
    assert [row["outcome"] for row in found["turned_away"]] == ["refused: coordinator"]
    assert found["serving"] is None


def test_an_update_without_noise_of_its_own_is_named_as_that(toml):
    ledger, key = opened(toml), OTHER.public_key
    entrust(ledger.journal, "clients", PLAN.terms, key, NO_LIMITS)
    record_update(ledger.journal, "clients", key, "round-1", "bb" * 32, 1)
    ledger.close_file()
    newest = figures(toml, None)["left"]["newest"][-1]
    assert (newest["run"], newest["what"]) == ("clients", "round 1, without noise of its own")
    assert (newest["bytes"], newest["digest"]) == (None, None)


def test_the_commands_stop_what_they_stand_beside(toml):
    """They are run by a shell, as a steward would paste them, in a folder with a blank in its name."""
    folder = toml.parent / "a steward's"
    shutil.move(toml, folder.with_suffix(".toml"))
    toml = folder.with_suffix(".toml")
    found = figures(toml, None)
    lines = [found["runs"][0]["stop"], found["mandates"][0]["stop"], found["trusted"][0]["stop"]]
    script = "siloweave() { " + f'"{sys.executable}" -m siloweave "$@"; }}\nset -e\n' + "\n".join(lines)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    after = figures(toml, None)
    assert after["runs"][0]["state"] == "stopped by the steward"
    assert [row["state"] for row in after["mandates"]] == ["revoked"]
    assert after["trusted"] == []
    assert not any("stop" in row for row in (*after["runs"], *after["mandates"]))


def test_a_hostile_name_is_quoted_in_a_command(tmp_path):
    name = "-c; touch $(pwd)/own 'x"
    toml = made_up(tmp_path, coordinator=name)
    (row,) = figures(toml, None)["trusted"]
    words = subprocess.run(
        ["bash", "-c", f"siloweave() {{ printf '%s\\n' \"$@\"; }}\n{row['stop']}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    ).stdout.splitlines()
    assert words == ["silo", "distrust", "-c", str(toml), "--", name]


def state_of(toml):
    """Every file of a silo but SQLite's shared memory, which is no record: content and time of the last change."""
    files = [path for path in toml.parent.rglob("*") if path.is_file() and not path.name.endswith("-shm")]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_a_look_changes_nothing_and_makes_nothing(made):
    before = state_of(made)
    figures(made, None)
    for verb in (("status",), ("runs",), ("mandate", "list"), ("dashboard", "--json")):
        assert command("silo", *verb, "-c", str(made))[0] == 0
    assert state_of(made) == before


def test_it_looks_while_the_service_writes_and_holds_nothing_up(toml):
    """Another process is in the middle of a transaction; and the seeds' log is emptied right after a look."""
    ledger = opened(toml)
    key = COORDINATOR.public_key
    charge = ledger.charge("late-referrals-1", "round-3", "aa" * 32, 3, coordinator=key)
    with ledger.journal.locked():
        before = state_of(toml)
        assert figures(toml, None)["runs"][0]["rounds_charged"] == 3
        assert state_of(toml) == before
    ledger.release(charge.number, "late-referrals-1", UPDATE)  # which scrubs, or fails
    assert figures(toml, None)["left"]["releases"] == 3
    ledger.close_file()


def test_it_looks_at_what_a_killed_service_has_left(toml, tmp_path_factory):
    """Its last entries are in the write-ahead log alone, which stays as it is for the service's next start."""
    ledger = opened(toml)
    ledger.charge("late-referrals-1", "round-3", "aa" * 32, 3, coordinator=COORDINATOR.public_key)
    left = tmp_path_factory.mktemp("killed")
    shutil.copytree(toml.parent, left, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*-shm"))
    ledger.close_file()
    killed = left / "silo.toml"
    killed.write_text(toml.read_text().replace(str(toml.parent), str(left)))
    before = state_of(killed)
    assert any(path.name.endswith("-wal") and content for path, (content, _) in before.items())
    assert figures(killed, None)["runs"][0]["rounds_charged"] == 3
    assert state_of(killed) == before


def test_an_edited_ledger_is_one_line(toml):
    database = sqlite3.connect(toml.parent / "state" / "ledger.sqlite")
    database.executescript("DROP TRIGGER entries_keep; UPDATE entries SET body = replace(body, '8.0', '9.0')")
    database.close()
    with pytest.raises(InputError, match=r"entry 1 does not hold .* put its backup back"):
        figures(toml, None)
    for arguments in ((), ("--json",)):
        status, out, errors = command("silo", "dashboard", "-c", str(toml), *arguments)
        assert (status, errors.count("\n")) == (2, 1)
        assert "does not hold" in errors
        assert not out or json.loads(out)["exit_status"] == 2


@pytest.mark.parametrize("name", ["audit.jsonl", "strangers.jsonl", "silo.log"])
def test_a_log_that_cannot_be_read_is_no_word_against_the_ledger(toml, name):
    path = toml.parent / "state" / name
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match=rf"{name}: can't be read .*; have it readable, or move it away") as refused:
        figures(toml, None)
    assert "ledger" not in str(refused.value)


@settings(max_examples=60, deadline=None)
@given(KINDS)
def test_a_damaged_ledger_or_log_is_at_most_one_line(made, kind):
    files = SiloFiles(made.parent / "state")
    for path in (files.ledger, files.traffic, files.log):
        with damaged(path, *kind):
            status, _, errors = command("silo", "dashboard", "-c", str(made), "--json")
            assert is_clear(status, errors), (path, kind, errors)


def test_an_old_ledger_that_was_put_back_is_said(toml):
    ledger = opened(toml)
    before = toml.with_suffix(".backup")
    ledger.close_file()
    shutil.copy(ledger.path, before)
    ledger = opened(toml)
    ledger.reserve("more", PLAN, coordinator=OTHER.public_key)
    ledger.close_file()
    shutil.copy(before, ledger.path)
    assert "an old or other ledger was put back" in figures(toml, None)["doubt"]


def test_a_silo_without_a_ledger_gets_none(tmp_path):
    toml = made_up(tmp_path)
    shutil.rmtree(tmp_path / "state")
    shutil.rmtree(tmp_path / "state.anchor")
    with pytest.raises(InputError, match="no ledger yet"):
        figures(toml, None)
    assert not (tmp_path / "state").exists()


def test_silo_status_shows_mandates(made):
    shown = command("silo", "status", "-c", str(made))[1]
    assert f"mandates: {STUDY}: in force, until 2105-12-31" in shown


def test_the_newest_lines_of_older_files_too(tmp_path):
    file = LineFile(tmp_path / "log")
    for name, lines in (("log.2", "a\nb\n"), ("log.1", "c\nd\n"), ("log", "e\nf")):
        (tmp_path / name).write_text(lines)
    assert file.newest(100) == ["a", "b", "c", "d", "e", "f"]
    assert file.newest(3) == ["e", "f"]
    assert file.newest(6) == ["d", "e", "f"]  # it begins within c's line, which is no whole one
    assert file.newest(2) == ["f"]
