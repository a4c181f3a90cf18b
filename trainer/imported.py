"""A model that somebody else has made, as a run's base model instead of one that is pretrained here.

What comes in is read as data: safetensors or GGUF, never a pickle, and none of a model's own code. transformers writes
it anew in float32, so that the run's folder holds what was understood of it and nothing else.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from configs.errors import InputError, SiloweaveError
from configs.schema.schema import RunConfig
from configs.schema.tasks import TaskSpec
from configs.storage.files import digest_file, digest_json, write_atomic
from configs.storage.layout import CERTIFICATE, RunFiles
from configs.storage.manifests import Manifest, commit_manifest, describe_files, finished
from configs.storage.sealing import load_key, sealing
from trainer.data.embedded import model_file
from trainer.models.families import attention
from trainer.models.load import MODEL, model_class

HUB, GGUF, EMBEDDED = "hf:", "gguf:", "embedded:"
_WANTED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "README.md"]
# What a task needs of a model: a family of transformers' that has such a head, and, where the task uses the model's own
# words, that the model is of that kind itself.
_NEEDS = {
    "causal": ("CAUSAL_LM", "causal language model"),
    "classification": ("SEQUENCE_CLASSIFICATION", ""),
    "multilabel": ("SEQUENCE_CLASSIFICATION", ""),
    "entities": ("TOKEN_CLASSIFICATION", ""),
    "qa": ("QUESTION_ANSWERING", ""),
    "chat": ("CAUSAL_LM", "causal language model"),
    "translation": ("CAUSAL_LM SEQ_TO_SEQ_CAUSAL_LM", "language model, a decoder or an encoder-decoder"),
    "summarisation": ("CAUSAL_LM SEQ_TO_SEQ_CAUSAL_LM", "language model, a decoder or an encoder-decoder"),
}
_CARD = """---
license: {license}
library_name: transformers
---
# {name} base model

{architecture} of {parameters:,} parameters, from `{source}`{revision}. Nothing of a silo's data has touched it in this
run. That it was made from public text alone is the word of whoever signed `declaration.json`; nobody can compute it.

Written anew in float32, with every dropout at 0, since private training has none.
"""


@dataclass(frozen=True)
class Origin:
    """Where the files of a model lie on this machine.

    Attributes:
        folder: with the configuration, and the tokenizer where it is a file of its own.
        gguf: name of the one file that holds everything; empty for a folder of safetensors.
        revision: of a repository; empty for files.
    """

    folder: Path
    gguf: str = ""
    revision: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """What every ``from_pretrained`` is given: local files, none of the model's code."""
        one_file = {"gguf_file": self.gguf} if self.gguf else {}
        return {"local_files_only": True, "trust_remote_code": False, **one_file}

    def digest(self) -> str:
        """Digest of the files that are read."""
        files = [self.folder / self.gguf] if self.gguf else _readable(self.folder)
        return digest_json({path.relative_to(self.folder).as_posix(): digest_file(path) for path in files})


def import_model(
    config: RunConfig, run_directory: Path, declare: Callable[[Mapping[str, Any]], bytes], declaration: str
) -> Manifest:
    """Writes ``model/`` from ``model.source``: safetensors, configuration, tokenizer, card, declaration, manifest.

    Args:
        config: the run's settings.
        run_directory: receives ``model/``.
        declare: signs what is known of the model's origin; returns the declaration's file.
        declaration: its name.

    Raises:
        InputError: the model can't be read, holds code or pickles instead of weights, has no tokenizer, or isn't one
            that the run's task needs.
    """
    settings, task, target = config.model, config.federated.task_spec, RunFiles(run_directory).model
    digest = digest_json([settings.source, settings.context_length])
    origin = open_origin(settings.source)
    done, content = finished(target, "model", digest), origin.digest()
    if done is not None and done.inputs["source"] == content:
        _configuration(Origin(target), settings.source, task)  # the task may be another one by now
        return done
    with _reading(settings.source):
        model, tokenizer = _read(origin, settings.source, task)
    _check(model, tokenizer, settings.source, settings.context_length, task)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    tokenizer.save_pretrained(target)
    with sealing(target, load_key(config.run.encryption_key_file), f"{digest}/{MODEL}") as folder:
        model.save_pretrained(folder)
    license_ = _license(origin)
    for path in origin.folder.glob("LICENSE*"):
        shutil.copyfile(path, target / path.name)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    (target / "README.md").write_text(_card(config, origin, model, parameters, license_), encoding="utf-8")
    files = {name: entry["sha256"] for name, entry in describe_files(target).items()}
    facts = {"source": settings.source, "revision": origin.revision, "license": license_, "files": files}
    write_atomic(target / declaration, declare(facts))
    metadata = {"parameters": parameters, "trained_on": "declared public", "context_length": settings.context_length}
    return commit_manifest(target, Manifest("model", digest, inputs={"source": content}, metadata=metadata))


