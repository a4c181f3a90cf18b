"""From what a person names to models that answer: runs, adapters, base models, merged ones; each base loaded once."""

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from cluster.finished import calibrated, run_of, settings_of
from cluster.serving.claims import Claim, of_federation, of_merged
from cluster.serving.labels import LabelModel
from configs.errors import InputError
from configs.parse import json_object
from configs.schema.schema import RunConfig
from configs.storage.files import unreadable
from configs.storage.manifests import MANIFEST, Manifest, require_manifest
from configs.storage.sealing import MasterKey, opened
from federated.adapters.merged import ADAPTER, WHOLE, finished_federation, head_of, stage_of, with_shared
from trainer.data.tokenizer import first_token, load_tokenizer
from trainer.inference.adapters import Adapters
from trainer.inference.batching import Voice
from trainer.inference.lanes import Lane
from trainer.models.load import Head, load_model, read_model
from trainer.tasks.chat import ROLES, ChatTemplate, Message
from trainer.tasks.marked import plain_backend

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_LABELLING = ("Classification", "Classifier", "QuestionAnswering")  # in the names of classes of models with a head


@dataclass(frozen=True)
class Place:
    """Where a model lies.

    Attributes:
        name: that it is asked for by.
        base: folder of a whole model.
        manifest: of that folder.
        claim: about its privacy.
        federation: whose adapter or model comes on top; None: nothing does.
        settings: of its run, where it gives labels; None: it writes.
        head: what the federation has put on the base model, where it gives labels.
    """

    name: str
    base: Path
    manifest: Manifest
    claim: Claim
    federation: Path | None = None
    settings: RunConfig | None = None
    head: Head | None = None

    @property
    def shared(self) -> Path | None:
        """What comes on top: the folder of an adapter, or of a whole model."""
        return None if self.federation is None else _shared(self.federation)


class ServedModel:
    """A model that answers under a name.

    Attributes:
        name: the name.
        claim: about its privacy.
        voice: what decodes its requests.
        context_length: most tokens that it reads and writes together.
        ends: tokens that end a text.
    """

    def __init__(self, place: Place, model: Any, lane: Lane) -> None:
        tokenizer = load_tokenizer(place.base)
        self.name, self.claim = place.name, place.claim
        self.voice = Voice(lane, tokenizer.backend_tokenizer)
        self.context_length = _context_length(place, model)
        self.ends = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
        self._plain, self._start = plain_backend(tokenizer), first_token(tokenizer)
        self._chat = ChatTemplate(tokenizer) if tokenizer.chat_template else None

    def opening(self, prompt: str) -> list[int]:
        """Tokens of a text that the model goes on with. What spells a special token is text."""
        return [self._start, *self._plain.encode(prompt, add_special_tokens=False).ids]

    def dialogue(self, messages: Sequence[tuple[str, str]]) -> tuple[list[int], tuple[int, ...]]:
        """Tokens of a dialogue that the model answers, and those that end its answer.

        Raises:
            InputError: the model has no chat template, or it takes no dialogue with these turns.
        """
        if self._chat is None:
            raise InputError(f"{self.name} has no chat template; ask it by /v1/completions")
        turns: list[Message] = [(ROLES.index(role), said) for role, said in messages]
        found = self._chat.tokens(turns, opening=True)
        if found is None:
            raise InputError(f"the chat template of {self.name} takes no dialogue with these turns; give others")
        return found.ids, self._chat.ends


def find(argument: str, key: MasterKey | None) -> Place:
    """What ``PATH`` or ``NAME=PATH`` means: a run, its base model, an adapter or a model in it, or a merged model.

    Raises:
        InputError: no whole model is there, a file of it was changed, its certificate is about another one, or it
            gives labels and lies in no run.
    """
    name, path = named(argument)
    kind = _kind(path)
    if kind == "merged":
        manifest = require_manifest(path, kind, "merge")
        claim = of_merged(path, manifest.inputs)
        return Place(name, path, manifest, claim, settings=_settings(path) if _labels(path) else None)
    if kind == WHOLE:
        return Place(name, path, require_manifest(path, kind, "export"), Claim())
    federation, made, base, manifest = finished_federation(path)
    claim, head = of_federation(federation, _shared(federation), manifest.content_digest, key), head_of(made)
    return Place(name, base, manifest, claim, federation, _settings(path) if head else None, head)


def load(
    places: Sequence[Place], key: MasterKey | None, adapters_memory: int | None = None
) -> dict[str, ServedModel | LabelModel]:
    """The models, by name. Several adapters on one base share its weights.

    Args:
        places: of them.
        key: of encrypted runs.
        adapters_memory: bytes that the adapters on one base may take beside it; None: as many as there are.

    Raises:
        InputError: two have one name, a model can't be loaded or served, or an adapter alone takes more.
    """
    names = [place.name for place in places]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"two models are called {twice!r}; name one of them otherwise, as NAME=PATH")
    found: dict[str, ServedModel | LabelModel] = {
        place.name: _labelling(place, place.settings, key) for place in places if place.settings
    }
    writing = [place for place in places if not place.settings]
    by_base = sorted(writing, key=lambda place: place.manifest.content_digest)
    for _, group in groupby(by_base, key=lambda place: place.manifest.content_digest):
        found |= {model.name: model for model in _together(list(group), key, adapters_memory)}
    return {name: found[name] for name in names}


