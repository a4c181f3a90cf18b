"""Loads a model from where a run, or a person, has put it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from configs.errors import InputError
from configs.imports import import_large
from configs.schema.tasks import Pooling
from configs.storage.manifests import read_manifest
from configs.storage.sealing import MasterKey, opened
from trainer.models.families import attention

MODEL = "model"
_HEADS = {
    "classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "token classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "question answering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
}
HeadKind = Literal["classification", "token classification", "question answering"]


@dataclass(frozen=True)
class Head:
    """What a task puts in the place of a model's words.

    Attributes:
        kind: ``classification``: numbers of a whole text; ``token classification``: of each token; ``question
            answering``: two of each token, by which an answer begins and ends there.
        size: how many numbers.
        pad: the token that fills up what is shorter.
        labels: what the numbers stand for, where that has names.
        pooling: of a whole text: what the head looks at.
    """

    kind: HeadKind
    size: int
    pad: int
    labels: tuple[str, ...] = ()
    pooling: Pooling = "model"


def load_model(directory: Path, key: MasterKey | None = None, head: Head | None = None, kind: str = MODEL) -> Any:
    """The model of an exported directory, float32, in evaluation mode. Reads safetensors only, never pickles.

    Args:
        directory: of the model.
        key: by which its weights are encrypted, if they are.
        head: what is put on it, with values that depend on its shape alone; None: the model as it was written.
        kind: of its manifest; one that is no base model was encrypted by its folder's name.

    Raises:
        InputError: its weights were not written with this key, or were made with other settings than its manifest says;
            or no such head fits it.
    """
    manifest = read_manifest(directory, kind)
    owner = directory.resolve().name if kind != MODEL else manifest.config_digest if manifest else ""
    with opened(directory, key, f"{owner}/{MODEL}", older=MODEL) as folder:
        return read_model(folder, str(directory), head)


def read_model(folder: Path, where: str, head: Head | None = None) -> Any:
    """The same of any folder in the clear, whatever its manifest says.

    Args:
        folder: of the model.
        where: what it is called in messages.
        head: what is put on it.

    Raises:
        InputError: transformers has no such model, no such head fits it, or its weights are quantised and torchao is
            not installed.
    """
    import_large("transformers.modeling_utils")
    from transformers import AutoConfig

    import trainer.models.recurrent  # noqa: F401  # which the Auto classes know from then on

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of a head: the same one wherever it is put on
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if getattr(config, "quantization_config", None) is not None:
            require_torchao(where)
        kind = model_class(config, where, head)
        with _without_report():
            model = kind.from_pretrained(
                folder,
                config=_with_head(config, head),
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                attn_implementation=attention(),
            )
    return model.eval()


def is_quantised(model: Any) -> bool:
    """Whether a model's weights are integers."""
    return getattr(model.config, "quantization_config", None) is not None


def require_torchao(where: str) -> None:
    """Refuses what needs torchao where that is not installed.

    Args:
        where: what it is called in the message.

    Raises:
        InputError: it is not.
    """
    if find_spec("torchao") is None:
        raise InputError(
            f"{where}: torchao is not installed, which quantised weights need; pip install 'siloweave[optimise]'"
        )


@contextmanager
def _without_report() -> Iterator[None]:
    """Transformers reports weights that the files lack: here they are the head's, which is meant to be new."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def model_class(config: Any, where: str, head: Head | None = None) -> Any:
    """The class of transformers that a configuration names, or the one of its family with a head.

    Raises:
        InputError: transformers has none.
    """
    import transformers

    from trainer.models.pooled import MeanPooledClassifier, mean_pooled
    from trainer.models.recurrent import RecurrentForCausalLM

    found: Any
    if head is not None:
        wanted = f"{config.model_type} with a head for {head.kind}"
        of_family = getattr(transformers, _HEADS[head.kind]).get(type(config), None)
        found = mean_pooled(config) if head.pooling == "mean" else of_family
    else:
        wanted = (config.architectures or [config.model_type])[0]
        ours = {RecurrentForCausalLM.__name__: RecurrentForCausalLM, MeanPooledClassifier.__name__: mean_pooled(config)}
        found = ours.get(wanted) or getattr(transformers, wanted, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise InputError(f"{where}: transformers has no {wanted}; give a model of another family")
    return found


def outline_with_head(config: Any, head: Head) -> Any:
    """A model of a configuration with a head, without values, on torch's device ``meta``.

    Raises:
        InputError: no such head fits it.
    """
    with torch.device("meta"):
        return model_class(config, "the base model", head)._from_config(_with_head(config, head))


def _with_head(config: Any, head: Head | None) -> Any:
    if head is not None:
        config.num_labels, config.pad_token_id = head.size, head.pad
        if head.labels:  # whoever loads the result elsewhere reads them there
            config.id2label = dict(enumerate(head.labels))
            config.label2id = {label: index for index, label in enumerate(head.labels)}
        config.classifier_dropout = 0.0  # some heads have one where the configuration names none
    return config
