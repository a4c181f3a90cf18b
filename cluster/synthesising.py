"""Records that a finished model writes, in a folder that says by which model and under which guarantee."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.finished import run_of, settings_of
from cluster.serving.models import Place, find, whole
from configs.errors import InputError
from configs.locks import HeldError, locked
from configs.printing import printable
from configs.schema.schema import RunConfig
from configs.storage.files import digest_file, write_failure
from configs.storage.layout import CERTIFICATE, NO_DP, RunFiles
from configs.storage.manifests import Manifest, commit_manifest, require_manifest
from configs.storage.sealing import MasterKey, load_key
from federated.adapters.merged import WHOLE, stage_of
from trainer.data.tokenizer import load_tokenizer
from trainer.inference.decoding import Decoding, with_settings
from trainer.inference.tables import check_kind, write_rows
from trainer.synthesis.conditions import Form
from trainer.synthesis.drawing import Drawing, Fruitless, Synthesis, synthesise
from trainer.tasks.task import task_of

_MOST = 10_000_000
_DRAWN, _MADE = "drawn.part", "made"  # what a command collects, and what becomes the folder, once it is whole
_CARD = """---
tags:
- synthetic
configs:
- config_name: default
  data_files: {file}
---
# Synthetic records

{number:,} records that a language model has written; none is a record of a silo's.

**Privacy: {privacy}**

{meaning}

| | |
|---|---|
| model, by its manifest's digest | `{model}` |
| base model | `{base}` |
| given | {given} |
| how tokens were chosen | {decoding} |
| texts drawn | {drawn:,} |
{dropped}

What was dropped was dropped for what it is itself, or as a copy of another drawn text. Nothing was compared with a
record of a silo's, so all of this is post-processing of the model. A synthetic record may be wrong, and may say what
nobody has written: it describes no person, and proves nothing about one.
"""
_PRIVATE = """The guarantee is the model's: whatever is computed from a differentially private model without another
look at the records is as private as the model (Dwork and Roth 2014, proposition 2.1), however many records are drawn,
and whoever reads them. `certificate.json` is its certificate, which says what it rests on and what it does not cover;
`siloweave ledger verify --certificate certificate.json` checks it."""
_NOT_PRIVATE = """Nothing bounds what these records tell of those that the model was trained on. Treat them as you treat
those."""


@dataclass(frozen=True)
class Wanted:
    """What is asked for.

    Attributes:
        number: of records.
        file: that holds them; its folder holds what belongs to it, and nothing is there yet.
        given: fields of the records as ``FIELD=VALUE``.
        decode: how tokens are chosen, as ``NAME=VALUE``.
        not_private: whether a model without a guarantee may write them.

    Raises:
        InputError: it can't be made.
    """

    number: int
    file: Path
    given: Sequence[str] = ()
    decode: Sequence[str] = ()
    not_private: bool = False

    def __post_init__(self) -> None:
        """Refuses what can't be made before anything is loaded."""
        if not 1 <= self.number <= _MOST:
            raise InputError(f"--records {self.number}: give a number from 1 to {_MOST:,}")
        check_kind(self.file, "--output")
        self.require_free()

    def require_free(self) -> None:
        """Refuses a folder that is there.

        Raises:
            InputError: it is.
        """
        if self.folder.exists():
            raise InputError(f"{self.folder}: exists; give a file in a folder that is not there yet, by --output")

    @property
    def folder(self) -> Path:
        """The folder that is made."""
        return self.file.absolute().parent


def usual_file(place: Path) -> Path:
    """Where records are written if nothing else is said.

    Raises:
        InputError: the model is not there, or lies in no run.
    """
    return RunFiles(_run(place)).synthetic / "records.jsonl"


def _run(place: Path) -> Path:
    if not place.is_dir():
        raise InputError(f"{place}: no such folder; give a run's directory, or an adapter/ in one")
    run = run_of(place)
    if run is None:
        raise InputError(f"{place}: lies in no run, whose settings say what a record is; give a run's directory")
    return run


def make(
    place: Path, wanted: Wanted, on_progress: Callable[[int, int], None] = lambda _done, _of: None
) -> dict[str, Any]:
    """Writes a folder of synthetic records: the records, a card, the certificate, a manifest.

    Args:
        place: of the model, in its run: as ``cluster.finished`` takes it.
        wanted: what is asked for; its folder is there whole or not at all.
        on_progress: told how many records there are, and how many are wanted.

    Returns:
        What was made, for machines.

    Raises:
        InputError: there is no finished model, it is not private, its certificate is another model's, its task has no
            records to write, what is asked for doesn't fit it, or something else lies where it is made.
        SiloweaveError: nothing can be kept of what the model writes (``Fruitless``), or the disk is full or not
            writable.
    """
    config = settings_of(_run(place))
    key = load_key(config.run.encryption_key_file)
    found = find(f"model={place}", key)
    if found.claim.epsilon is None and not wanted.not_private:
        raise InputError(f"{place}: {_why_not(found)}; give a model that was trained under DP, or --not-private")
    drawing = _drawing(config, found, key, wanted)
    try:
        with _alone(wanted) as part:
            identity = {"model": _digest(found), "file": wanted.file.name}
            drawn = synthesise(drawing, part / _DRAWN, identity, on_progress)
            manifest = _write(_fresh(part / _MADE) / wanted.file.name, found, drawing, drawn)
            (part / _MADE).rename(wanted.folder)
            shutil.rmtree(part)
    except OSError as error:
        raise write_failure(wanted.folder, error) from None
    return {"file": str(wanted.file), **_described(found, drawn), "digest": manifest.content_digest}


