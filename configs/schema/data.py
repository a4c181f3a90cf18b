"""Settings of the data: where it comes from, how public text is cleaned, and its tokenizer."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.schema.base import Count, CountBySilo, Encoding, Positive, Probability, Settings
from configs.schema.places import Place

PUBLIC = "public"
DATA = Place("the data", unless="(embedded|hf):.*")
_HUB, _EMBEDDED = "hf:", "embedded:"
LARGEST_DATASET_NAME = 255 - len(".anchor")  # a folder has this name, and its ledger's anchor one that is longer
CorpusName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=100)]


class SourceSettings(Settings):
    """Where records come from: embedded data, a file, a folder, or a Hugging Face dataset."""

    source: Annotated[str, DATA, Field(min_length=1)]
    """``embedded:NAME``, a path (JSON, with an object per line or an array of them, CSV, Parquet, a text file, or a
    folder of these), or ``hf:DATASET``."""
    text: str = "text"
    """Column that holds the text. Text files have this one column: a file is a record."""
    split: str = "train"
    """Split to read from a Hugging Face dataset."""
    encoding: Encoding = "utf-8"
    """How JSONL, CSV and text files without a byte order mark are encoded: ``"latin-1"``, ``"cp1252"``,
    ``"utf-16-le"``, ... A byte order mark goes before it. Nothing is guessed."""


class RecordSettings(SourceSettings):
    """Records of a task: a silo's words for what the federation calls by other names."""

    columns: dict[str, str] = Field(default_factory=dict)
    """Columns of this source by the names that the task has for them, ``{label = "diagnosis"}``; left out: the task's
    own name. The text's column is ``text`` above."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels of the federation by the words of this source, ``{pos = "positive"}``; a word that is a label already
    needs no entry."""
    language: Annotated[str, Field(pattern=r"^[A-Za-z]{2,3}(-[A-Za-z0-9]{1,8})*$", max_length=35)] = "en"
    """Language of the texts (``"zh"``, ``"de"``), by whose rules answers are compared."""

    @model_validator(mode="after")
    def _text_is_named_once(self) -> "RecordSettings":
        if "text" in self.columns:
            raise ValueError(
                f"columns.text is {self.columns['text']!r}: the text's column is named by `text` itself; give it there"
            )
        return self

    def __hash__(self) -> int:
        """Settings are looked up by their values, mappings included."""
        return hash(self.model_dump_json())

    def column(self, field: str) -> str:
        """The source's own name for a field of the task."""
        return self.text if field == "text" else self.columns.get(field, field)


class CorpusSettings(SourceSettings):
    """A public corpus."""

    weight: Positive = 1.0
    """Share of its samples among those of all corpora, relative to the others' weights."""


class PrivateSettings(RecordSettings):
    """The data of the silos, for a simulation on one machine."""

    dataset_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=LARGEST_DATASET_NAME)]
    """The steward's name for this dataset. Its ledgers outlive runs: a new name is a new privacy budget, so
    change it only when the people in the data have changed."""
    silo: str = "silo"
    """Column that names the silo of a record."""
    unit: str = ""
    """Column that names the privacy unit (a person, a device); empty: every record is a unit of its own."""
    max_rows_per_unit: Count = 8
    """Rows kept of one unit; which ones depends on that unit alone."""
    public: bool = False
    """True only for data that everyone may see: it allows figures read in the clear and the run without DP."""
    public_record_count: Count
    """Training units of a silo, rounded, declared by the steward and never computed from the data."""
    public_record_counts: CountBySilo = Field(default_factory=dict)
    """The same for single silos, by name, where they differ."""
    held_out_fraction: Probability = 0.1
    """Share of the units that are never trained on, chosen by a keyed hash of the unit."""

    def record_count(self, silo: str) -> int:
        """The declared number of training units of a silo."""
        return self.public_record_counts.get(silo, self.public_record_count)


