"""One person, one unit: every spelling that the rule names has one form, and nobody else has it."""

import json
import unicodedata
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import InputError
from configs.identities import IdentityColumn, UnclearIdentityError, alike, canonical

EXACT = st.integers(-(2**53) + 1, 2**53 - 1)
BLANKS = st.text(" \t\r\n\u00a0\u2003\u200b\ufeff\0", max_size=4)
TIMES = st.datetimes(min_value=datetime(1000, 1, 1))
VALUES = st.one_of(st.text(), st.integers(), EXACT.map(float), st.booleans(), st.dates(), TIMES, st.none())


def form(value):
    try:
        return canonical(value)
    except UnclearIdentityError:
        return UnclearIdentityError


@given(EXACT)
def test_a_whole_number_is_its_digits_however_it_came(number):
    spellings = [number, float(number), Decimal(number), np.int64(number), np.float64(number), str(number)]
    spellings += [f"{number}.0", f" {number} ", Decimal(number).quantize(Decimal("1.00")), json.loads(f"{number}.0")]
    assert {canonical(spelling) for spelling in spellings} == {str(number)}


@given(st.integers(), st.integers())
def test_two_whole_numbers_are_never_one(one, other):
    assert (canonical(one) == canonical(other)) == (one == other)


@pytest.mark.parametrize(
    "number", [2.0**53, -(2.0**53), 1e300, f"{2**53}.0", pytest.param("9" * 5000 + ".0", id="text")]
)
def test_numbers_that_several_people_may_have_been_rounded_to_are_refused(number):
    with pytest.raises(UnclearIdentityError) as refused:
        canonical(number)
    assert "99" not in str(refused.value)


def test_a_number_that_python_does_not_write_is_refused():
    with pytest.raises(UnclearIdentityError, match="too many digits"):
        canonical(10**5000)


@pytest.mark.parametrize("number", [0.5, 17.25, float("inf"), float("-inf"), Decimal("3.10"), np.float32(0.1)])
def test_numbers_that_are_not_whole_are_refused(number):
    with pytest.raises(UnclearIdentityError, match="not whole"):
        canonical(number)


MISSING = (None, float("nan"), np.float32("nan"), Decimal("NaN"), pd.NaT, "", " ", "\t\u00a0\u200b\ufeff")


@pytest.mark.parametrize("value", [*MISSING, "nan", "NaN", " NaT ", "<NA>", "None", "NULL"])
def test_missing_is_missing_in_all_its_forms(value):
    assert canonical(value) is None


@given(st.text(), BLANKS, BLANKS)
def test_blanks_around_and_unicode_forms_make_no_other_identity(text, before, after):
    spellings = [text, before + text + after, *(unicodedata.normalize(form, text) for form in ("NFC", "NFD"))]
    assert len({form(spelling) for spelling in spellings}) == 1


WORDS = st.text(st.characters(categories=["L", "Mn", "P"]), min_size=1, max_size=4)


@given(WORDS, WORDS)
def test_words_are_one_only_where_unicode_calls_them_one(one, other):
    if canonical(one) is not None and canonical(one) == canonical(other):
        assert unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other)


@given(VALUES)
def test_a_form_is_its_own_form_and_what_a_csv_file_makes_of_a_value_has_it_too(value):
    found = form(value)
    if isinstance(found, str):
        assert canonical(found) == found
        assert canonical(str(value)) == found


@given(st.dates())
def test_a_date_that_came_as_a_time_is_the_date(day):
    midnight = datetime(day.year, day.month, day.day)
    spellings = [day, midnight, f"{day}", f"{midnight}", f"{day}T00:00", f"{day} 00:00:00.000"]
    assert {canonical(spelling) for spelling in spellings} == {day.isoformat()}


@given(TIMES.filter(lambda time: time.time() != datetime.min.time()))
def test_a_time_is_one_in_every_spelling_and_zone(time):
    assert {canonical(time), canonical(time.isoformat()), canonical(str(time))} == {str(time)}
    aware = time.replace(tzinfo=UTC)
    elsewhere = aware.astimezone(timezone(timedelta(hours=5, minutes=30))) if time.year < 9999 else aware
    assert {canonical(aware), canonical(elsewhere), canonical(elsewhere.isoformat())} == {str(aware)}


def test_nanoseconds_tell_times_apart():
    times = [pd.Timestamp(number) for number in (1, 2, 1000, 1_000_000_000, 0)]
    assert [canonical(time) for time in times] == [canonical(str(time)) for time in times]
    assert len({canonical(time) for time in times}) == len(times)
    assert canonical(times[-1]) == canonical(date(1970, 1, 1)) == "1970-01-01"


@pytest.mark.parametrize(
    "text", ["2024-13-45", "2024-02-30 00:00:00", "24:00", "1e5", "007", "007.0", "17.50", "v1.0.0"]
)
def test_what_only_looks_like_a_number_or_a_date_stays_as_it_is(text):
    assert canonical(text) == text


@pytest.mark.parametrize("value", [b"P0", [1], {"id": 1}, timedelta(1), "a\ud83d", "M\ufffdller", "\udfff"])
def test_what_has_no_form_is_refused_without_its_value(value):
    with pytest.raises(UnclearIdentityError) as refused:
        canonical(value)
    assert not any(part in str(refused.value) for part in ("P0", "a\ud83d", "ller"))


@pytest.mark.parametrize(
    "values",
    [
        [17, "P17", 18.0, None, "17", Decimal(3)],
        [True, "False", None],
        [date(2024, 1, 5), datetime(2024, 1, 5, 1), "2024-01-05", "2024-01-06 00:00:00"],
        ["True", "17", "2024-01-05", "P0"],
    ],
)
def test_kinds_of_values_that_have_one_spelling_may_stand_in_one_column(values):
    column = IdentityColumn("patient")
    assert [column.canonical(value, "d, row 1") for value in values] == [canonical(value) for value in values]


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([True, 1], "numbers and truth values"),
        (["yes", True], "texts and truth values"),
        ([date(2024, 1, 5), "05.01.2024"], "dates and texts"),
        ([20240105, date(2024, 1, 5)], "dates and numbers"),
        ([datetime(2024, 1, 5, tzinfo=UTC), datetime(2024, 1, 5)], "dates and times with a zone"),
    ],
)
def test_kinds_that_cannot_be_compared_are_refused_by_place_and_column_and_without_a_value(values, found):
    for ordered in (values, values[::-1]):
        column = IdentityColumn("patient")
        with pytest.raises(InputError) as refused:
            [column.canonical(value, f"d.jsonl, line {line}") for line, value in enumerate(ordered, 1)]
        assert str(refused.value) == (
            f"d.jsonl, line 2: column 'patient' holds {found} by now, so that one identity could be taken for two; "
            "write the column in one way, as text, in all files"
        )


def test_a_value_without_a_form_is_refused_by_its_place():
    with pytest.raises(InputError, match=r"^d.csv, line 7: column 'patient' holds a number that is not whole"):
        IdentityColumn("patient").canonical(0.123, "d.csv, line 7")


def test_what_looks_alike_is_told_and_stays_apart():
    names = ["North", "north", "NORTH", "south", "p07", "P7", "p70", "a b", "ab", "\u00b2", "2", "East"]
    assert alike(names) == [["2", "\u00b2"], ["NORTH", "North", "north"], ["P7", "p07"], ["a b", "ab"]]
    assert len({canonical(name) for name in names}) == len(names)
