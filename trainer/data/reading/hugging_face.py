"""Hugging Face datasets, by the library ``datasets``."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.errors import InputError
from trainer.data.reading.arrow_rows import BATCH_ROWS, check_schema, rows_of_batch
from trainer.data.reading.rows import Row, Wanted


def read_hugging_face(name: str, split: str, wanted: Wanted) -> Iterator[Row]:
    """Yields the rows of a split.

    Raises:
        InputError: it can't be loaded, lacks a column, or its text column has another type.
    """
    source = f"hf:{name} (split {split!r})"
    dataset, fault = _load(name, split)
    if fault:
        raise InputError(f"{source}: can't be loaded ({fault}); check the name, the split and the network")
    if dataset.info.builder_name == "csv" and len(wanted.columns) > 1:
        # It takes the first of too many fields for an index, so that ids and texts stand under each other's names.
        raise InputError(f"{source}: ids in CSV are not read by way of hf:; give the path of the file or its folder")
    check_schema(dataset.features.arrow_schema, source, wanted)
    first = 1
    for table in dataset.select_columns(list(wanted.columns)).with_format("arrow").iter(BATCH_ROWS):
        yield from rows_of_batch(table, first, source, wanted)
        first += table.num_rows


def _load(name: str, split: str) -> tuple[Any, str]:
    """The dataset, and why it can't be loaded."""
    from datasets import load_dataset

    try:
        return load_dataset(name, split=split), ""
    except Exception as error:
        # The hub client and the builders raise a dozen unrelated types; each means that this input can't be read. Words
        # about names and the network can be shown, those about what is in the files can't.
        reason = str(error).splitlines() if isinstance(error, FileNotFoundError | ConnectionError) else []
        return None, (reason or [type(error).__name__])[0]


def hugging_face_folders() -> list[Path]:
    """Where the libraries behind ``hf:`` keep copies of what they load, and code and tokens to load it with."""
    from datasets import config
    from huggingface_hub import constants

    names = ("HF_CACHE_HOME", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "DOWNLOADED_DATASETS_PATH")
    places = [getattr(config, name) for name in (*names, "EXTRACTED_DATASETS_PATH")]
    return [
        Path(place) for place in (*places, constants.HF_HUB_CACHE, constants.HF_XET_CACHE, constants.HF_ASSETS_CACHE)
    ]
