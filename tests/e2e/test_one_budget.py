"""A budget does not begin anew in another folder: `siloweave federate` as a user gives it, here and there."""

import json
import os
import shutil
import sqlite3
from pathlib import Path

import pytest

# A smaller epsilon means more noise, which each process that looks at a plan accounts for faster.
CHOSEN = ("federated.rounds=1", "federated.workers=1", "evaluate.without_dp=false", "privacy.epsilon=1")
SHORT = tuple(part for setting in CHOSEN for part in ("--set", setting))
ROMAN = Path("siloweave", "ledgers", "plays-tiny", "roman", "ledger.sqlite")


@pytest.fixture
def folders(tiny_run, tmp_path):
    """Two folders, each with the exported model of a run that was begun in it."""
    made = [tmp_path / name for name in ("a", "b")]
    for folder in made:
        shutil.copytree(tiny_run.model, folder / "runs" / "tiny" / "model")
    return made


def charges(ledger: Path) -> list[tuple[str, float]]:
    """What a ledger holds, read without our code."""
    with sqlite3.connect(f"file:{ledger}?mode=ro", uri=True) as database:
        bodies = [json.loads(body) for (body,) in database.execute("SELECT body FROM entries ORDER BY number")]
    return [(body["run"], body["epsilon"]) for body in bodies if body["kind"] == "reserve"]


def test_the_same_run_in_another_folder_spends_of_the_same_budget(siloweave, joined_ray, folders, tmp_path):
    """Before: state_dir was relative, and so two folders spent twice the budget."""
    given = ("federate", "-c", "tiny", *SHORT, "--set", "privacy.budget_epsilon=1")
    home = Path(os.environ["XDG_STATE_HOME"])
    done = [siloweave(*given, cwd=folder) for folder in folders]
    assert [each.returncode for each in done] == [0, 3], [each.stderr for each in done]
    assert all(f"ledgers of dataset plays-tiny: {(home / ROMAN).parents[1]}" in each.stderr for each in done)
    assert "budget_epsilon" in done[1].stderr
    assert len(list(home.rglob("ledger.sqlite"))) == 6
    assert not list(tmp_path.rglob("ledger.sqlite"))
    assert [epsilon for _, epsilon in charges(home / ROMAN)] == pytest.approx([1], rel=1e-3)
    plan = siloweave("plan", "-c", "tiny", "--json", cwd=tmp_path)
    assert json.loads(plan.stdout)["federated"]["ledgers"] == str((home / ROMAN).parents[1])


def test_ledgers_of_private_data_have_one_place(siloweave, joined_ray, folders):
    given = ("federate", "-c", "tiny", *SHORT, "--set", "data.private.public=false")
    first, second, third = (siloweave(*given, "--set", "federated.state_dir=state", cwd=folders[n]) for n in (0, 1, 0))
    assert (first.returncode, second.returncode, third.returncode) == (0, 2, 0), second.stderr
    said = [line for line in second.stderr.splitlines() if line.startswith("error:")]
    assert len(said) == 1
    assert f"the ledgers of dataset 'plays-tiny' are in {folders[0] / 'state'}" in said[0]
    assert not (folders[1] / "state").exists()
    assert len(charges(folders[0] / "state" / "plays-tiny" / "roman" / "ledger.sqlite")) == 1


def test_a_second_silo_of_a_dataset_is_refused(siloweave, tiny_model, tmp_path):
    """Two silo.toml, whose paths are relative, over the same records: with two ledgers, and started from elsewhere."""
    (tmp_path / "records.jsonl").write_text("".join(f'{{"text": "seen on day {day}"}}\n' for day in range(200)))
    for name in ("north", "south"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "silo.toml").write_text(
            f'[silo]\nid = "{name}"\ndataset_id = "ward"\nstate_dir = "state"\nbase_model = "{tiny_model}"\n'
            'public_record_count = 200\n[data]\nsource = "../records.jsonl"\n'
            "[policy]\nbudget_epsilon = 8.0\nbudget_delta = 1e-5\n"
        )
    address = ("--address", "127.0.0.1:1")
    first = siloweave("silo", "serve", "-c", "north/silo.toml", *address, cwd=tmp_path)
    assert "service.crt: no such certificate" in first.stderr  # the ledger was opened before
    assert (tmp_path / "north" / "state" / "ledger.sqlite").exists()
    second = siloweave("silo", "serve", "-c", "silo.toml", *address, cwd=tmp_path / "south")
    assert second.returncode == 2
    assert f"the ledgers of dataset 'ward' are in {tmp_path / 'north' / 'state'}" in second.stderr
    assert not (tmp_path / "south" / "state").exists()
    again = siloweave("silo", "serve", "-c", "silo.toml", *address, cwd=tmp_path / "north")
    assert "service.crt: no such certificate" in again.stderr
