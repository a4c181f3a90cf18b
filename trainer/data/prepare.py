"""The prepare stage: public text in, ``corpus/`` (packed tokens) and ``tokenizer/`` out, each with a manifest."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.schema.data import corpora, field_of
from configs.schema.schema import RunConfig
from configs.storage.files import canonical_json, digest_json, write_atomic, write_failure
from configs.storage.layout import RunFiles
from configs.storage.manifests import Manifest, commit_manifest, finished
from trainer.data.cleaning import RULES
from trainer.data.origins import ORIGINS, digests, origin, since, since_prepared
from trainer.data.packing import (
    DTYPE_FIELD,
    VALIDATION_TOKENS,
    lengths_apart,
    pack,
    token_dtype,
    train_tokens,
)
from trainer.data.parts import Deidentify, MapParts, Parts, one_after_the_other
from trainer.data.sources import ReadCounts, read_rows
from trainer.data.tokenizer import special_tokens, train_tokenizer


def prepare(
    config: RunConfig,
    run_directory: Path,
    deidentify: Deidentify | None = None,
    map_parts: MapParts = one_after_the_other,
    on_part: Callable[[int, int], object] = lambda _done, _of: None,
    on_note: Callable[[str], object] = lambda _line: None,
    on_changed: Callable[[Sequence[str]], object] = lambda _lines: None,
) -> Manifest:
    """Cleans the public corpora, trains the tokenizer on them, and packs them.

    Args:
        config: the run's settings.
        run_directory: receives ``corpus/`` and ``tokenizer/``.
        deidentify: treats every document first, where ``data.deidentify`` is on.
        map_parts: where the parts are cleaned and tokenised.
        on_part: told how many parts are done, and of how many.
        on_note: told which files of a folder were read, and what is not as it was when the corpus was prepared.
        on_changed: told, a line for each source, why a finished corpus is about to be made anew; may refuse.

    Returns:
        The corpus' manifest; its metadata holds the counts. Nothing is done again where it is already there, unless the
        files that it was read from have changed.

    Raises:
        InputError: a corpus is empty, or too small for one batch and one validation window; or a file changed while it
            was read.
        ValueError: ``deidentify`` is missing though the settings ask for it.
    """
    if config.data.deidentify.enabled and deidentify is None:
        raise ValueError("data.deidentify.enabled is true: give prepare() a deidentifier")
    files = RunFiles(run_directory)
    corpus, tokenizer_directory = files.corpus, files.tokenizer
    settings = digest_json([*_shaping(config), config.run.seed, *([deidentify.digest] if deidentify else [])])
    done = _finished(files, settings)
    if done is not None:
        found = since_prepared(config, done)
        for line in found.unknown:
            on_note(f"{line}; the corpus as prepared is used")
        if not found.changed:
            return done
        on_changed(found.changed)
    work = files.corpus_parts
    parts = Parts(_only(work, digest_json([settings, RULES])))

    # 1. Rows to parts; what was read before a kill counts only if all of it was read, and is what is there now.
    count, metadata = _read_public(config, parts, on_note)
    inputs = digests(metadata[ORIGINS])

    def each(step: str, function: Callable[[int], None]) -> None:
        missing, before = parts.missing(step, count), 0 if step == "clean" else count
        on_part(before + count - len(missing), 2 * count)
        for number, _ in enumerate(map_parts(function, missing), 1):
            on_part(before + count - len(missing) + number, 2 * count)

    # 2. Each part is cleaned by itself; copies are looked for over all of them.
    each("clean", partial(parts.clean, min_characters=config.data.min_characters, deidentify=deidentify))
    counts, replaced, left = parts.drop_copies(count, config.data.near_duplicate_similarity)
    metadata.update({"cleaning": counts.as_dict(), **({"deidentified": dict(replaced)} if deidentify else {})})
    _check_left(config, left, metadata)
    # 3. The tokenizer, from the training side alone. A corpus is never beside another one's tokenizer.
    shutil.rmtree(corpus, ignore_errors=True)
    held_out = partial(is_held_out, fraction=config.data.validation_fraction, seed=config.run.seed)
    train = (text for text in parts.texts(count) if not held_out(text))
    size = metadata["vocab_size"] = _tokenizer(
        config, tokenizer_directory, Manifest("tokenizer", settings, inputs), train
    )
    dtype = token_dtype(size)
    metadata[DTYPE_FIELD] = dtype.name
    # 4. Tokens, and windows of them.
    each("tokens", partial(parts.encode, tokenizer_directory=tokenizer_directory, held_out=held_out))
    corpus.mkdir(parents=True)

    def packed(name: str, source: str | None, length: int | None = None) -> dict[str, int]:
        documents = parts.encoded(count, source, held_out=source is None, vocab_size=size)
        return pack(documents, corpus / name, length or config.model.context_length, config.data.packing, dtype)

    try:
        metadata["train"] = {name: packed(train_tokens(name), name) for name in corpora(config.data)}
        metadata["validation"] = packed(VALIDATION_TOKENS, None)
        for name, length in product(corpora(config.data), lengths_apart(config)):
            packed(train_tokens(name, length), name, length)
    except OSError as error:
        raise write_failure(corpus, error) from error
    _check_size(config, metadata)
    manifest = commit_manifest(corpus, Manifest("corpus", settings, inputs, metadata=metadata))
    shutil.rmtree(work)
    return manifest


def _only(work: Path, digest: str) -> Path:
    """The folder of a preparation with these settings and rules; those with others are removed."""
    mine = work / digest[:16]
    for other in work.glob("*"):
        if other != mine:
            shutil.rmtree(other)
    return mine


def _finished(files: RunFiles, settings: str) -> Manifest | None:
    """The corpus' manifest where it and its tokenizer are whole, and of the same texts."""
    corpus, tokenizer = finished(files.corpus, "corpus", settings), finished(files.tokenizer, "tokenizer", settings)
    return corpus if corpus and tokenizer and corpus.inputs == tokenizer.inputs else None


