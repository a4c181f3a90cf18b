"""`siloweave status` and `siloweave report` of a run whose files are damaged, foreign, or of another version."""

import json
import os
import shutil
from pathlib import Path

import pytest
from damage import KINDS, command, damaged, is_clear
from hypothesis import given, settings
from hypothesis import strategies as st

FILES = (
    "config.toml",
    "events.jsonl",
    "corpus/manifest.json",
    "model/manifest.json",
    "pretrain/checkpoints/step-*/COMMITTED",
    "federated/manifest.json",
    "federated/events.jsonl",
    "federated/certificate.json",
    "federated/round-*/COMMITTED",
    "federated/round-*/silos.json",
    "evaluation.json",
    "sample.txt",
    "report.json",
    "tune/tune.json",
)


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """A finished run of one's own, with a search."""
    root = tmp_path_factory.mktemp("damaged")
    shutil.copytree(tiny_run.root, root, dirs_exist_ok=True)
    directory = root / "runs" / "tiny"
    (directory / "tune").mkdir()
    (directory / "tune" / "tune.json").write_text(json.dumps({"trials": [{"status": "done"}], "best": {"number": 0}}))
    before = Path.cwd()
    os.chdir(root)
    yield directory
    os.chdir(before)


def newest(run, pattern):
    """The file that is read: of several rounds that of the newest."""
    return sorted(run.glob(pattern))[-1]


def test_status_shows_what_can_be_read_of_any_damaged_run(run):
    whole = json.loads(command("status", str(run), "--json")[1])
    assert whole["unreadable"] == []

    @settings(max_examples=150, deadline=None)
    @given(st.sampled_from(FILES), KINDS)
    def check(pattern, kind):
        path = newest(run, pattern)
        with damaged(path, *kind):
            status, out, err = command("status", str(run), "--json")
            if pattern == "config.toml" and kind[0] in ("missing", "loop"):
                assert (status, "no run here" in err) == (2, True)
                return
            assert (status, err) == (0, ""), (status, err)
            found = json.loads(out)
            assert set(found) == set(whole)
            for problem in found["unreadable"]:
                assert str(run) in problem
                assert "\n" not in problem
            status, out, err = command("status", str(run))
            assert (status, err) == (0, ""), (status, err)
            assert out.count("\n  unreadable: ") == len(found["unreadable"])

    check()


def test_report_of_a_damaged_run_is_one_line_and_changes_nothing(run):
    reports = {path: path.read_bytes() for path in (run / "report.json", run / "report.html")}
    names = {path.name for path in run.iterdir()}
    ledgers = run.parents[1] / "state" / "siloweave" / "ledgers"
    arguments = ("report", "-c", "tiny", "--set", f"federated.state_dir={ledgers}")

    @settings(max_examples=15, deadline=None)
    @given(st.sampled_from([name for name in FILES if not name.startswith(("report", "tune", "corpus"))]), KINDS)
    def check(pattern, kind):
        with damaged(newest(run, pattern), *kind):
            status, _, err = command(*arguments)
            assert is_clear(status, err), (status, err)
            if status:
                assert reports == {path: path.read_bytes() for path in reports}
                assert {path.name for path in run.iterdir()} | {pattern} >= names
                assert not list(run.glob(".report*"))
        for path, content in reports.items():
            path.write_bytes(content)

    check()


def test_lines_that_are_no_events_are_counted_and_the_others_shown(run):
    whole = json.loads(command("status", str(run), "--json")[1])
    lines = (run / "events.jsonl").read_bytes().splitlines()
    step = next(number for number, line in enumerate(lines) if b'"step"' in line and b'"loss"' in line)
    foreign = {**json.loads(lines[step]), "loss": "low"}
    content = b"\n".join([b"\xff\x00", *lines, json.dumps(foreign).encode(), b"[1]", lines[0][:20]])
    original = (run / "events.jsonl").read_bytes()
    try:
        (run / "events.jsonl").write_bytes(content)
        found = json.loads(command("status", str(run), "--json")[1])
    finally:
        (run / "events.jsonl").write_bytes(original)
    # The last line has no end: it is being written.
    assert found["unreadable"] == [
        f"{run / 'events.jsonl'}: 3 of {len(lines) + 3} lines are no events of ours, line 1 first"
    ]
    assert found["pretrain"]["loss"] == whole["pretrain"]["loss"]
    assert (found["stages"], found["federated"]) == (whole["stages"], whole["federated"])


def test_a_newer_manifest_is_called_newer_and_not_to_be_deleted(run):
    path = run / "model" / "manifest.json"
    newer = {**json.loads(path.read_text()), "version": 99, "a_field_of_tomorrow": 1}
    original = path.read_bytes()
    try:
        path.write_text(json.dumps(newer))
        (line,) = json.loads(command("status", str(run), "--json")[1])["unreadable"]
    finally:
        path.write_bytes(original)
    assert line.endswith("version 99 is newer than this Siloweave reads (1); upgrade Siloweave")


def test_settings_of_another_version_hide_nothing_else(run):
    path = run / "config.toml"
    original = path.read_bytes()
    try:
        path.write_text(path.read_text() + "\n[tomorrow]\nnew = 1\n")
        found = json.loads(command("status", str(run), "--json")[1])
    finally:
        path.write_bytes(original)
    (line,) = found["unreadable"]
    assert "tomorrow" in line
    assert found["run"] == "tiny"
    assert found["stages"]["pretrain"]["state"] == found["stages"]["federated"]["state"] == "done"
    assert found["federated"]["silos"]
