"""``showcase.html``: what a run's models say to the same prompts, and the part of the report that leads there."""

from pathlib import Path
from typing import Any

from cluster.report.explained import shown
from configs.parse import json_object

MODELS = {
    "base": ("base model", "public text alone"),
    "dp": ("with DP", "after the silos' rounds, under the guarantee"),
    "no_dp": ("without DP", "the same rounds without noise, for comparison on public data"),
}


def render(document: dict[str, Any]) -> str:
    """The page, in one file."""
    from jinja2 import Environment, PackageLoader, select_autoescape

    environment = Environment(loader=PackageLoader("cluster.report", "."), autoescape=select_autoescape(default=True))
    template = environment.get_template("showcase.html.j2")
    rows = [
        (prompt, {name: answers[number] for name, answers in document["answers"].items()})
        for number, prompt in enumerate(document["prompts"])
    ]
    explanations = [shown(one) for one in document["explanations"]]
    return template.render(document=document, rows=rows, models=MODELS, explanations=explanations)


def showcase_of(document: Path, page: Path, model: str) -> str:
    """The page's name, for a link; empty where there is none of this model.

    Args:
        document: of ``showcase.json``.
        page: beside it.
        model: content digest of the federation's manifest.
    """
    if not document.exists() or not page.exists():
        return ""
    return page.name if json_object(document.read_bytes(), str(document)).get("model") == model else ""
