"""``report.html``: one self-contained page, plots inside as SVG."""

import io
from typing import Any

from configs.printing import printable
from privacy.plan import PlanRequest

_INK, _ACCENT, _MUTED = "#1d3557", "#d1495b", "#8d99ae"


def render(report: dict[str, Any]) -> str:
    """The page of a report."""
    from jinja2 import Environment, PackageLoader, select_autoescape

    environment = Environment(loader=PackageLoader("cluster.report", "."), autoescape=select_autoescape(default=True))
    plots = {
        "loss": _loss_plot(report) if report["pretrain"] else "",
        "rounds": _rounds_plot(report) if _has_scores(report["federated"]) else "",
        "epsilon": _epsilon_plot(report),
    }
    return environment.get_template("report.html.j2").render(report=report, plots=plots)


def _has_scores(federated: dict[str, Any]) -> bool:
    return bool(federated["public_text"] or any(federated["by_round"].values()))


def _figure() -> tuple[Any, Any]:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["text.parse_math"] = False  # a silo may be called anything
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(4.6, 3.0), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _svg(figure: Any) -> str:
    from matplotlib import pyplot as plt

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _loss_plot(report: dict[str, Any]) -> str:
    figure, axes = _figure()
    losses = report["pretrain"]["losses"]
    axes.plot(range(1, len(losses) + 1), losses, color=_INK, linewidth=1)
    axes.set(title="Pretraining loss", xlabel="step", ylabel="nats a token")
    return _svg(figure)


def _rounds_plot(report: dict[str, Any]) -> str:
    federated = report["federated"]
    figure, axes = _figure()
    for key, label, color in (("dp", "with DP", _ACCENT), ("no_dp", "without DP", _INK)):
        values = federated["by_round"][key]
        if values:
            series = [federated["bits_per_char_base"], *values]
            axes.plot(range(len(series)), series, marker="o", color=color, label=label)
    if public := federated["public_text"]:
        axes.plot(range(len(public)), public, marker="o", color=_MUTED, label="public text, with DP")
    axes.set(title="Text that no silo trained on", xlabel="round", ylabel="bits per character")
    axes.legend(frameon=False)
    return _svg(figure)


def _epsilon_plot(report: dict[str, Any]) -> str:
    """What a silo has spent by round: all silos run the same plan, those that missed rounds spent less.

    With clients as units it is what their aggregator's ledger has spent.
    """
    privacy, rounds = report["privacy"], report["federated"]["rounds"]
    figure, axes = _figure()
    plan = PlanRequest(**privacy["plan"])
    spent = [plan.model_copy(update={"rounds": done}).epsilon for done in range(1, rounds + 1)]
    groups: dict[int, list[str]] = {}
    for name, silo in privacy["silos"].items():
        if silo["rounds_charged"] is not None:  # one that did not answer the close has stated nothing
            groups.setdefault(silo["rounds_charged"], []).append(name)
    for charges, names in groups.items():
        label = printable(", ".join(names) if len(names) < 4 else f"{len(names)} silos")
        axes.plot(range(charges + 1), [0.0, *spent[:charges]], marker="o", color=_ACCENT, label=label)
    axes.axhline(privacy["epsilon"], color=_MUTED, linestyle="--", label="reserved")
    axes.set(title="Epsilon spent in this run", xlabel="round", ylabel=f"epsilon at {privacy['delta']:g}")
    axes.legend(frameon=False)
    return _svg(figure)
