"""The public text of a run: what its base model was pretrained on, and nothing that a silo holds."""

from pathlib import Path

from configs.errors import InputError
from configs.schema.data import corpora, field_of, overlaps
from configs.schema.schema import RunConfig
from configs.storage.layout import RunFiles
from configs.storage.manifests import Manifest, require_manifest
from trainer.data.packing import TokenFile, stored_dtype, train_tokens

_WANTED = "--method distil reads the public text that the base model was pretrained on"


def public_windows(config: RunConfig, run: Path | None) -> tuple[TokenFile, Manifest]:
    """Windows of a run's first public corpus, and the corpus' manifest.

    The corpus must be the one that the base model's manifest names by its digest: that is public, or nothing that was
    said of the base model holds.

    Raises:
        InputError: there is none, it is another one or damaged, or its source is that of the silos' records.
    """
    if run is None:
        raise InputError(f"{_WANTED}: give the model where it lies in its run")
    files = RunFiles(run)
    base = require_manifest(files.model, "model", "export")
    if "corpus" not in base.inputs:
        raise InputError(f"{_WANTED}; {files.model} was imported, so there is none; give --method prune or neurons")
    for name, source in corpora(config.data).items():
        if not config.data.private.public and overlaps(source, config.data.private):
            raise InputError(
                f"{field_of(name)} is {source.source!r}, where the silos' records are: no model may learn from them "
                "without their noise; name a public text in a run of its own"
            )
    corpus = require_manifest(files.corpus, "corpus", "prepare")
    if corpus.content_digest != base.inputs["corpus"]:
        raise InputError(f"{files.corpus}: is not the corpus of {files.model}; put that one back")
    path = files.corpus / train_tokens(next(iter(corpora(config.data))))
    return TokenFile(path, config.model.context_length, stored_dtype(files.corpus)), corpus