def _tokenizer(config: RunConfig, directory: Path, wanted: Manifest, texts: Iterable[str]) -> int:
    """Trains the tokenizer, unless it is there. Returns the size of its vocabulary."""
    done = finished(directory, wanted.kind, wanted.config_digest)
    if done is not None and done.inputs == wanted.inputs:
        return int(done.metadata["vocab_size"])
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    special = config.objective, config.model.context_length
    size = len(train_tokenizer(texts, config.tokenizer.vocab_size, directory, *special))
    if size > config.tokenizer.vocab_size:
        raise InputError(
            f"tokenizer.vocab_size is {config.tokenizer.vocab_size}: the bytes and the special tokens of "
            f"pretrain.objective {config.objective!r} are {size}; give that or more, or lower model.context_length"
        )
    commit_manifest(directory, replace(wanted, metadata={"vocab_size": size, "trained_on": "public"}))
    return size


def _shaping(config: RunConfig) -> list[Any]:
    data = config.data
    sources = {name: source.model_dump(exclude={"weight"}) for name, source in corpora(data).items()}
    cleaning = [data.validation_fraction, data.min_characters, data.near_duplicate_similarity]
    # A concatenated corpus is cut into windows as it is read, a packed one as it is written.
    whole = [config.model.context_length, *lengths_apart(config)] if data.packing == "documents" else []
    # Beside end-of-text, which every tokenizer has.
    special = special_tokens(config.objective, config.model.context_length)[1:]
    return [sources, *cleaning, data.packing, *whole, config.tokenizer.model_dump(), *([special] if special else [])]


def _read_public(config: RunConfig, parts: Parts, on_note: Callable[[str], object]) -> tuple[int, dict[str, Any]]:
    """Cuts all corpora into parts. Returns their number, and what was seen while reading."""
    done = parts.folder / "read.json"
    if done.exists():
        before = json.loads(done.read_bytes()).get(ORIGINS)
        if before is None or since(config, before).changed:
            shutil.rmtree(parts.folder)
    if not done.exists():
        counts = {name: ReadCounts() for name in corpora(config.data)}
        rows = (
            (name, row[source.text])
            for name, source in corpora(config.data).items()
            for row in read_rows(source, [], counts[name])
        )
        found = {"parts": parts.write_rows(rows), **_seen(config, counts)}
        for name, seen in counts.items():
            if seen.files and (note := seen.files.note()):
                on_note(f"{field_of(name)}: {note}")
        write_atomic(done, canonical_json(found))
    read = json.loads(done.read_bytes())
    return read.pop("parts"), read


def _seen(config: RunConfig, counts: Mapping[str, ReadCounts]) -> dict[str, Any]:
    total = ReadCounts()
    for seen in counts.values():
        total.add(seen)
    return {
        "reading": total.numbers(),
        ORIGINS: {name: origin(source.source, counts[name].files) for name, source in corpora(config.data).items()},
    }


def _check_left(config: RunConfig, left: Mapping[str, int], metadata: dict[str, Any]) -> None:
    cleaning = metadata["cleaning"]
    for name, source in corpora(config.data).items():
        if not left.get(name):
            raise InputError(
                f"{field_of(name)} {source.source!r}: no document is left of {cleaning['read']} rows with text "
                f"({metadata['reading']['empty']} without; {cleaning['too_short']} shorter than data.min_characters "
                f"{config.data.min_characters}, {cleaning['exact_duplicates'] + cleaning['near_duplicates']} copies); "
                "give more text or lower data.min_characters"
            )


def is_held_out(text: str, fraction: float, seed: int) -> bool:
    """Whether a document is for validation; its own text and the seed alone decide."""
    digest = hashlib.blake2b(text.encode(), key=str(seed).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _check_size(config: RunConfig, metadata: dict[str, Any]) -> None:
    """Every corpus fills a window, one that is alone in a stage a batch, and there is something to validate on."""
    found = {field_of(name): (counts["windows"], 1) for name, counts in metadata["train"].items()}
    found["validation text of the public corpora"] = (metadata["validation"]["windows"], 1)
    for stage in config.stages:
        if len(stage.weights) == 1:
            (name,) = stage.weights
            found[field_of(name)] = (metadata["train"][name]["windows"], config.pretrain.batch_size)
    for field, (windows, needed) in found.items():
        if windows < needed:
            raise InputError(
                f"{field}: its tokens fill {windows} windows of model.context_length {config.model.context_length}, "
                f"fewer than the {needed} needed; give more text, or lower pretrain.batch_size or model.context_length"
            )
