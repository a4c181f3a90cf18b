"""Who is whom in data: one form for every spelling of an identity (a unit, a silo), so that one person is one unit.

The rule, for whatever a file's format made of an id:

- missing are None, NaN, NaT, a text of blanks alone, and the words that programs write for them;
- whole numbers are their digits, also where they came as 17.0, as a number or as text;
- dates and times are as ISO 8601 writes them, a midnight without a zone as its date, times with a zone in UTC;
- truth values are True and False;
- texts are in Unicode's form NFC, without blanks around.

What only looks alike (case, leading zeros, blanks inside) stays apart, and ``alike`` tells of it. What can't be told
apart is refused. No message has a value in it: values are private.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, date, datetime
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

from configs.errors import InputError

_UNSEEN = "\0\u200b\u200e\u200f\u2060\ufeff"  # not shown, and yet no white space to Python
_MISSING = {"", "nan", "NaN", "NaT", "<NA>", "None", "null", "NULL"}
_WHOLE = re.compile(r"(-?)(0|[1-9][0-9]*)\.0+")
_TIME = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})(?:[T ]([0-9]{2}:[0-9]{2}(?::[0-9]{2})?)(?:\.([0-9]{1,9}))?"
    r"(Z|[+-][0-9]{2}:?[0-9]{2}(?::?[0-9]{2})?)?)?"
)
_EXACT = 2**53  # floating-point numbers from here on may stand for several whole numbers
_TEXT, _NUMBER, _TRUTH, _DATE, _ZONED = "texts", "numbers", "truth values", "dates", "times with a zone"


class UnclearIdentityError(ValueError):
    """A value that can't be made canonical; the message says why, without the value."""


def canonical(value: Any) -> str | None:
    """The one form of an identity; None where it is missing.

    Raises:
        UnclearIdentityError: other people's identities may look exactly like this one.
    """
    return _read(value)[0]


class IdentityColumn:
    """One column of identities, whose values have to fit each other.

    Args:
        name: what it is called.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._typed: set[str] = set()
        self._texts: set[str] = set()

    def canonical(self, value: Any, where: str) -> str | None:
        """The one form of a row's value; None where it is missing.

        Args:
            value: what stands in the row.
            where: the row's place, for messages.

        Raises:
            InputError: it can't be told from others, or not compared with the values before it.
        """
        try:
            form, kind = _read(value)
        except UnclearIdentityError as error:
            raise InputError(f"{where}: column {self._name!r} holds {error}") from None
        if form is not None:
            (self._texts if isinstance(value, str) else self._typed).add(kind)
            self._check(where)
        return form

    def _check(self, where: str) -> None:
        """Numbers and texts are compared as texts. Dates and truth values have other spellings in a text."""
        kinds = self._typed if self._typed <= {_NUMBER} else self._typed | self._texts
        if len(kinds) > 1:
            raise InputError(
                f"{where}: column {self._name!r} holds {' and '.join(sorted(kinds))} by now, so that one "
                "identity could be taken for two; write the column in one way, as text, in all files"
            )


def alike(forms: Iterable[str]) -> list[list[str]]:
    """Groups of canonical forms that differ in case, leading zeros, blanks or Unicode's compatible signs alone."""
    groups = defaultdict(set)
    for form in forms:
        groups[_folded(form)].add(form)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


def _folded(form: str) -> str:
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", form).casefold())
    shown = "".join(c for c in text if not c.isspace() and unicodedata.category(c) != "Cf")
    return re.sub(r"(?<!\d)0+(?=\d)", "", shown)


def _read(value: Any) -> tuple[str | None, str]:
    """Form and kind. A text's kind is what it reads as."""
    if value is None:
        return None, _TEXT
    if isinstance(value, str):
        return _read_text(value)
    if isinstance(value, bool):
        return str(value), _TRUTH
    if isinstance(value, Integral):
        return _digits(int(value)), _NUMBER
    if isinstance(value, Real | Decimal):
        return _read_number(value), _NUMBER
    if isinstance(value, date):  # a time is one, and so is pandas' NaT
        return _read_text(value.isoformat())
    raise UnclearIdentityError(f"a value of the type {type(value).__name__}; write the column as text")


def _read_number(value: Real | Decimal) -> str | None:
    exact = value if isinstance(value, Decimal) else Decimal(float(value))
    if exact.is_nan():
        return None
    if exact.is_infinite() or exact != exact.to_integral_value():
        raise UnclearIdentityError(
            "a number that is not whole, whose spelling is not certain; write the column as text"
        )
    if not isinstance(value, Decimal):
        _check_exact(int(exact))
    return _digits(int(exact))


def _check_exact(number: int) -> None:
    if abs(number) >= _EXACT:
        raise UnclearIdentityError(
            "a floating-point number of 2^53 or more, which several whole numbers are rounded to; write the column "
            "anew as whole numbers or text"
        )


def _digits(number: int) -> str:
    try:
        return str(number)
    except ValueError:
        raise UnclearIdentityError("a number of too many digits; write the column as text") from None


def _read_text(value: str) -> tuple[str | None, str]:
    if any("\ud800" <= c <= "\udfff" or c == "\ufffd" for c in value):
        raise UnclearIdentityError("a character that was lost before; write the source anew, in UTF-8")
    text = unicodedata.normalize("NFC", value)
    while (shorter := text.strip().strip(_UNSEEN)) != text:
        text = shorter
    if text in _MISSING:
        return None, _TEXT
    if text in ("True", "False"):
        return text, _TRUTH
    if whole := _WHOLE.fullmatch(text):
        if len(whole[2]) > 16:
            _check_exact(_EXACT)
        number = int(whole[1] + whole[2])
        _check_exact(number)
        return str(number), _TEXT
    if (time := _TIME.fullmatch(text)) and (form := _time_form(time)):
        return form, _ZONED if time[4] else _DATE
    return text, _TEXT


def _time_form(found: re.Match[str]) -> str | None:
    """A time's form; None where there is no such time. Nanoseconds, which Python's times lack, are kept as digits."""
    day, clock, fraction, zone = found.groups(default="")
    try:
        time = datetime.fromisoformat(f"{day}T{clock or '00:00'}{zone}")
        time = time.astimezone(UTC) if zone else time
    except (ValueError, OverflowError):
        return None
    nanoseconds = fraction.rstrip("0").ljust(6, "0") if fraction.strip("0") else ""
    if zone or nanoseconds or time.time() != datetime.min.time():
        plain = time.replace(tzinfo=None).isoformat(sep=" ")
        return plain + (f".{nanoseconds}" if nanoseconds else "") + ("+00:00" if zone else "")
    return time.date().isoformat()
