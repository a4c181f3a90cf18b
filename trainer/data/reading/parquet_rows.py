"""Parquet: the wanted columns alone, in batches of bounded size."""

from collections.abc import Iterator
from typing import Any, BinaryIO

from configs.errors import InputError
from trainer.data.reading.arrow_rows import BATCH_ROWS, check_schema, rows_of_batch
from trainer.data.reading.rows import Row, Wanted

_BATCH_BYTES = 2**24
# By itself pyarrow reads the columns of whole row groups ahead, and does not compare the checksums of their pages.
_OPTIONS = {"pre_buffer": False, "buffer_size": 2**20, "page_checksum_verification": True}


def read_parquet(file: BinaryIO, name: str, wanted: Wanted) -> Iterator[Row]:
    """Yields a row per record.

    Args:
        file: one that can be sought in: a Parquet file is read from its end.
        name: for messages.
        wanted: what to read.

    Raises:
        InputError: the file can't be read, lacks a column, or its text column has another type.
    """
    first = 1
    for batch in _batches(file, name, wanted):
        yield from rows_of_batch(batch, first, name, wanted)
        first += batch.num_rows


def _batches(file: BinaryIO, name: str, wanted: Wanted) -> Iterator[Any]:
    import pyarrow.parquet as pq

    fault = ""
    try:
        with pq.ParquetFile(file, **_OPTIONS) as parquet:
            check_schema(parquet.schema_arrow, name, wanted)
            yield from parquet.iter_batches(_batch_rows(parquet), columns=list(wanted.columns), use_threads=False)
    except InputError:
        raise
    except Exception as error:
        # pyarrow raises a dozen unrelated types for a damaged file, with bytes of it in their words.
        if isinstance(error, OSError) and error.errno:
            raise  # the disk's, not the format's
        fault = _fault(str(error))
    if fault:
        raise InputError(f"{name}: {fault}")


def _batch_rows(parquet: Any) -> int:
    """Rows of a batch, so that it is of some megabytes wherever the file's records are large.

    By all columns of a record: pyarrow ends the process where one asks for the size of a column that is encrypted.
    """
    groups = map(parquet.metadata.row_group, range(parquet.num_row_groups))
    largest = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=1)
    return max(1, min(BATCH_ROWS, _BATCH_BYTES // max(1, largest)))


def _fault(words: str) -> str:
    words = words.lower()
    if "encrypt" in words or "decrypt" in words:
        return "encrypted Parquet can't be read; write it without Parquet's own encryption"
    if "codec" in words or "compression" in words:
        return "Parquet with a compression that can't be read here; write it anew, with zstd or none"
    return "not Parquet, or damaged or cut short; copy or write it again"