def _settings(path: Path) -> RunConfig:
    if run_of(path) is None:
        raise InputError(f"{path}: gives labels and lies in no run, whose settings have its task; put it into its run")
    return settings_of(path)


def _labels(merged: Path) -> bool:
    path = merged / "config.json"
    try:
        config = json_object(path.read_bytes(), str(path))
    except OSError:
        raise InputError(unreadable(path)) from None
    return any(part in str(config.get("architectures")) for part in _LABELLING)


def _labelling(place: Place, settings: RunConfig, key: MasterKey | None) -> LabelModel:
    # What the certificate names is what is loaded: the published files, not the rounds that they were made of.
    context_length = settings.model.context_length if place.federation is None else None
    spec = settings.federated.task_spec
    made = place.federation or place.base
    of = place.manifest if place.federation is None else require_manifest(made, stage_of(made), "federate")
    return LabelModel(
        place.name,
        place.claim,
        whole(place, key),
        spec,
        place.base,
        context_length,
        lambda task: calibrated(task, made, of.content_digest)[0],
    )


def _together(places: list[Place], key: MasterKey | None, limit: int | None) -> list[ServedModel]:
    """Models of one base: one adapter alone is merged into it; of several each is put on when it is asked for."""
    apart = [place for place in places if len(places) == 1 or (place.shared and place.shared.name == WHOLE)]
    sharing = [place for place in places if place not in apart]
    found = [_alone(place, key) for place in apart]
    if not sharing:
        return found
    base = _base(sharing[0], key)
    adapters = Adapters(base, limit)
    for place in sharing:
        if place.shared is not None:
            try:
                adapters.add(place.name, partial(_opened, place, key))
            except InputError:
                raise
            except (OSError, RuntimeError, ValueError, SafetensorError):
                raise InputError(f"{place.shared}: is no adapter of {place.base}; give the right folder") from None
    lanes = [adapters.lane(place.name if place.shared else None, place.name) for place in sharing]
    return [*found, *(ServedModel(place, base, lane) for place, lane in zip(sharing, lanes, strict=True))]


def _alone(place: Place, key: MasterKey | None) -> ServedModel:
    model = whole(place, key)
    return ServedModel(place, model, Lane(model, name=place.name))


def whole(place: Place, key: MasterKey | None) -> Any:
    """A model as one plain one, as what its certificate names has left it."""
    base = _base(place, key)
    if place.federation is None or place.shared is None:
        return base
    return with_shared(base, place.shared, key, f"{stage_of(place.federation)}/{place.shared.name}")


def _base(place: Place, key: MasterKey | None) -> Any:
    if place.manifest.kind == WHOLE:
        return load_model(place.base, key, place.head)
    with opened(place.base, key, f"{place.base.resolve().name}/{WHOLE}") as folder:
        return read_model(folder, str(place.base))


def _opened(place: Place, key: MasterKey | None) -> AbstractContextManager[Path]:
    federation = place.federation or place.base
    return opened(_shared(federation), key, f"{stage_of(federation)}/{ADAPTER}")


def _shared(federation: Path) -> Path:
    return federation / (WHOLE if (federation / WHOLE).is_dir() else ADAPTER)


def named(argument: str) -> tuple[str, Path]:
    """What ``PATH`` or ``NAME=PATH`` names: a model's name, and its folder.

    Raises:
        InputError: there is no such folder, or that can't be a name.
    """
    name, sign, rest = argument.partition("=")
    path = Path(rest if sign and not Path(argument).exists() else argument)
    name = name if sign and not Path(argument).exists() else path.resolve().name
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; give a run's directory, an adapter, or a merged model")
    if not _NAME.fullmatch(name):
        raise InputError(f"{name!r} can't be a model's name: letters, digits, '.', '_' and '-'; give NAME=PATH")
    return name, path


def _kind(path: Path) -> str:
    """What the folder's manifest calls it; empty where it has none."""
    manifest = path / MANIFEST
    if not manifest.is_file():
        return ""
    try:
        return str(json_object(manifest.read_bytes(), str(manifest)).get("kind"))
    except OSError:
        raise InputError(unreadable(manifest)) from None


def _context_length(place: Place, model: Any) -> int:
    declared = place.manifest.metadata.get("context_length")
    known = [declared, getattr(model.config, "max_position_embeddings", None)]
    lengths = [length for length in known if isinstance(length, int) and length > 0]
    if not lengths:
        raise InputError(
            f"{place.base}: neither manifest nor configuration says how many tokens it reads; export it again"
        )
    return min(lengths)
