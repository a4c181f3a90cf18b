"""What a run's models say to the same prompts, on one page for people: before the silos, after them, and without DP."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.run import Run
from configs.errors import InputError
from configs.schema.schema import RunConfig
from configs.storage.files import write_atomic
from configs.storage.layout import FEDERATED, RunFiles
from configs.storage.manifests import MANIFEST, require_manifest
from configs.storage.sealing import load_key
from trainer.inference.decoding import Decoding

_EXPLAINED_TOKENS = 8
_LABELS_TEXTS = ("classification", "multilabel", "entities")


def show(run: Run, decoding: Decoding) -> None:
    """Writes ``showcase.html``, and the same for machines.

    Prompts are the settings' own: no record is shown. A base model without the task's head answers nothing, and is
    left out; so is a model that was not made.

    Args:
        run: with a finished federation.
        decoding: how texts are drawn.

    Raises:
        InputError: the federation's certificate doesn't hold, or is about another model.
        SiloweaveError: the disk is full or not writable.
    """
    from trainer.data.tokenizer import load_tokenizer
    from trainer.tasks.task import task_of

    manifest = require_manifest(run.files.federated, FEDERATED, "federate")
    task, tokenizer = task_of(run.config.federated.task_spec, run.model), load_tokenizer(run.model)
    prompts = _prompts(run, task)
    if not prompts:
        return
    with run.stage("show"):
        answers: dict[str, list[str]] = {}
        explained: list[dict[str, Any]] = []
        missing = ""
        for name, model in _models(run, task):
            answers[name] = [_answer(task, tokenizer, model, prompt, decoding) for prompt in prompts]
            if name == "dp":
                explained, missing = _explained(task, tokenizer, model, prompts)
        document = {
            "model": manifest.content_digest,
            "name": run.config.run.name,
            "prompts": prompts,
            "answers": answers,
            "privacy": _privacy(run.config, run.files.federated, manifest.inputs["model"]),
            "explanations": explained,
            "missing": missing,
        }
    _write(run.files, document)


def _write(files: RunFiles, document: dict[str, Any]) -> None:
    """The page comes first: a report leads to it by what the other file says of its model."""
    from cluster.report.showcase import render

    write_atomic(files.showcase_page, render(document).encode())
    write_atomic(files.showcase, json.dumps(document, indent=2, ensure_ascii=False).encode())


def _prompts(run: Run, task: Any) -> list[str]:
    """A text to label is one that somebody has thought of; a text to go on from may be the sample's own."""
    asked = run.config.evaluate
    if task.head is not None and task.name not in _LABELS_TEXTS:
        return []
    usual = [asked.prompt] if task.head is None else []
    return [prompt for prompt in dict.fromkeys(asked.prompts or usual) if prompt.strip()]


def _models(run: Run, task: Any) -> Any:
    from federated.coordinator.final_model import final_model
    from trainer.models.load import load_model

    if task.head is None:
        yield "base", load_model(run.model, load_key(run.config.run.encryption_key_file)).eval()
    for name, folder in _federations(run):
        yield name, final_model(run.config, run.model, folder)


def _federations(run: Run) -> list[tuple[str, Path]]:
    """Those that are finished; one without DP that the settings no longer ask for is an earlier start's."""
    asked = [("dp", run.files.federated), *([("no_dp", run.files.no_dp)] if run.config.evaluate.without_dp else [])]
    return [(name, folder) for name, folder in asked if (folder / MANIFEST).is_file()]


def _answer(task: Any, tokenizer: Any, model: Any, prompt: str, decoding: Decoding) -> str:
    from trainer.explanation.aims import aims
    from trainer.inference.generation import write

    try:
        if task.head is None:
            return write(model, tokenizer, task.opening(prompt), task.context_length, decoding)
        return ", ".join(aim.answer for aim in aims(task, tokenizer, model, prompt, _EXPLAINED_TOKENS))
    except InputError as error:  # the prompt is too long, for instance: what was trained for an hour is shown without
        return f"({error})"


def _explained(task: Any, tokenizer: Any, model: Any, prompts: list[str]) -> tuple[list[dict[str, Any]], str]:
    """Why the model with DP answers as it does; or why that can't be said."""
    from trainer.explanation.attribution import explain

    try:
        return [asdict(one) for text in prompts for one in explain(task, tokenizer, model, text, _EXPLAINED_TOKENS)], ""
    except InputError as error:  # captum is an extra, and some models can't be explained: the page is whole without
        return [], str(error)


def _privacy(config: RunConfig, federation: Path, base_digest: str) -> dict[str, Any]:
    """What is claimed of the model with DP, as whoever serves it says it; and where it lies in the run."""
    from cluster.serving.claims import of_federation
    from federated.coordinator.final_model import published

    made = published(config)
    claim = of_federation(federation, federation / made, base_digest, load_key(config.run.encryption_key_file))
    return {**claim.document(), "model": f"{federation.name}/{made}"}
