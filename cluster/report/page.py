"""``report.html``: one self-contained page, plots inside as SVG."""

import math
from typing import Any

from cluster.report.explained import shown
from cluster.report.label_plots import confusion_plot, reliability_plot
from cluster.report.plots import ACCENT, INK, MUTED, new_figure, svg
from configs.printing import FIGURES, printable
from privacy.plan import PlanTerms


def render(report: dict[str, Any]) -> str:
    """The page of a report."""
    from jinja2 import Environment, PackageLoader, select_autoescape

    environment = Environment(loader=PackageLoader("cluster.report", "."), autoescape=select_autoescape(default=True))
    plots = {
        "loss": _loss_plot(report) if report["pretrain"] else "",
        "rounds": _rounds_plot(report) if _has_scores(report["federated"]) else "",
        "epsilon": _epsilon_plot(report),
        "labels": _label_plots(report["federated"]["in_full"]),
    }
    explanations = [shown(one) for one in report["explanations"]]
    template = environment.get_template("report.html.j2")
    return template.render(report=report, plots=plots, figures=FIGURES, explanations=explanations)


def _label_plots(in_full: dict[str, dict[str, Any]]) -> str:
    """Of the model with DP: on the silos' records, or on one's own public text where the silos keep theirs."""
    found = in_full["silos"].get("dp") or in_full["public"].get("dp") or {}
    plots = [confusion_plot(found["labels"], found["confusion"])] if "confusion" in found else []
    return "".join([*plots, *([reliability_plot(found["reliability"])] if found.get("reliability") else [])])


def _has_scores(federated: dict[str, Any]) -> bool:
    figures = (*federated["public_text"], *federated["by_round"]["dp"], *federated["by_round"]["no_dp"])
    return any(value is not None for value in figures)


def _loss_plot(report: dict[str, Any]) -> str:
    figure, (axes,) = new_figure()
    losses = report["pretrain"]["losses"]
    axes.plot(range(1, len(losses) + 1), losses, color=INK, linewidth=1)
    axes.set(title="Pretraining loss", xlabel="step", ylabel="nats per token")
    return svg(figure)


def _rounds_plot(report: dict[str, Any]) -> str:
    federated = report["federated"]
    figure, (axes,) = new_figure()
    for key, label, color in (("dp", "with DP", ACCENT), ("no_dp", "without DP", INK)):
        values = federated["by_round"][key]
        if values:
            series = _drawn([federated[f"{federated['metric']}_base"], *values])
            axes.plot(range(len(series)), series, marker="o", color=color, label=label)
    if public := federated["public_text"]:
        axes.plot(range(len(public)), _drawn(public), marker="o", color=MUTED, label="public text, with DP")
    axes.set(title="Records that no silo trained on", xlabel="round", ylabel=FIGURES[federated["metric"]])
    axes.legend(frameon=False)
    return svg(figure)


def _drawn(values: list[float | None]) -> list[float]:
    """What is not available is a gap."""
    return [math.nan if value is None else value for value in values]


def _epsilon_plot(report: dict[str, Any]) -> str:
    """What a silo has spent by round: all silos run the same plan, those that missed rounds spent less.

    With clients as units it is what their aggregator's ledger has spent.
    """
    privacy, rounds = report["privacy"], report["federated"]["rounds"]
    figure, (axes,) = new_figure()
    plan = PlanTerms(**privacy["plan"])
    spent = [plan.model_copy(update={"rounds": done}).epsilon for done in range(1, rounds + 1)]
    groups: dict[int, list[str]] = {}
    for name, silo in privacy["silos"].items():
        if silo["rounds_charged"] is not None:  # one that did not answer the close has stated nothing
            groups.setdefault(silo["rounds_charged"], []).append(name)
    for charges, names in groups.items():
        label = printable(", ".join(names) if len(names) < 4 else f"{len(names)} silos")
        axes.plot(range(charges + 1), [0.0, *spent[:charges]], marker="o", color=ACCENT, label=label)
    axes.axhline(privacy["epsilon"], color=MUTED, linestyle="--", label="reserved")
    axes.set(title="Epsilon spent in this run", xlabel="round", ylabel=f"epsilon at {privacy['delta']:g}")
    axes.legend(frameon=False)
    return svg(figure)
