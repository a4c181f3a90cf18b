"""Which silos a simulation finds in its data: by canonical names, each with one budget."""

import json
from pathlib import Path

import pytest

from cluster.checks.estimate import estimate
from configs.errors import InputError
from configs.load import load
from configs.schema.places import ledgers
from federated.silo.units import load_units, rows_of
from federated.simulation.simulated_places import refuse_earlier_place, simulated_silo
from federated.simulation.simulation import simulated_silos
from privacy.ledger.chain import Budget
from privacy.ledger.ledger import Ledger

LONG = "\u5317\u4eac\u5e02\u6d77\u6dc0\u533a\u7b2c\u4e00" * 12  # 96 characters, 864 where each byte is quoted


@pytest.fixture
def run(tmp_path):
    def settings(names, *overrides):
        path = tmp_path / "d.jsonl"
        path.write_text("".join(json.dumps({"text": f"t{i}", "site": name}) + "\n" for i, name in enumerate(names)))
        rows_of.cache_clear()
        private = [f"source={path}", "text=text", "silo=site", "unit=", "public_record_counts={}", *overrides]
        return load("tiny", [f"federated.state_dir={tmp_path}/state", *(f"data.private.{item}" for item in private)])

    return settings


def old_ledger(config, folder):
    """As it was left while names were compared as they stood."""
    place = Path(simulated_silo(config, "x", Path("/model")).silo.state_dir)
    return Ledger.open(place.with_name(folder), folder, "d", Budget(1, 1e-5))


def test_spellings_of_a_name_are_one_silo_with_one_budget_and_its_own_settings(run, tmp_path):
    names = [
        "North",
        " North",
        "North\u00a0",
        "Jos\u00e9",
        "Jose\u0301",
        17,
        17.0,
        "17.0",
        "South",
        None,
        float("nan"),
        " ",
    ]
    config = run(names, 'public_record_counts={"North "=7, "Jose\u0301"=8}')
    silos = simulated_silos(config, tmp_path)
    assert list(silos) == ["17", "Jos\u00e9", "North", "South"]
    assert [silo.silo.public_record_count for silo in silos.values()][1:3] == [8, 7]
    assert len({silo.silo.state_dir for silo in silos.values()}) == 4
    units = [load_units(silo, bytes(32)) for silo in silos.values()]
    assert [len(found.train) + len(found.held_out) for found in units] == [3, 2, 3, 1]
    assert [found.counts.rows for found in units] == [6, 5, 6, 4]  # with three that name no silo
    assert all(found.counts.without_unit == 3 for found in units)


@pytest.mark.parametrize(
    ("folder", "names", "now"),
    [("1%2E0", [1.0, 2.0], "1"), ("North ", ["North ", "x"], "North"), ("north", ["North"], "North")],
)
def test_a_silo_that_has_spent_under_another_spelling_gets_no_second_budget(run, tmp_path, folder, names, now):
    config = run(names)
    old_ledger(config, folder).close_file()
    with pytest.raises(InputError) as refused:
        simulated_silos(config, tmp_path)
    assert f"{folder}: this ledger's silo is silo {now!r} now" in str(refused.value)


def test_ledgers_of_an_earlier_version_are_not_left_behind(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(["North"])
    old = load("tiny", ["federated.state_dir=state", "data.private.public=false", "evaluate.without_dp=false"])
    Ledger.open(Path(simulated_silo(old, "roman", tmp_path).silo.state_dir), "roman", "d", Budget(1, 1e-5)).close_file()
    private, public = (
        load("tiny", [f"data.private.public={value}", "evaluate.without_dp=false"]) for value in ("false", "true")
    )
    with pytest.raises(InputError, match="ledgers of this dataset from an earlier version, whose budget would begin"):
        refuse_earlier_place(private)
    refuse_earlier_place(public)
    refuse_earlier_place(old)
    ledgers().parent.mkdir(parents=True)
    (tmp_path / "state").rename(ledgers())
    refuse_earlier_place(private)
    (tmp_path / "state").symlink_to(ledgers())
    refuse_earlier_place(private)


def test_ledgers_of_canonical_names_go_on(run, tmp_path):
    config = run(["North", "a.b", "Jos\u00e9", "../x"])
    first = simulated_silos(config, tmp_path)
    for silo in first.values():
        Ledger.open(Path(silo.silo.state_dir), silo.silo.id, "d", Budget(1, 1e-5)).close_file()
    assert simulated_silos(config, tmp_path) == first


def test_names_that_differ_in_case_alone_are_refused_by_name(run, tmp_path):
    with pytest.raises(InputError, match=r"'NORTH', 'North', 'north' differ in case alone; write each"):
        simulated_silos(run(["North", "north", "NORTH", "South"]), tmp_path)
    assert list(simulated_silos(run(["Ward 1", "Ward 01"]), tmp_path)) == ["Ward 01", "Ward 1"]  # shown by the plan


def test_the_plan_shows_names_that_look_alike(run, tmp_path):
    assert estimate(run(["North", "north", "North ", "South"]))["federated"]["silos_that_look_alike"] == [
        ["North", "north"]
    ]
    (tmp_path / "d.jsonl").unlink()
    rows_of.cache_clear()
    missing = load("tiny", [f"data.private.source={tmp_path}/d.jsonl"])
    assert "d.jsonl: no such file" in estimate(missing)["federated"]["silos_that_look_alike"]
    hub = load("tiny", ["data.private.source=hf:nowhere"])
    assert estimate(hub)["federated"]["silos_that_look_alike"].startswith("not looked at: hf:nowhere")


def test_the_plan_says_which_files_of_a_folder_are_the_silos(run, tmp_path):
    config = run(["North", "South"])
    assert "files_of_the_silos" not in estimate(config)["federated"]
    (tmp_path / "d.jsonl.bak").write_text("")
    rows_of.cache_clear()
    found = estimate(run(["North", "South"], f"source={tmp_path}"))["federated"]["files_of_the_silos"]
    assert found == f"{tmp_path}: files read: 1; left out: 1 of another kind (d.jsonl.bak)"


def test_a_long_name_that_is_not_ascii_has_a_folder_of_its_own(run, tmp_path):
    config = run([LONG, LONG + "\u697c"])
    for name, silo in simulated_silos(config, tmp_path).items():
        Ledger.open(Path(silo.silo.state_dir), name, "d", Budget(1, 1e-5)).close_file()
    assert len(list((tmp_path / "state").glob("*/*/ledger.sqlite"))) == 2
    assert len(simulated_silos(config, tmp_path)) == 2


def test_a_column_of_texts_is_no_column_of_names(run, tmp_path):
    with pytest.raises(InputError, match="2 of its names are longer than 100 characters") as refused:
        simulated_silos(run(["a" * 101, "b" * 101]), tmp_path)
    assert "aaa" not in str(refused.value)
