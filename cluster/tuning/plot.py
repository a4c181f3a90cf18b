"""A search as one picture: each trial's course, and where each searched setting's good values lie."""

import io
from typing import Any

_INK, _ACCENT, _MUTED = "#1d3557", "#d1495b", "#8d99ae"


def plot(document: dict[str, Any]) -> str:
    """The picture of a ``tune.json`` as SVG."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    metric, best = document["metric"], document["best"]["number"]
    names = list(document["trials"][0]["values"])
    figure, axes = plt.subplots(1, 1 + len(names), figsize=(4.2 * (1 + len(names)), 3.2), layout="constrained")
    panels = list(axes.flat)
    for row in document["trials"]:
        color, width = (_ACCENT, 2) if row["number"] == best else (_MUTED if row["status"] != "finished" else _INK, 1)
        points = row["points"]
        panels[0].plot(
            [point["step"] for point in points],
            [point[metric] for point in points],
            marker="o",
            markersize=3,
            color=color,
            linewidth=width,
            zorder=3 if row["number"] == best else 2,
        )
    panels[0].set(title="Trials (red: the best; grey: stopped early)", xlabel="step or round", ylabel=metric)
    for panel, name in zip(panels[1:], names, strict=True):
        _scatter(panel, document, name)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    return buffer.getvalue()


def _scatter(panel: Any, document: dict[str, Any], name: str) -> None:
    metric, best = document["metric"], document["best"]["number"]
    kind = next(text for text in document["parameters"] if text.startswith(f"{name}=")).partition("=")[2]
    rows = [row for row in document["trials"] if row[metric] is not None]
    values = [row["values"][name] for row in rows]
    if kind.startswith("choice"):
        values = [str(value) for value in values]
    colors = [_ACCENT if row["number"] == best else _INK if row["status"] == "finished" else _MUTED for row in rows]
    panel.scatter(values, [row[metric] for row in rows], c=colors, s=24, zorder=2)
    if kind.startswith("log"):
        panel.set_xscale("log")
    panel.set(title="At the end", xlabel=name, ylabel=metric)