@contextmanager
def _alone(wanted: Wanted) -> Iterator[Path]:
    """The folder in which one command at a time makes what is wanted, and goes on with what a killed one has drawn.

    The lock lies beside it, since it goes away with the command's end.
    """
    part = wanted.folder.with_name(f".{wanted.folder.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        with locked(wanted.folder.with_name(f".{wanted.folder.name}.lock"), b"siloweave synthesise"):
            wanted.require_free()  # another command may just have made it
            if not _is_ours(part):
                raise InputError(f"{part}: is no interrupted command's; move it away, or give another --output")
            part.mkdir(exist_ok=True)
            try:
                yield part
            except Fruitless:  # which would be so again: there is nothing to go on with
                shutil.rmtree(part)
                raise
    except HeldError:
        raise InputError(f"{wanted.folder}: another command is making it; wait for that one") from None


def _is_ours(part: Path) -> bool:
    """Whether it may be written in, and removed: nothing lies there, or what a command had begun."""
    return (part / _DRAWN).is_file() or not (any(part.iterdir()) if part.is_dir() else part.exists())


def _fresh(folder: Path) -> Path:
    """An empty folder, whatever a command that was killed at its end has left there."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    return folder


def _drawing(config: RunConfig, found: Place, key: MasterKey | None, wanted: Wanted) -> Drawing:
    spec = config.federated.task_spec
    alone = found.federation is None and found.manifest.kind != WHOLE  # its manifest names no context
    task = task_of(spec, found.base, config.model.context_length if alone else None)
    form = Form(task, spec, config.data.private)
    conditions = form.conditions(wanted.given)
    # From all that the model holds likely, by default: whoever takes the likeliest alone loses variety.
    usual = Decoding(task.context_length, temperature=1.0, top_p=0.95, seed=config.run.seed)
    decoding = with_settings(usual, wanted.decode)
    tokenizer = load_tokenizer(found.base)
    model = whole(found, key).eval()
    return Drawing(model, tokenizer, task.context_length, form, conditions, decoding, wanted.number)


def _why_not(found: Place) -> str:
    if found.federation is not None and stage_of(found.federation) == NO_DP:
        return "was trained WITHOUT differential privacy, and what it writes may repeat its records"
    return f"{found.claim.line}, and what it writes may repeat what it was trained on"


def _digest(found: Place) -> str:
    """Of the folder that the model lies in."""
    if found.federation is None:
        return found.manifest.content_digest
    return require_manifest(found.federation, stage_of(found.federation), "federate").content_digest


def _described(found: Place, drawn: Synthesis) -> dict[str, Any]:
    return {
        "records": len(drawn.records),
        "drawn": drawn.drawn,
        "dropped": dict(drawn.dropped),
        "resumed": drawn.resumed,
        "model": _digest(found),
        "privacy": found.claim.document(),
    }


def _write(file: Path, found: Place, drawing: Drawing, drawn: Synthesis) -> Manifest:
    write_rows(file, lambda: iter(drawn.records), drawing.form.columns)
    part, inputs = file.parent, {"model": _digest(found)}
    (part / "README.md").write_text(_card(file.name, found, drawing, drawn), encoding="utf-8")
    if found.claim.certificate is not None:
        inputs["certificate"] = _copied((found.federation or found.base) / CERTIFICATE, part, found.claim.certificate)
    described = {name: value for name, value in _described(found, drawn).items() if name != "resumed"}
    return commit_manifest(part, Manifest("synthetic", "", inputs=inputs, metadata=described))


def _copied(certificate: Path, folder: Path, checked: str) -> str:
    """The digest of the certificate's copy, which is that of the file that was checked."""
    copy = folder / certificate.name
    shutil.copyfile(certificate, copy)
    if digest_file(copy) != checked:
        raise InputError(f"{certificate}: was changed since it was checked; give the command again")
    return checked


def _card(name: str, found: Place, drawing: Drawing, drawn: Synthesis) -> str:
    private = found.claim.epsilon is not None
    return _CARD.format(
        file=json.dumps(name),
        number=len(drawn.records),
        privacy=found.claim.line if private else f"NOT PRIVATE: {_why_not(found)}.",
        meaning=_PRIVATE if private else _NOT_PRIVATE,
        model=_digest(found),
        base=found.manifest.content_digest if found.federation else found.manifest.inputs.get("model", "itself"),
        given=_cell("; ".join(map(str, drawing.conditions))),
        decoding=_cell(str(drawing.decoding)),
        drawn=drawn.drawn,
        dropped="\n".join(f"| dropped: {why} | {count:,} |" for why, count in sorted(drawn.dropped.items())),
    )


def _cell(text: str) -> str:
    """A text as it stands in a cell: a person may have given any signs."""
    return f"`{printable(text).replace('|', chr(92) + '|').replace('`', chr(39))[:500]}`"
