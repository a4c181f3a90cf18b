"""``siloweave explain``."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.commands.generate import lines_of
from cluster.commands.stages import ConfigOption, JsonOption, SetOption, with_run
from configs.errors import InputError
from configs.load import load
from configs.printing import answer, say
from configs.storage.layout import FEDERATED, RunFiles

_MOST_TEXTS = 1000


def explain(
    texts: Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...", help="What the model is asked.")] = None,
    config: ConfigOption = "demo",
    override: SetOption = None,
    file: Annotated[Path | None, typer.Option(help="Texts to explain, one in each line.")] = None,
    tokens: Annotated[int, typer.Option(min=1, max=256, help="Most tokens that a model writes whose task it is.")] = 8,
    as_json: JsonOption = False,
) -> None:
    """Shows which words of a text speak for the final model's answer to it: here, and on a page of the run."""
    asked = [*(texts or []), *(lines_of(file) if file else [])]
    if not asked:
        raise InputError("no text is given; give one, or --file FILE")
    if len(asked) > _MOST_TEXTS:
        raise InputError(f"{len(asked)} texts are given; give {_MOST_TEXTS} at most, or explain them in parts")
    found, directory = with_run(load(config, override or []), lambda run: _work(run, asked, tokens), as_json)
    for one in found if not as_json else []:
        say(f"{one['answer']} ({one['nats']:.2f} nats): {_strongest(one)}")
    done = {"directory": str(directory), "explanations": found}
    answer(as_json, done, f"explain: {RunFiles(directory).explained_page} shows it in colour")


def _work(run: Any, texts: list[str], tokens: int) -> list[dict[str, Any]]:
    from configs.storage.manifests import require_manifest

    # Said before the imports, which take seconds.
    manifest = require_manifest(run.files.federated, FEDERATED, "federate")
    from cluster.report.explained import render
    from configs.storage.files import write_atomic
    from federated.coordinator.final_model import final_model
    from trainer.data.tokenizer import load_tokenizer
    from trainer.explanation.attribution import explain as explained
    from trainer.tasks.task import task_of

    task, tokenizer = task_of(run.config.federated.task_spec, run.model), load_tokenizer(run.model)
    model = final_model(run.config, run.model, run.files.federated)
    found = [asdict(one) for text in texts for one in explained(task, tokenizer, model, text, tokens)]
    write_atomic(run.files.explained_page, render(run.config.run.name, found).encode())
    document = {"model": manifest.content_digest, "explanations": found}
    write_atomic(run.files.explanations, json.dumps(document, indent=2, ensure_ascii=False).encode())
    return found


def _strongest(one: dict[str, Any]) -> str:
    """The pieces that say the most, the strongest first."""
    ordered = sorted(one["pieces"], key=lambda piece: -abs(piece["gradients"]))[:6]
    return ", ".join(f"{piece['text'].strip() or piece['text']!r} {piece['gradients']:+.2f}" for piece in ordered)
