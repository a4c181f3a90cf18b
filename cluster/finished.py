"""A model that a run has made, for whoever wants its answers: from a run, or from a folder that `merge` wrote."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.parse import json_object, parse, read_toml, reading
from configs.schema.schema import RunConfig
from configs.storage.layout import CERTIFICATE, NO_DP, RunFiles
from configs.storage.manifests import require_manifest
from configs.storage.sealing import load_key

_ADVICE = "give a run's directory, an adapter/ in one, or a folder that `siloweave merge` wrote"


@dataclass(frozen=True)
class Finished:
    """A model with all that it takes to ask it.

    Attributes:
        model: in evaluation mode.
        tokenizer: the model's.
        task: what a record is to it.
        config: the settings that it was made with.
        digest: of its weights, or of what they were made of.
        privacy: a line on what it gives away.
    """

    model: Any
    tokenizer: Any
    task: Any
    config: RunConfig
    digest: str
    privacy: str


def finished_model(place: Path, elsewhere: RunConfig | None = None) -> Finished:
    """Loads a model.

    Args:
        place: of it: a run's directory, a folder in one, or a merged model's folder.
        elsewhere: the run's settings, for a merged model that lies outside of the run.

    Raises:
        InputError: there is no finished model, its settings are missing, or it is another task's.
    """
    if not place.is_dir():
        raise InputError(f"{place}: no such folder; {_ADVICE}")
    from trainer.data.tokenizer import load_tokenizer
    from trainer.tasks.task import task_of

    run = _run_of(place)
    config = _settings(run, elsewhere, place)
    spec = config.federated.task_spec
    federation = None if run is None else _federation(place, run)
    if federation is None:
        model, tokens = _whole(place, config), place
        context = config.model.context_length
        digest = require_manifest(place, "merged", "merge").content_digest
    else:
        from federated.coordinator.final_model import final_model

        files = RunFiles(federation.parent)
        digest = require_manifest(federation, federation.name, "federate").content_digest
        model, tokens, context = final_model(config, files.model, federation), files.model, None
    task = task_of(spec, tokens, context)
    _check_head(model, task, place)
    return Finished(model, load_tokenizer(tokens), task, config, digest, _privacy(federation or place))


def _run_of(place: Path) -> Path | None:
    here = place.resolve()
    return next((folder for folder in (here, *here.parents[:2]) if RunFiles(folder).config.is_file()), None)


def _settings(run: Path | None, elsewhere: RunConfig | None, place: Path) -> RunConfig:
    if run is not None:
        path = RunFiles(run).config
        return parse(RunConfig, read_toml(path), str(path))
    if elsewhere is None:
        raise InputError(f"{place}: lies in no run; {_ADVICE}, and outside of its run the run's settings by --config")
    return elsewhere


def _federation(place: Path, run: Path) -> Path | None:
    """The federation that made what lies at a place; None: a model that stands for itself does."""
    here, files = place.resolve(), RunFiles(run)
    if here == run:
        return files.federated
    return next((one for one in (files.federated, files.no_dp) if one in (here, here.parent)), None)


def _whole(place: Path, config: RunConfig) -> Any:
    if not (place / "config.json").is_file():
        raise InputError(f"{place}: holds no config.json; {_ADVICE}")
    from trainer.models.load import load_model

    return load_model(place, load_key(config.run.encryption_key_file), kind="merged")


def _check_head(model: Any, task: Any, place: Path) -> None:
    if task.head is None:
        return
    named = tuple(model.config.id2label.values())
    if task.head.labels and named != task.head.labels:
        raise InputError(f"{place}: its labels are {', '.join(named)[:300]}; give the settings of the run that made it")


def _privacy(place: Path) -> str:
    path = place / CERTIFICATE
    if place.name == NO_DP:
        return "privacy: trained WITHOUT differential privacy"
    if not path.is_file():
        return "privacy: no certificate lies beside this model, so nothing is claimed"
    with reading(path, "put the certificate back that the federation wrote"):
        document = json_object(path.read_bytes(), str(path))
        claim = document["headline"]
        return (
            f"privacy: epsilon {claim['epsilon']:.4g} at delta {claim['delta']:g} for one {document['unit']}, by {path}"
        )