def outline(source: str, task: TaskSpec) -> Any:
    """A model of the same shapes without values, on torch's device ``meta``. Nothing is downloaded.

    Raises:
        InputError: the model isn't on this machine, can't be read, or isn't one that the run's task needs.
    """
    origin = open_origin(source, download=False)
    with _reading(source), torch.device("meta"):
        config = _configuration(origin, source, task)
        return model_class(config, source)._from_config(config)


def open_origin(source: str, *, download: bool = True) -> Origin:
    """Finds a model's files; those of a repository are downloaded, unless they are here already.

    Raises:
        InputError: there are none, or no weights among them that are safe to read.
    """
    if source.startswith(HUB):
        return _from_hub(source, download=download)
    if source.startswith((GGUF, EMBEDDED)):
        kind, _, name = source.partition(":")
        path = Path(name) if f"{kind}:" == GGUF else model_file(name)
        if not path.is_file():
            raise InputError(f"model.source {source!r}: no such file; give the path of a GGUF file after gguf:")
        return Origin(path.parent, gguf=path.name)
    folder = Path(source)
    if not (folder / "config.json").is_file():
        raise InputError(
            f"model.source {source!r}: no config.json in that folder; give the folder of a Hugging Face model, "
            "hf:ORG/NAME@REVISION or gguf:FILE"
        )
    if (folder / CERTIFICATE).is_file():
        raise InputError(
            f"model.source {source!r}: silos' records have made it, as its {CERTIFICATE} says; a base model is of "
            "public text alone"
        )
    if not list(folder.glob("*.safetensors")):
        found = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".h5"))
        what = f"its weights are in {', '.join(found)}" if found else "there are no weights in it"
        raise InputError(
            f"model.source {source!r}: {what}; give weights as safetensors, since other files may run code when read"
        )
    return Origin(folder)


def _from_hub(source: str, *, download: bool) -> Origin:
    name, at, revision = source.removeprefix(HUB).partition("@")
    if not at or not revision:
        raise InputError(
            f"model.source {source!r}: name the revision, hf:ORG/NAME@REVISION, best a commit's hash: a branch's name "
            "may be another model tomorrow"
        )
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=_WANTED, local_files_only=not download))
    except Exception as error:
        # The hub's client raises a dozen unrelated types; each means that this model can't be had.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"model.source {source!r}: can't be loaded ({reason}); check name, revision and network, or give a folder"
        ) from None
    return Origin(open_origin(str(folder)).folder, revision=revision)


def _readable(folder: Path) -> list[Path]:
    return sorted({path for pattern in _WANTED for path in folder.glob(pattern) if path.is_file()})


@contextmanager
def _reading(source: str) -> Iterator[None]:
    """A stranger's files raise whatever their reader happens to meet; each means that this model can't be read."""
    try:
        with redirect_stderr(StringIO()):  # bars of the libraries', in which ours would drown
            yield
    except SiloweaveError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise InputError(
            f"model.source {source!r}: can't be read ({reason}); give a model's whole, undamaged files"
        ) from None


def _configuration(origin: Origin, source: str, task: TaskSpec) -> Any:
    """The configuration of a model that fits a task: as it is, or with the task's head."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(origin.folder, **origin.options)
    _refuse_quantised(config, source)
    if origin.gguf:  # names none, and holds decoders alone
        config.architectures = [transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    named = (config.architectures or [type(config).__name__])[0]
    # Labels without a head are words of the model's own, as a text is.
    wanted, fits = _NEEDS["causal" if task.pooling == "likelihood" else task.name]
    kinds = {
        kind.__name__
        for one in wanted.split()
        if (kind := getattr(transformers, f"MODEL_FOR_{one}_MAPPING").get(type(config), None))
    }
    # At each token an answer's head has to see the text, and a decoder that writes has seen none of what comes.
    blind = task.name == "qa" and config.is_encoder_decoder
    if blind or not kinds or (fits and named not in kinds):
        how = " by likelihood" if task.pooling == "likelihood" else ""
        raise InputError(
            f"model.source {source!r}: it is a {named}, and the task {task.name!r}{how} needs a "
            f"{fits or 'model of a family that has a head for it'}; give one"
        )
    return config


def _refuse_quantised(config: Any, source: str) -> None:
    """Weights of 4 or 8 bits need kernels of a GPU, and are never made float32 here; only those of GGUF files are."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return
    method = found.get("quant_method") if isinstance(found, dict) else None
    raise InputError(
        f"model.source {source!r}: its weights are quantised ({method or 'quantization_config'}); give the model as it "
        "was before, and federated.base_dtype = 'bfloat16' to halve its memory"
    )


