"""Texts whose words are coloured by what they add to an answer: ``explanations.html``, and a part of the report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.parse import json_object


def render(name: str, explanations: Sequence[dict[str, Any]]) -> str:
    """The page of a run's explanations, in one file."""
    from jinja2 import Environment, PackageLoader, select_autoescape

    environment = Environment(loader=PackageLoader("cluster.report", "."), autoescape=select_autoescape(default=True))
    template = environment.get_template("explanations.html.j2")
    return template.render(name=name, explanations=[shown(one) for one in explanations])


def explanations_of(path: Path, model: str) -> list[dict[str, Any]]:
    """What was explained of a model.

    Args:
        path: of ``explanations.json``.
        model: content digest of the federation's manifest. What was explained of an earlier model is left out.
    """
    if not path.exists():
        return []
    document = json_object(path.read_bytes(), str(path))
    return list(document["explanations"]) if document["model"] == model else []


def shown(one: dict[str, Any]) -> dict[str, Any]:
    """An explanation with each piece's colour."""
    gradients = [piece["gradients"] for piece in one["pieces"]]
    attention = [piece["attention"] for piece in one["pieces"] if piece["attention"] is not None]
    return {
        **{name: one[name] for name in ("answer", "nats", "without", "unexplained")},
        "gradients": _scaled(one, gradients, "{:+.3f} nats"),
        "attention": _scaled(one, attention, "{:.1%}") if attention else [],
    }


def _scaled(one: dict[str, Any], values: Sequence[float], form: str) -> list[tuple[str, float, str]]:
    """Each piece's text, its value as a share of the largest, and its value in words."""
    largest = max(map(abs, values)) or 1.0
    texts = [piece["text"] for piece in one["pieces"]]
    return [(text, value / largest, form.format(value)) for text, value in zip(texts, values, strict=True)]
