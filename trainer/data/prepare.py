"""The prepare stage: public text in, ``corpus/`` (packed tokens) and ``tokenizer/`` out, each with a manifest."""

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from configs.artifacts import Manifest, commit_manifest, damaged_file, digest_json, read_manifest, write_failure
from configs.corpora import corpora, field_of
from configs.data_settings import PUBLIC
from configs.errors import InputError
from configs.schema import RunConfig
from trainer.data.cleaning import CleaningCounts, clean
from trainer.data.packing import pack
from trainer.data.sources import ReadCounts, read_rows
from trainer.data.tokenizer import train_tokenizer

VALIDATION_TOKENS = "tokens-validation.bin"


def train_tokens(corpus: str) -> str:
    """File name of a corpus' training tokens."""
    return f"tokens-train-{corpus}.bin"


class Deidentify(Protocol):
    """What replaces identifiers in a text; lives in ``privacy``, which nothing here may import."""

    @property
    def digest(self) -> str:
        """Of everything that shapes its results."""

    @property
    def counts(self) -> Mapping[str, int]:
        """Spans replaced so far, by kind."""

    def __call__(self, text: str, /) -> str:
        """The text without them."""


def prepare(config: RunConfig, run_directory: Path, deidentify: Deidentify | None = None) -> Manifest:
    """Cleans the public corpus, trains the tokenizer on it, and packs it.

    Args:
        config: the run's settings.
        run_directory: receives ``corpus/`` and ``tokenizer/``.
        deidentify: treats every document first, where ``data.deidentify`` is on.

    Returns:
        The corpus' manifest; its metadata holds the counts. Nothing is done again where it is already there.

    Raises:
        InputError: the corpus is empty, or too small for one batch and one validation window.
        ValueError: ``deidentify`` is missing though the settings ask for it.
    """
    if config.data.deidentify.enabled and deidentify is None:
        raise ValueError("data.deidentify.enabled is true: give prepare() a deidentifier")
    corpus, tokenizer_directory = run_directory / "corpus", run_directory / "tokenizer"
    settings = digest_json([*_shaping(config), config.run.seed, *([deidentify.digest] if deidentify else [])])
    done = finished(corpus, "corpus", settings)
    if done is not None and finished(tokenizer_directory, "tokenizer", settings) is not None:
        return done
    for directory in (corpus, tokenizer_directory):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    documents, metadata = _read_public(config, deidentify)
    parts = {name: _split(texts, config.data.validation_fraction, config.run.seed) for name, texts in documents.items()}
    tokenizer = train_tokenizer(
        [text for train, _ in parts.values() for text in train], config.tokenizer.vocab_size, tokenizer_directory
    )
    commit_manifest(
        tokenizer_directory,
        Manifest("tokenizer", settings, metadata={"vocab_size": len(tokenizer), "trained_on": "public"}),
    )

    def packed(texts: Iterable[str], name: str) -> dict[str, int]:
        return pack(texts, tokenizer, corpus / name, config.model.context_length, config.data.packing)

    try:
        metadata["train"] = {name: packed(train, train_tokens(name)) for name, (train, _) in parts.items()}
        held_out = (text for _, validation in parts.values() for text in validation)
        metadata["validation"] = packed(held_out, VALIDATION_TOKENS)
    except OSError as error:
        raise write_failure(corpus, error) from error
    metadata["vocab_size"] = len(tokenizer)
    _check_size(config, metadata)
    return commit_manifest(corpus, Manifest("corpus", settings, metadata=metadata))


def finished(directory: Path, kind: str, config_digest: str) -> Manifest | None:
    """The manifest of a directory that is complete, undamaged and made with these settings; else None."""
    manifest = read_manifest(directory, kind)
    if manifest is None or manifest.config_digest != config_digest or damaged_file(directory, manifest):
        return None
    return manifest


def _shaping(config: RunConfig) -> list[Any]:
    data = config.data
    sources = {name: source.model_dump(exclude={"weight"}) for name, source in corpora(data).items()}
    cleaning = [data.validation_fraction, data.min_characters, data.near_duplicate_similarity]
    # A concatenated corpus is cut into windows as it is read, a packed one as it is written.
    packing = [data.packing, config.model.context_length] if data.packing == "documents" else [data.packing]
    return [sources, *cleaning, *packing, config.tokenizer.model_dump()]


def _read_public(config: RunConfig, deidentify: Deidentify | None) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Every corpus' documents; a copy is dropped wherever it stands, the first one stays."""
    sources, read, cleaned = corpora(config.data), ReadCounts(), CleaningCounts()
    origins: list[str] = []

    def texts() -> Iterator[str]:
        for name, source in sources.items():
            for row in read_rows(source, [], read):
                origins.append(name)
                yield (deidentify or str)(row[source.text])

    documents: dict[str, list[str]] = {name: [] for name in sources}
    for place, text in clean(texts(), config.data.min_characters, config.data.near_duplicate_similarity, cleaned):
        documents[origins[place]].append(text)
    for name, source in sources.items():
        if not documents[name]:
            raise InputError(
                f"{field_of(name)} {source.source!r}: no document is left of {read.rows} rows ({read.empty} empty, "
                f"{cleaned.too_short} shorter than data.min_characters {config.data.min_characters}, "
                f"{cleaned.exact_duplicates + cleaned.near_duplicates} copies); give more text or lower "
                "data.min_characters"
            )
    metadata = {"cleaning": cleaned.as_dict(), "replaced_utf8": read.replaced_utf8, "empty": read.empty}
    return documents, {**metadata, **({"deidentified": dict(deidentify.counts)} if deidentify else {})}


def _split(documents: list[str], fraction: float, seed: int) -> tuple[list[str], list[str]]:
    """Train and validation documents; a document's side depends on its own text and the seed alone."""
    parts: tuple[list[str], list[str]] = ([], [])
    for document in documents:
        digest = hashlib.blake2b(document.encode(), key=str(seed).encode(), digest_size=8).digest()
        parts[int.from_bytes(digest, "big") < fraction * 2**64].append(document)
    return parts


def _check_size(config: RunConfig, metadata: dict[str, Any]) -> None:
    """Every corpus fills a window, all together a batch, and there is something to validate on."""
    found = {field_of(name): (counts["windows"], 1) for name, counts in metadata["train"].items()}
    found["validation text of the public corpora"] = (metadata["validation"]["windows"], 1)
    if len(metadata["train"]) == 1:
        found[field_of(PUBLIC)] = (metadata["train"][PUBLIC]["windows"], config.pretrain.batch_size)
    for field, (windows, needed) in found.items():
        if windows < needed:
            raise InputError(
                f"{field}: its tokens fill {windows} windows of model.context_length {config.model.context_length}, "
                f"fewer than the {needed} needed; give more text, or lower pretrain.batch_size or model.context_length"
            )
