"""A search as one picture: each trial's course, and where each searched setting's good values lie."""

from typing import Any

from cluster.report.plots import ACCENT, INK, MUTED, new_figure, svg


def plot(document: dict[str, Any]) -> str:
    """The picture of a ``tune.json`` as SVG."""
    metric, best = document["metric"], document["best"]["number"]
    names = list(document["trials"][0]["values"])
    figure, panels = new_figure(width=4.2, height=3.2, panels=1 + len(names))
    for row in document["trials"]:
        color, width = (ACCENT, 2) if row["number"] == best else (MUTED if row["status"] != "finished" else INK, 1)
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
    return svg(figure)


def _scatter(panel: Any, document: dict[str, Any], name: str) -> None:
    metric, best = document["metric"], document["best"]["number"]
    kind = next(text for text in document["parameters"] if text.startswith(f"{name}=")).partition("=")[2]
    rows = [row for row in document["trials"] if row[metric] is not None]
    values = [row["values"][name] for row in rows]
    if kind.startswith("choice"):
        values = [str(value) for value in values]
    colors = [ACCENT if row["number"] == best else INK if row["status"] == "finished" else MUTED for row in rows]
    panel.scatter(values, [row[metric] for row in rows], c=colors, s=24, zorder=2)
    if kind.startswith("log"):
        panel.set_xscale("log")
    panel.set(title="At the end", xlabel=name, ylabel=metric)
