"""The frame that every plot shares: SVG as text, the same colours, no more ink than the data needs."""

import io
from typing import Any

INK, ACCENT, MUTED = "#1d3557", "#d1495b", "#8d99ae"


def new_figure(width: float = 4.6, height: float = 3.0, panels: int = 1) -> tuple[Any, list[Any]]:
    """A figure and its panels, side by side.

    Args:
        width: of a panel, in inches.
        height: in inches.
        panels: how many.
    """
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["text.parse_math"] = False  # a silo may be called anything
    mpl.rcParams["svg.hashsalt"] = "siloweave"  # or names inside would differ from one time to the next
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(1, panels, figsize=(width * panels, height), layout="constrained", squeeze=False)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure, list(grid.flat)


def svg(figure: Any) -> str:
    """Closes the figure, and gives it as an ``<svg>`` element. Equal data have equal text."""
    from matplotlib import pyplot as plt

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
