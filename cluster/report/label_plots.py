"""Plots of labels: which is taken for which, and whether a model's probabilities mean what they say."""

from typing import Any

from cluster.report.plots import ACCENT, INK, MUTED, new_figure, svg
from configs.printing import printable

_NAMED = 30  # with more labels their names would stand on each other


def confusion_plot(labels: list[str], counts: list[list[int]]) -> str:
    """Records by right label (rows) and by the model's; the darker, the larger the share of the right label's."""
    figure, (axes,) = new_figure()
    shares = [[count / max(sum(row), 1) for count in row] for row in counts]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.grid(visible=False)
    axes.set(title="Which label is taken for which", xlabel="the model's label", ylabel="right label")
    if len(labels) <= _NAMED:
        places, names = range(len(labels)), [printable(label) for label in labels]
        axes.set_xticks(places, names, rotation=45, ha="right", fontsize=7)
        axes.set_yticks(places, names, fontsize=7)
    if len(labels) <= _NAMED // 3:
        for row, of_row in enumerate(counts):
            for column, count in enumerate(of_row):
                color = "white" if shares[row][column] > 0.5 else INK
                axes.text(column, row, str(count), ha="center", va="center", color=color, fontsize=8)
    return svg(figure)


def reliability_plot(bins: list[Any]) -> str:
    """How often predictions are right, by what the model gives them: on the diagonal they mean what they say."""
    figure, (axes,) = new_figure()
    means, frequencies, counts = zip(*bins, strict=True)
    axes.plot([0, 1], [0, 1], color=MUTED, linestyle="--", linewidth=1)
    axes.plot(means, frequencies, color=ACCENT, linewidth=1)
    axes.scatter(means, frequencies, s=[10 + 90 * count / max(counts) for count in counts], color=ACCENT)
    axes.set(
        title="Reliability", xlabel="the model's probability", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1)
    )
    return svg(figure)
