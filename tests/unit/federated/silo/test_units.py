import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.errors import InputError
from configs.load import load
from configs.schema.silo import SiloConfig
from federated.silo import units as of_silo
from federated.silo.units import rows_of
from federated.simulation.simulated_places import simulated_silo
from trainer.data.reading.counts import ReadCounts
from trainer.tasks.text import joined

KEY = bytes(range(32))


def load_units(config, key):
    """A silo's units, each as the one text that its rows make."""
    found = of_silo.load_units(config, key)
    return replace(found, train=tuple(map(joined, found.train)), held_out=tuple(map(joined, found.held_out)))


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
    units = load_units(config(write(tmp_path, [*rows, {"text": "half \ud800", "unit": "c"}]), unit="unit"), KEY)
    assert len(units.train) + len(units.held_out) == 3
    assert units.counts == ReadCounts(rows=6, without_unit=2, half_characters=1)
    assert all(text.encode() for text in [*units.train, *units.held_out])


def everyone(units):
    return sorted([*units.train, *units.held_out])


def table(folder, name, rows, patient):
    folder.mkdir(exist_ok=True)
    columns = {"text": [text for text, _ in rows], "patient": pa.array([unit for _, unit in rows], patient)}
    pq.write_table(pa.table(columns), folder / name)
    rows_of.cache_clear()


def test_one_person_is_one_unit_whether_an_id_came_as_a_float_as_an_integer_or_as_text(tmp_path):
    """Before: pandas makes floats of a column with one id missing, and everyone in two files was two units."""
    source = tmp_path / "visits"
    table(source, "2023.parquet", [(f"2023 {i}", i) for i in range(9)], pa.int64())
    table(source, "2024.parquet", [(f"2024 {i}", None if i == 5 else float(i)) for i in range(9)], pa.float64())
    (source / "2025.csv").write_text("text,patient\n" + "".join(f"2025 {i}, {i}.0\n" for i in range(9)))
    units = load_units(config(source, unit="patient"), KEY)
    years = {i: [2023, 2025] if i == 5 else [2023, 2024, 2025] for i in range(9)}
    assert everyone(units) == sorted("\n\n".join(f"{year} {i}" for year in years[i]) for i in range(9))
    assert units.counts.without_unit == 1
    assert units.notes == (
        f"{source}: files read: 3; left out: none",
        "column 'patient': 9 ids are written in several ways, and each is one unit",
    )


@pytest.mark.parametrize("missing", [float("nan"), None])
def test_strangers_without_an_id_are_never_one_unit(tmp_path, missing):
    """Before: a NaN is no None, and so all of them were one."""
    rows = [(f"t{i}", missing if i % 2 else float(i)) for i in range(20)]
    table(tmp_path / "d", "d.parquet", rows, pa.float64())
    units = load_units(config(tmp_path / "d", unit="patient"), KEY)
    assert everyone(units) == sorted(f"t{i}" for i in range(0, 20, 2))
    assert units.counts.without_unit == 10


def test_a_source_without_any_id_is_an_input_error(tmp_path):
    path = write(tmp_path, [{"text": f"t{i}", "unit": " "} for i in range(9)])
    with pytest.raises(
        InputError, match=r"no record in .*whose rows name 0 .*; rows without silo or unit are left out"
    ):
        load_units(config(path, unit="unit"), KEY)


def test_blanks_and_other_unicode_forms_are_the_same_person_and_blanks_alone_are_nobody(tmp_path):
    ids = ["P0", " P0", "P0\u00a0", "Jos\u00e9", "Jose\u0301", " ", "\t", "P1"]
    path = write(tmp_path, [{"text": f"t{i}", "unit": unit} for i, unit in enumerate(ids)])
    units = load_units(config(path, unit="unit"), KEY)
    assert everyone(units) == ["t0\n\nt1\n\nt2", "t3\n\nt4", "t7"]
    assert units.counts.without_unit == 2


def test_silos_whose_names_differ_in_blanks_are_one_and_in_case_are_shown_to_the_steward(tmp_path):
    names = ["North", "north", "North ", "South", None, " "]
    path = write(tmp_path, [{"text": f"{name!r} {i}", "site": name} for i, name in enumerate(names * 2)])
    units = load_units(config(path, silo="site", id="North"), KEY)
    assert len(everyone(units)) == 4
    assert units.counts.without_unit == 4
    assert units.notes == (
        "column 'site': 1 pairs of ids look alike (case, leading zeros or blanks inside) and stay apart; where two are "
        "one, write them alike in the source",
    )
    with pytest.raises(
        InputError, match=r"^silo.id is 'North ': these rows and their ledger are those of silo 'North'"
    ):
        load_units(config(path, silo="site", id="North "), KEY)
    with pytest.raises(InputError, match=r"^silo.id is ' ': that is no name"):
        load_units(config(path, silo="site", id=" "), KEY)


