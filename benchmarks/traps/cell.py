"""What one library does in one trap: a verdict that was computed, and the evidence for it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["pass", "refuses", "stops", "warns", "fails", "n/a"]
MEANING: dict[Verdict, str] = {
    "pass": "the guarantee held, as measured",
    "refuses": "a clear error or an abandoned release, made for this case: nothing wrong leaves",
    "stops": "an error or a hang that is not made for this case: nothing wrong leaves, and nobody is told why",
    "warns": "wrong, and a warning or the documentation says so",
    "fails": "wrong, and nothing says so",
    "n/a": "the mechanism does not exist in this library",
}


@dataclass(frozen=True)
class Cell:
    """Verdict and one line of evidence."""

    verdict: Verdict
    evidence: str


Check = Callable[[], Cell]


def judged(holds: bool, evidence: str, otherwise: Verdict = "fails") -> Cell:
    return Cell("pass" if holds else otherwise, evidence)


def absent(reason: str) -> Check:
    return lambda: Cell("n/a", reason)


def of_modes(cells: Mapping[str, Cell]) -> Cell:
    """One cell of several modes of a library: one silent failure fails it, one working mode passes it."""
    order: list[Verdict] = ["fails", "warns", "pass", "stops", "refuses", "n/a"]
    worst = min((cell.verdict for cell in cells.values()), key=order.index)
    return Cell(worst, "; ".join(f"{mode}: {cell.evidence}" for mode, cell in cells.items()))


def first_line(error: BaseException, length: int = 90) -> str:
    """An error as evidence."""
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    return text if len(text) <= length else text[: length - 3] + "..."
