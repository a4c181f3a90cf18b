import json
from pathlib import Path

import pytest

from configs.errors import InputError
from configs.load import load
from configs.schema.silo import SiloConfig
from federated.silo.units import load_units, rows_of
from federated.simulation.simulated_places import simulated_silo

KEY = bytes(range(32))


def config(path, **data):
    return SiloConfig(
        silo={
            "id": data.pop("id", "north"),
            "dataset_id": "d",
            "state_dir": "/nowhere",
            "base_model": "/nowhere",
            "public_record_count": 100,
        },
        data={"source": str(path), **data},
        policy={"budget_epsilon": 1.0, "budget_delta": 1e-5},
    )


def write(tmp_path, rows, name="d.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows_of.cache_clear()
    return path


ROWS = [{"text": f"note {i}", "silo": "north" if i % 3 else "south", "unit": f"p{i % 40}"} for i in range(400)]


def test_the_split_depends_on_one_unit_alone(tmp_path):
    whole = load_units(config(write(tmp_path, ROWS), silo="silo"), KEY)
    fewer = load_units(config(write(tmp_path, ROWS[1:-1], "e.jsonl"), silo="silo"), KEY)
    assert set(fewer.held_out) <= set(whole.held_out)
    assert set(fewer.train) <= set(whole.train)
    assert not set(whole.train) & set(whole.held_out)
    assert 0.03 < len(whole.held_out) / (len(whole.train) + len(whole.held_out)) < 0.2
    other = load_units(config(write(tmp_path, ROWS), silo="silo"), bytes(32))
    assert set(other.held_out) != set(whole.held_out)


def test_a_silo_sees_only_its_own_records(tmp_path):
    path = write(tmp_path, ROWS)
    north = load_units(config(path, silo="silo"), KEY)
    south = load_units(config(path, silo="silo", id="south"), KEY)
    assert len(north.train) + len(north.held_out) == sum(row["silo"] == "north" for row in ROWS)
    assert not set(north.train) & set(south.train)


def test_all_rows_of_a_unit_are_one_record_capped_by_itself(tmp_path):
    units = load_units(config(write(tmp_path, ROWS), silo="silo", unit="unit", max_rows_per_unit=3), KEY)
    everything = [*units.train, *units.held_out]
    people = {row["unit"] for row in ROWS if row["silo"] == "north"}
    assert len(everything) == len(people)
    assert all(len(text.split("\n\n")) == 3 for text in everything)
    # Taking another person's rows away changes nothing for those who stay.
    rows = [row for row in ROWS if row["unit"] != "p7"]
    fewer = load_units(config(write(tmp_path, rows, "f.jsonl"), silo="silo", unit="unit", max_rows_per_unit=3), KEY)
    assert set(everything) - {*fewer.train, *fewer.held_out} <= {
        text for text in everything if "note 7\n" in text + "\n" or "7" in text
    }
    assert len(everything) - len([*fewer.train, *fewer.held_out]) == 1


def test_rows_whose_unit_is_unknown_are_left_out_and_half_characters_are_mended(tmp_path):
    rows = [{"text": f"t{i}", "unit": unit} for i, unit in enumerate(["a", None, "", "b", "a"])]
    units = load_units(config(write(tmp_path, [*rows, {"text": "half \ud800", "unit": "\udfff"}]), unit="unit"), KEY)
    assert len(units.train) + len(units.held_out) == 3
    assert (units.counts.without_unit, units.counts.replaced_utf8) == (2, 1)
    assert all(text.encode() for text in [*units.train, *units.held_out])


def test_a_silo_may_be_called_anything_and_stays_in_its_folder(tmp_path):
    states = [
        Path(simulated_silo(load("tiny", [f"federated.state_dir={tmp_path}"]), name, tmp_path).silo.state_dir)
        for name in ("St. Mary's", "../../etc", "..", "a/b", "\u00dcber")
    ]
    assert len(set(states)) == 5
    assert all(state.resolve().parent == tmp_path / "plays-tiny" for state in states)


def test_duplicates_stay_because_removing_them_would_look_across_records(tmp_path):
    units = load_units(config(write(tmp_path, [{"text": "same"}] * 5)), KEY)
    assert len(units.train) + len(units.held_out) == 5


def test_a_silo_without_records_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"silo 'west': no record in .*has north, south"):
        load_units(config(write(tmp_path, ROWS), silo="silo", id="west"), KEY)
    with pytest.raises(InputError, match=r"no column 'site'"):
        load_units(config(write(tmp_path, ROWS), silo="site"), KEY)