def test_ids_that_look_alike_stay_apart_and_only_their_number_is_told(tmp_path):
    ids = ["p7", "P7", "p07", "p70", "q1", "q 1"]
    path = write(tmp_path, [{"text": f"t{i}", "unit": unit} for i, unit in enumerate(ids)])
    units = load_units(config(path, unit="unit"), KEY)
    assert len(everyone(units)) == len(ids)
    (note,) = units.notes
    assert note.startswith("column 'unit': 4 pairs of ids look alike")
    assert not any(name in note for name in ids)


@pytest.mark.parametrize(
    ("ids", "problem"),
    [
        (
            ["a\ud83d", "a\ud83e"],
            "1: column 'unit' holds a character that was lost before; write the source anew, in UTF-8",
        ),
        ([4711.25, "x"], "1: column 'unit' holds a number that is not whole, whose spelling"),
        ([2.0**60, "x"], "1: column 'unit' holds a floating-point number of 2^53 or more"),
        ([["P0"], "x"], "1: column 'unit' holds a value of the type list; write the column as text"),
        (
            [4711, True],
            "2: column 'unit' holds numbers and truth values by now, so that one identity could be taken for two",
        ),
    ],
)
def test_ids_that_cannot_be_told_apart_are_refused_by_line_and_column_without_their_values(tmp_path, ids, problem):
    path = write(tmp_path, [{"text": f"t{i}", "unit": unit} for i, unit in enumerate(ids)])
    with pytest.raises(InputError) as refused:
        load_units(config(path, unit="unit"), KEY)
    assert str(refused.value).startswith(f"{path}, line {problem}")
    assert not any(value in str(refused.value) for value in ("4711", "P0", "\ud83d", "1152921504606846976"))


def test_names_in_another_encoding_are_refused_instead_of_being_one(tmp_path):
    """Before: what is not UTF-8 is replaced, and then two names are one."""
    (tmp_path / "d.csv").write_bytes(b"text,patient\none,M\xfcller\ntwo,M\xf6ller\n")
    rows_of.cache_clear()
    with pytest.raises(InputError, match=r"d.csv, line 2: column 'patient' holds a character that was lost"):
        load_units(config(tmp_path / "d.csv", unit="patient"), KEY)


def held_out_before(key, unit, fraction=0.1):
    """The rule of the split as it was first written, with the id as it stood in the file."""
    digest = hashlib.blake2b(unit.encode(errors="replace"), key=key, digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def test_a_unit_whose_id_was_canonical_stays_on_its_side_of_the_split(tmp_path):
    ids = [*(f"P{i}" for i in range(300)), *range(300), "007", "Jos\u00e9", "2024-01-05", "1.5"]
    path = write(tmp_path, [{"text": f"text of {unit!r}", "unit": unit} for unit in ids])
    units = load_units(config(path, unit="unit"), KEY)
    assert set(units.held_out) == {f"text of {unit!r}" for unit in ids if held_out_before(KEY, str(unit))}


def test_every_other_spelling_goes_where_the_canonical_form_goes(tmp_path):
    """So no spelling of a person is trained on while another one is held out, whichever an export has."""
    spelled = [[f"{i}", f"{i}.0", float(i), f" {i}"][i % 4] for i in range(400)]
    path = write(tmp_path, [{"text": f"text {i}", "unit": unit} for i, unit in enumerate(spelled)])
    units = load_units(config(path, unit="unit"), KEY)
    assert set(units.held_out) == {f"text {i}" for i in range(400) if held_out_before(KEY, str(i))}


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
    with pytest.raises(InputError, match=r"silo 'west': no record in .*, whose rows name 2 other silos;"):
        load_units(config(write(tmp_path, ROWS), silo="silo", id="west"), KEY)
    with pytest.raises(InputError, match=r"no column 'site'"):
        load_units(config(write(tmp_path, ROWS), silo="site"), KEY)


def test_a_record_in_a_backup_is_no_second_unit_and_the_steward_is_told_what_was_read(tmp_path):
    folder = tmp_path / "d"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    for name in ("d.jsonl", "d (copy).jsonl", ".ipynb_checkpoints/d-checkpoint.jsonl"):
        write(folder, [{"text": f"note {i}"} for i in range(40)], name)
    units = load_units(config(folder), KEY)
    assert everyone(units) == sorted(f"note {i}" for i in range(40))
    assert units.notes == (
        f"{folder}: files read: 1; left out: 1 hidden (.ipynb_checkpoints/), 1 with the same rows as another "
        "(d.jsonl as d (copy).jsonl)",
    )
