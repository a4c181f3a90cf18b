"""CSV: commas between fields, double quotes around those that hold commas or line breaks, a header first."""

import csv
from collections.abc import Iterator
from io import BufferedReader

from configs.errors import InputError
from trainer.data.reading import rows
from trainer.data.reading.encodings import read_lines
from trainer.data.reading.rows import Row, Wanted, check_columns, too_large

csv.field_size_limit(rows.LARGEST_RECORD)  # Python's own is 131,072 characters: less than a long document
_HEADER = "the first line has to be the header, with commas between the names, and nothing above it; "


def read_csv(file: BufferedReader, name: str, wanted: Wanted) -> Iterator[Row]:
    """Yields a row per record; blank lines are none.

    Raises:
        InputError: the header lacks a column or has it twice, or comes again; a record has another number of fields;
            or the file is no CSV.
    """
    found = records(read_lines(file, name, wanted.encoding, ""), name)
    line, header = next(found, (1, []))
    check_columns(header, wanted.columns, f"{name}, line {line}", _HEADER)
    places = [(column, header.index(column)) for column in wanted.columns]
    expected, place = len(header), f"{name}, line"
    for line, record in found:
        if len(record) != expected:
            raise InputError(
                f"{place} {line}: {len(record)} fields, and the header has {expected}; put double quotes around a text "
                "that holds commas, quotes or line breaks"
            )
        if record == header and expected > 1:
            raise InputError(f"{place} {line}: the header stands there again; take that line out, or make two files")
        wanted.counts.place = (place, line)
        yield {column: record[at] for column, at in places}


def records(lines: Iterator[str], name: str) -> Iterator[tuple[int, list[str]]]:
    """Records that are not blank, each with the line that it begins on."""
    size, start = 0, 1

    def bounded() -> Iterator[str]:
        nonlocal size
        for line in lines:
            size += len(line)
            if size > rows.LARGEST_RECORD:
                raise too_large(f"{name}, line {start}", "is a double quote left open there?")
            yield line

    reader = csv.reader(bounded(), strict=True)
    while True:
        try:
            record = next(reader, None)
        except csv.Error as error:  # its words are constants of Python's
            raise InputError(f"{name}, line {start}: not CSV ({error}); look at the quotes from there on") from None
        if record is None:
            return
        if record:
            yield start, record
        size, start = 0, reader.line_num + 1
