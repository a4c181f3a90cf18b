"""From a sharded checkpoint to a directory that transformers loads, by the class that its configuration names."""

import contextlib
import io
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

from configs.errors import InputError, SiloweaveError
from configs.schema.data import corpora
from configs.schema.pretrain import PretrainSettings
from configs.schema.schema import RunConfig
from configs.storage.layout import RunFiles
from configs.storage.manifests import MANIFEST, Manifest, commit_manifest, finished, require_manifest
from configs.storage.sealing import load_key, opened, sealing
from trainer.checkpoints import checkpoints
from trainer.checkpoints.checkpoints import pretrain_digest
from trainer.data.batches import corpus_counts
from trainer.models.families import new_model
from trainer.models.load import MODEL
from trainer.pretraining.optimizers import new_optimizer

_CARD = """---
license: apache-2.0
library_name: transformers
---
# {name}

{architecture} of {parameters:,} parameters, pretrained from a random start by Siloweave.

- **Data**: {source} ({tokens:,} tokens, {characters:,} characters after cleaning). Public text only: no private record
  has touched the weights or the tokenizer.
- **Training**: {steps} of {batch_size} sequences, objective {objective}, {optimizer}, ZeRO stage {stage} on {ranks}
  ranks.
- **Use**: a starting point for fine-tuning across silos. It is far too small to answer questions.
"""


def export(config: RunConfig, run_directory: Path) -> Manifest:
    """Writes ``model/``: safetensors, configuration, tokenizer, model card, manifest.

    Raises:
        InputError: pretraining has not finished, or its checkpoint was not written with this key.
    """
    files = RunFiles(run_directory)
    corpus = require_manifest(files.corpus, "corpus", "prepare")
    digest = pretrain_digest(config, corpus.content_digest)
    target = files.model
    done = finished(target, "model", digest)
    if done is not None:
        return done
    storage = checkpoints.storage(config, run_directory)
    checkpoint = checkpoints.newest(storage, digest, _refuse_damaged)
    if checkpoint is None or checkpoint.step < config.pretrain.steps:
        at = f"is at step {checkpoint.step} of {config.pretrain.steps}" if checkpoint else "has no commit yet"
        raise InputError(f"{storage}: pretraining {at}; run `siloweave pretrain` first")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(files.tokenizer, target, ignore=shutil.ignore_patterns(MANIFEST))
    model = new_model(config.model, corpus.metadata["vocab_size"], config.run.seed, objective=config.objective)
    key = load_key(config.run.encryption_key_file)
    name = checkpoint.directory.name
    with opened(checkpoint.directory, key, f"{digest}/{name}", older=name) as folder:
        model.load_state_dict(_by_every_name(model, _consolidated(folder, config.pretrain, model)))
    with sealing(target, key, f"{digest}/{MODEL}") as folder:
        model.save_pretrained(folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    (target / "README.md").write_text(_card(config, corpus, model, parameters), encoding="utf-8")
    metadata = {
        "parameters": parameters,
        "trained_on": "public",
        "context_length": config.model.context_length,
        "family": model.config.model_type if config.model.config else config.model.family,
    }
    inputs = {"corpus": corpus.content_digest, "checkpoint": checkpoint.manifest.content_digest}
    return commit_manifest(target, Manifest("model", digest, inputs=inputs, metadata=metadata))


def _refuse_damaged(message: str) -> None:
    raise SiloweaveError(
        f"{message.split(';', maxsplit=1)[0]}; run `siloweave pretrain` again: it continues from the commit before"
    )


def _consolidated(folder: Path, settings: PretrainSettings, model: Any) -> dict[str, Any]:
    """Full float32 weights from the ranks' shards."""
    import torch

    if settings.zero_stage == 0:
        states = torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
        module = dict(states["module"])
        # In 16 bits the module's weights are rounded, and the optimizer has its own.
        return module if settings.precision == "fp32" else module | _master_weights(states, settings, model)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):  # it prints, and shows bars
        return dict(get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name))


def _master_weights(states: dict[str, Any], settings: PretrainSettings, model: Any) -> dict[str, Any]:
    """DeepSpeed saves the master weights of ZeRO-0 without names, in the order of the optimizer's groups."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = new_optimizer(settings, model).param_groups
    ordered = [names[parameter] for group in groups for parameter in group["params"]]
    return dict(zip(ordered, chain.from_iterable(states["optimizer"]["fp32_groups"]), strict=True))


def _by_every_name(model: Any, weights: dict[str, Any]) -> dict[str, Any]:
    """Weights that are tied have one value under all of their names: of master weights, which bear the first alone."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        weights[name] = weights[first.setdefault(id(parameter), name)]
    return weights


def _card(config: RunConfig, corpus: Manifest, model: Any, parameters: int) -> str:
    counts = corpus_counts(corpus)
    return _CARD.format(
        name=f"{config.run.name} base model",
        architecture=type(model).__name__,
        parameters=parameters,
        objective=config.objective,
        source=", ".join(source.source for source in corpora(config.data).values()),
        tokens=counts["tokens"],
        characters=counts["characters"],
        steps=", then ".join(f"{stage.steps} steps at {stage.context_length} tokens" for stage in config.stages),
        batch_size=config.pretrain.batch_size,
        optimizer=config.pretrain.optimizer,
        stage=config.pretrain.zero_stage,
        ranks=config.cluster.world_size,
    )
