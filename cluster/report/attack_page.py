"""Membership inference drawn: the curves of attacks, and the page of what a silo's steward has found."""

from collections.abc import Mapping
from typing import Any

from cluster.report.plots import ACCENT, INK, MUTED, new_figure, svg
from configs.printing import rounded

ATTACKS = {
    "model_loss": "the model, by its loss",
    "model_loss_against_base": "the model, by its loss against the base model's",
    "updates": "this silo's updates, by where they point",
    "updates_lowered_loss": "this silo's updates, by how far they lower the loss",
}
ROUND_ATTACKS = {
    "loss": "loss after the update",
    "loss_against_start": "loss before it less loss after",
    "update": "the update itself",
}


def roc_plot(curves: Mapping[str, Mapping[str, Any]], title: str) -> str:
    """ROC of attacks, both axes logarithmic, because what counts are few false positives (Carlini et al. 2022).

    Args:
        curves: what ``membership_figures`` gave of each attack, by a name for people.
        title: above the plot.
    """
    figure, (axes,) = new_figure(height=4.6)
    for name, figures in curves.items():
        curve, label = figures["roc"], f"{name}: AUC {rounded(figures['auc'])}"
        axes.plot(curve["false_positive_rate"], curve["true_positive_rate"], label=label)
    axes.plot([1e-4, 1], [1e-4, 1], color=MUTED, linestyle="--", label="guessing")
    axes.set(xscale="log", yscale="log", xlim=(1e-3, 1), ylim=(1e-3, 1), title=title)
    axes.set(xlabel="false-positive rate", ylabel="true-positive rate")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")  # powers of ten would be formulas, which plots don't read
    figure.legend(loc="outside lower center", frameon=False, fontsize=7)
    return svg(figure)


def render(document: dict[str, Any]) -> str:
    """The page of an ``attack.json``, in one file."""
    from jinja2 import Environment, PackageLoader, select_autoescape

    environment = Environment(loader=PackageLoader("cluster.report", "."), autoescape=select_autoescape(default=True))
    named = {ATTACKS[name]: figures for name, figures in document["attacks"].items()}
    plots = [roc_plot(named, "Members against held-out records")]
    if document["rounds"]:
        plots.append(_rounds_plot(document["rounds"]))
    page = environment.get_template("attack.html.j2")
    return page.render(found=document, attacks=named, round_attacks=ROUND_ATTACKS, plots=plots)


def summary(document: dict[str, Any]) -> list[str]:
    """An ``attack.json`` in lines for people."""
    lines = [
        f"silo {document['silo']}, run {document['run']!r}: {document['members']} members against "
        f"{document['held_out']} held-out records; {len(document['rounds'])} of {document['rounds_left']} updates kept"
    ]
    for name, figures in document["attacks"].items():
        low, high = figures["auc_interval"]
        found = figures["true_positive_rate_at"]["0.01"]
        lines.append(
            f"{ATTACKS[name]}: AUC {figures['auc']:.3f} ({low:.3f} to {high:.3f}); finds {found:.1%} of the members at "
            "1% false alarms"
        )
    return lines


def _rounds_plot(rounds: list[dict[str, Any]]) -> str:
    """AUC round by round, each attack a little beside the others so that no interval hides another one."""
    figure, (axes,) = new_figure(height=4.6)
    for place, ((name, label), color) in enumerate(zip(ROUND_ATTACKS.items(), (INK, ACCENT, MUTED), strict=True)):
        found = [one[name] for one in rounds]
        values = [one["auc"] for one in found]
        reach = [
            [abs(value - one["auc_interval"][end]) for one, value in zip(found, values, strict=True)] for end in (0, 1)
        ]
        numbers = [one["round"] + (place - 1) / 8 for one in rounds]
        axes.errorbar(numbers, values, reach, fmt="o", markersize=3, capsize=2, color=color, label=label)
    axes.axhline(0.5, color=MUTED, linestyle="--", label="guessing")
    axes.set(title="What each round gave away", xlabel="round", ylabel="AUC with its 95% interval", ylim=(0, 1.02))
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower center", frameon=False, fontsize=7)
    return svg(figure)
