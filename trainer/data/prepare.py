"""The prepare stage: public text in, ``corpus/`` (packed tokens) and ``tokenizer/`` out, each with a manifest."""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from configs.artifacts import Manifest, commit_manifest, damaged_file, digest_json, read_manifest, write_failure
from configs.data_settings import SourceSettings
from configs.errors import InputError
from configs.schema import RunConfig
from trainer.data.cleaning import CleaningCounts, clean
from trainer.data.packing import pack
from trainer.data.sources import ReadCounts, read_rows
from trainer.data.tokenizer import train_tokenizer

TRAIN_TOKENS = "tokens-train.bin"
VALIDATION_TOKENS = "tokens-validation.bin"


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
    shaping = [config.data.public.model_dump(), *_cleaning_settings(config), config.tokenizer.model_dump()]
    settings = digest_json([*shaping, config.run.seed, *([deidentify.digest] if deidentify else [])])
    done = finished(corpus, "corpus", settings)
    if done is not None and finished(tokenizer_directory, "tokenizer", settings) is not None:
        return done
    for directory in (corpus, tokenizer_directory):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    documents, metadata = _read_public(config, config.data.public, deidentify)
    train, validation = _split(documents, config.data.validation_fraction, config.run.seed)
    tokenizer = train_tokenizer(train, config.tokenizer.vocab_size, tokenizer_directory)
    commit_manifest(
        tokenizer_directory,
        Manifest("tokenizer", settings, metadata={"vocab_size": len(tokenizer), "trained_on": "public"}),
    )
    try:
        metadata["train"] = pack(train, tokenizer, corpus / TRAIN_TOKENS)
        metadata["validation"] = pack(validation, tokenizer, corpus / VALIDATION_TOKENS)
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


def _cleaning_settings(config: RunConfig) -> list[float]:
    data = config.data
    return [data.validation_fraction, data.min_characters, data.near_duplicate_similarity]


def _read_public(
    config: RunConfig, source: SourceSettings, deidentify: Deidentify | None
) -> tuple[list[str], dict[str, Any]]:
    read, cleaned = ReadCounts(), CleaningCounts()
    texts = map(deidentify or str, (row[source.text] for row in read_rows(source, [], read)))
    documents = list(clean(texts, config.data.min_characters, config.data.near_duplicate_similarity, cleaned))
    if not documents:
        raise InputError(
            f"data.public.source {source.source!r}: no document is left of {read.rows} rows "
            f"({read.empty} empty, {cleaned.too_short} shorter than data.min_characters {config.data.min_characters}); "
            "give more text or lower data.min_characters"
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
    context = config.model.context_length
    needed = {"train": config.pretrain.batch_size * context, "validation": context}
    for part, tokens in needed.items():
        if metadata[part]["tokens"] < tokens:
            raise InputError(
                f"data.public.source {config.data.public.source!r}: {metadata[part]['tokens']} {part} tokens are fewer "
                f"than the {tokens} needed; give more text, or lower pretrain.batch_size or model.context_length"
            )
