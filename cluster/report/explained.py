"""``explanations.html``: texts whose words are coloured by what they add to an answer."""

from collections.abc import Sequence
from typing import Any

from trainer.explanation.attribution import Explanation


def render(name: str, explanations: Sequence[Explanation]) -> str:
    """The page of a run's explanations, in one file."""
    from jinja2 import Environment, PackageLoader, select_autoescape

    environment = Environment(loader=PackageLoader("cluster.report", "."), autoescape=select_autoescape(default=True))
    shown = [_shown(one) for one in explanations]
    return environment.get_template("explanations.html.j2").render(name=name, explanations=shown)


def _shown(one: Explanation) -> dict[str, Any]:
    attention = [piece.attention for piece in one.pieces if piece.attention is not None]
    return {
        "answer": one.answer,
        "nats": one.nats,
        "without": one.without,
        "unexplained": one.unexplained,
        "gradients": _scaled(one, [piece.gradients for piece in one.pieces], "{:+.3f} nats"),
        "attention": _scaled(one, attention, "{:.1%}") if attention else [],
    }


def _scaled(one: Explanation, values: Sequence[float], form: str) -> list[tuple[str, float, str]]:
    """Each piece's text, its value as a share of the largest, and its value in words."""
    largest = max(map(abs, values)) or 1.0
    return [(piece.text, value / largest, form.format(value)) for piece, value in zip(one.pieces, values, strict=True)]
