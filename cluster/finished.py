"""A model that a run has made, for whoever wants its answers: from a run, or from a folder that `merge` wrote."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.parse import json_object, parse, read_toml, reading
from configs.schema.schema import RunConfig
from configs.schema.tasks import WRITTEN
from configs.storage.files import digest_bytes
from configs.storage.layout import CALIBRATION, CERTIFICATE, NO_DP, RunFiles
from configs.storage.manifests import Manifest, require_manifest
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
        made: the folder of what made it, where its certificate lies, if it has one.
        manifest: that folder's.
        run: the directory of its run; None: it lies outside of one.
        privacy: a line on what it gives away.
    """

    model: Any
    tokenizer: Any
    task: Any
    config: RunConfig
    made: Path
    manifest: Manifest
    run: Path | None
    privacy: str

    @property
    def digest(self) -> str:
        """Of its weights, or of what they were made of."""
        return self.manifest.content_digest


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

    run = run_of(place)
    config = settings_of(place, elsewhere)
    spec = config.federated.task_spec
    federation = None if run is None else _federation(place, run)
    if federation is None:
        model, tokens = _whole(place, config), place
        context = config.model.context_length
        manifest = require_manifest(place, "merged", "merge")
    else:
        from federated.coordinator.final_model import final_model

        files = RunFiles(federation.parent)
        manifest = require_manifest(federation, federation.name, "federate")
        model, tokens, context = final_model(config, files.model, federation), files.model, None
    task = task_of(spec, tokens, context)
    check_head(model, task, place)
    made = federation or place
    return Finished(model, load_tokenizer(tokens), task, config, made, manifest, run, _privacy(made))


def run_of(place: Path) -> Path | None:
    """The run that a model lies in; None: it lies in none."""
    here = place.resolve()
    return next((folder for folder in (here, *here.parents[:2]) if RunFiles(folder).config.is_file()), None)


def settings_of(place: Path, elsewhere: RunConfig | None = None) -> RunConfig:
    """The settings of the run that a model lies in.

    Args:
        place: of the model.
        elsewhere: the settings, where it lies in none.

    Raises:
        InputError: it lies in no run, and nothing else is given; or the run's settings can't be read.
    """
    run = run_of(place)
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


def check_head(model: Any, task: Any, place: Path) -> None:
    """Whether a model's labels are its task's.

    Raises:
        InputError: they are others.
    """
    if task.head is None:
        return
    named = tuple(model.config.id2label.values())
    if task.head.labels and named != task.head.labels:
        raise InputError(f"{place}: its labels are {', '.join(named)[:300]}; give the settings of the run that made it")


def calibrated(task: Any, made: Path, digest: str) -> tuple[Any, str]:
    """A task whose answers are read or written as `siloweave calibrate` has found best, and that file's digest.

    Args:
        task: as it is; returned without a digest where nothing was calibrated.
        made: the model's folder.
        digest: the model's.

    Raises:
        InputError: the file is damaged, or of another model.
    """
    path = made / CALIBRATION
    if not path.is_file():
        return task, ""
    with reading(path, "run `siloweave calibrate` again, or delete it"):
        content = path.read_bytes()
        document = json_object(content, str(path))
        if document["model"] != digest:
            raise InputError(f"{path}: is of another model; run `siloweave calibrate` again, or delete it")
        found = _answering(task, document) if "decoding" in document else _reading(task, document)
    return found, digest_bytes(content)


def _reading(task: Any, document: dict[str, Any]) -> Any:
    from trainer.tasks.task import Calibration, LabellingTask

    temperature, thresholds = document["temperature"], tuple(document["thresholds"])
    known = all(isinstance(one, float) and math.isfinite(one) for one in (temperature, *thresholds))
    known = known and isinstance(task, LabellingTask) and temperature > 0
    if not known or len(thresholds) not in (0, len(task.head.labels)):
        raise ValueError
    return task.calibrated(Calibration(temperature, thresholds))


def _answering(task: Any, document: dict[str, Any]) -> Any:
    from trainer.inference.decoding import Decoding

    beams, penalty = document["decoding"]["beams"], document["decoding"]["repetition_penalty"]
    if type(beams) is not int or type(penalty) is not float or task.name not in WRITTEN:
        raise ValueError
    Decoding(beams=beams, repetition_penalty=penalty)  # which refuses what is out of range
    return task.decoded(beams, penalty)


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