class DeidentifySettings(Settings):
    """Replacing what identifies people by ``<KIND>`` before anything else reads a text (Presidio; extra ``deid``).

    Hygiene, not differential privacy: what it misses stays in.
    """

    enabled: bool = False
    """Replace identifiers in the public corpus and in the silos' records."""
    names_file: Annotated[str, Place("the names")] = ""
    """File of names, one per line, found as written and in capitals, in every Unicode form; empty: none."""
    spacy_model: Annotated[str, Place("the model that finds names", secret=False, unless=r"[^/~.][^/]*")] = ""
    """Installed spaCy model, or its folder (a path with a slash), that finds names; empty: none. Never downloaded."""
    countries: tuple[str, ...] = ("us", "uk")
    """Countries whose national ids are looked for, by Presidio's codes."""
    medical_record_pattern: str = r"(?<=\b(?:MRN|medical record(?: (?:number|no))?)[.:# ]{1,3})[A-Z]{0,3}-?\d{5,10}\b"
    """Regular expression of a medical record number; letters of either case."""


class DataSettings(Settings):
    """Public text for pretraining, private text for the silos, and how the public text is cleaned."""

    public: CorpusSettings | None = None
    """The public corpus. Tokenizer and base model see nothing but this and ``corpora``. Needed unless ``model.source``
    names a model."""
    corpora: dict[CorpusName, CorpusSettings] = Field(default_factory=dict)
    """Further public corpora by name; every batch mixes all of them by their weights."""
    workers: Count = 1
    """Processes that clean and tokenise the public corpora. With more than one, the work is done by tasks of Ray Data:
    on a cluster all its CPUs take part, and ``run.storage`` must be shared."""
    packing: Literal["concatenate", "documents"] = "concatenate"
    """``concatenate`` fills windows across documents; ``documents`` keeps attention and loss inside a document."""
    private: PrivateSettings
    """The data of the silos."""
    validation_fraction: Probability = 0.05
    """Share of the public documents held out from pretraining."""
    min_characters: Count = 40
    """Public documents with fewer code points are dropped, in every script."""
    near_duplicate_similarity: Annotated[float, Field(ge=0.1, le=0.95)] = 0.8
    """Public documents with at least this Jaccard similarity (5-word shingles, MinHash) count as copies. In scripts
    without spaces a character is a word."""
    deidentify: DeidentifySettings = DeidentifySettings()
    """What is replaced in the public corpus and, in a simulation, in the silos' records."""

    @model_validator(mode="after")
    def _names_differ(self) -> "DataSettings":
        if PUBLIC in self.corpora:
            raise ValueError(f"data.corpora.{PUBLIC}: that is the name of data.public; give another name")
        return self


class TokenizerSettings(Settings):
    """Byte-level BPE, trained on the public corpus only."""

    vocab_size: Annotated[int, Field(ge=260, le=2**20)] = 2048
    """Number of tokens, the end-of-text token included."""


def corpora(data: DataSettings) -> dict[str, CorpusSettings]:
    """All public corpora: ``data.public`` and those of ``data.corpora``."""
    return {**({PUBLIC: data.public} if data.public else {}), **data.corpora}


def field_of(corpus: str) -> str:
    """The setting that names a corpus' source."""
    return "data.public.source" if corpus == PUBLIC else f"data.corpora.{corpus}.source"


def overlaps(one: SourceSettings, other: SourceSettings) -> bool:
    """Whether two sources may have a record in common, by where they are; where that can't be told, they may.

    Splits keep two readings of one Hugging Face dataset apart only if both are plain names: ``train[:50%]`` is a part
    of another split, ``train+test`` a sum, and ``all`` has every one.
    """
    here, there = _where(one.source), _where(other.source)
    if _same(here, there) and one.source.startswith(_HUB) and other.source.startswith(_HUB):
        splits = {one.split.casefold(), other.split.casefold()}
        return len(splits) == 1 or not all(re.fullmatch(r"\w+", split) and split != "all" for split in splits)
    if isinstance(here, Path) and isinstance(there, Path):
        return here.is_relative_to(there) or there.is_relative_to(here)
    return _same(here, there)


def _where(source: str) -> Path | str:
    """A path, also where ``datasets`` reads one; else a name, which the hub finds in capitals and small letters."""
    name = source.removeprefix(_HUB)
    if not source.startswith((_HUB, _EMBEDDED)) or Path(name).is_absolute() or Path(name).exists():
        return Path(name).resolve()
    return name.removeprefix("hf://datasets/").strip("/").casefold()


def _same(here: Path | str, there: Path | str) -> bool:
    """Of two names, one may lack the dataset's owner: the hub finds many a dataset without."""
    if isinstance(here, Path) or isinstance(there, Path):
        return here == there
    return f"/{here}".endswith(f"/{there}") or f"/{there}".endswith(f"/{here}")