def _read(origin: Origin, source: str, task: TaskSpec) -> tuple[Any, Any]:
    """The model with all its weights from the files, and its tokenizer."""
    from transformers import AutoTokenizer

    config = _configuration(origin, source, task)
    tokenizer = AutoTokenizer.from_pretrained(origin.folder, **origin.options)
    kind = model_class(config, source)
    model, loaded = kind.from_pretrained(
        origin.folder,
        config=config,
        dtype=torch.float32,
        attn_implementation=attention(),
        output_loading_info=True,
        **({} if origin.gguf else {"use_safetensors": True}),
        **origin.options,
    )
    # A weight that is not in the files would be drawn at random, and be another one each time.
    missing = sorted(loaded["missing_keys"]) + sorted(str(found) for found in loaded["mismatched_keys"])
    if missing:
        raise InputError(f"model.source {source!r}: its files lack {missing[0]} and {len(missing) - 1} more weights")
    if origin.gguf:  # transformers saves no model that it knows to have been quantised, also where it no longer is
        plain = kind._from_config(_configuration(origin, source, task), dtype=torch.float32)
        plain.load_state_dict(model.state_dict())
        plain.generation_config, model = model.generation_config, plain
    _without_dropout(model.config)
    return model, tokenizer


def _without_dropout(config: Any) -> None:
    """Private training takes no noise but its own, and saving or generating needs no dropout."""
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    config.use_cache = False


def _check(model: Any, tokenizer: Any, source: str, context_length: int, task: TaskSpec) -> None:
    """What a task takes for granted."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"model.source {source!r}: its tokenizer has no fast form (tokenizer.json); give one that has")
    if tokenizer.eos_token_id is None and task.in_words:
        raise InputError(f"model.source {source!r}: its tokenizer has no end-of-text token; name one as eos_token")
    if tokenizer.eos_token_id is None and tokenizer.pad_token_id is None:
        raise InputError(f"model.source {source!r}: its tokenizer has no token that fills up; name one as pad_token")
    if task.in_words and not model.config.is_encoder_decoder and _looks_ahead(model):
        raise InputError(
            f"model.source {source!r}: a token of it sees those that follow, which it should predict; give a decoder"
        )
    both = model.config.is_encoder_decoder and task.in_words
    if both and not hasattr(model, "prepare_decoder_input_ids_from_labels"):
        raise InputError(
            f"model.source {source!r}: a {type(model).__name__} does not say what its decoder reads before each token; "
            "give a model of another family, T5 or BART for instance"
        )
    if task.name == "chat" and not task.template and not tokenizer.chat_template:
        raise InputError(
            f"model.source {source!r}: its tokenizer has no chat template; give a model that has one, or "
            "federated.template"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise InputError(
            f"model.source {source!r}: its tokenizer has {len(tokenizer)} tokens and its model {rows} embeddings; give "
            "the tokenizer that the model was trained with"
        )
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and context_length > longest:
        raise InputError(
            f"model.context_length is {context_length}: {source!r} has {longest} positions; give at most {longest}"
        )


def _looks_ahead(model: Any) -> bool:
    """Whether what follows a token changes what is said of it, by more than another order of additions does."""
    ids_BT = torch.arange(1, 9)[None]
    with torch.no_grad():
        whole_TV, half_TV = (model.eval()(input_ids=ids).logits[0] for ids in (ids_BT, ids_BT[:, :4]))
    return not (whole_TV[:4] - half_TV).abs().max() <= 1e-3 * half_TV.std()


def _license(origin: Origin) -> str:
    """As the model's card names it."""
    from huggingface_hub import metadata_load

    card = origin.folder / "README.md"
    if origin.gguf or not card.is_file():
        return "not stated"
    try:
        found = metadata_load(card) or {}
    except ValueError:  # a card without a head, or with one that is no YAML
        return "not stated"
    return str(found.get("license") or "not stated")[:256]


def _card(config: RunConfig, origin: Origin, model: Any, parameters: int, license_: str) -> str:
    return _CARD.format(
        license=license_ if license_ != "not stated" else "unknown",
        name=config.run.name,
        architecture=type(model).__name__,
        parameters=parameters,
        source=config.model.source,
        revision=f" at `{origin.revision}`" if origin.revision else "",
    )
