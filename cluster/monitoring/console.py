"""What a person sees while a run goes on: progress bars on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from cluster.monitoring.durations import Remaining, duration
from configs.ending import came_through
from configs.printing import FIGURES, printable, rounded, say

_TOTALS = {"part": "parts", "step": "steps", "round": "rounds", "scored": "of", "trial": "of"}
_POSITIONS = {"part": "part", "step": "step", "round": "round", "scored": "done", "trial": "done"}
_SHOWN = {
    "convert",
    "damaged",
    "lost",
    "missing",
    "restart",
    "rollback",
    "refused",
    "rejected",
    "resume",
    "source",
    "timeout",
    "tokenizer",
    "waiting",
    "unused",
}
_PLAIN_EVERY_S = 10.0


class Terminal(Console):
    """Rich's console for strangers' words: they are no markup, and what is not shown as itself is escaped."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Every string comes through here, also those in a table."""
        return super().render_str(printable(text), **options)


class Progressing:
    """Listens to events and shows them. Use as a context; standard output stays free for results."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Terminal(stderr=True, quiet=quiet)
        self._bars = self._console.is_terminal and not quiet
        self._progress = Progress(
            TextColumn("[bold]{task.description:16}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self._console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._remaining: dict[str, Remaining] = {}
        self._last_line = 0.0

    def __enter__(self) -> "Progressing":
        if self._bars:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._progress.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        """Shows one event."""
        kind, stage = event["event"], event["stage"]
        if kind in _TOTALS:
            self._advance(stage, event[_POSITIONS[kind]], event[_TOTALS[kind]], _note(event))
        elif kind == "start" and stage == "generate":
            self._progress.stop()  # text streams by; a live display would hold it back until the end of a line
        elif kind == "start" and self._bars and stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=None, note="")
        elif kind == "end":
            self._finish(stage, event["seconds"])
        elif kind in _SHOWN:
            self._console.print(f"{stage}: {kind}: {_detail(event)}", soft_wrap=True)

    def _advance(self, stage: str, position: int, total: int, note: str) -> None:
        left = self._remaining.setdefault(stage, Remaining())(position, total)
        if left is not None and position < total:
            note = ", ".join([*([note] if note else []), f"{duration(left)} left"])
        if self._bars:
            if stage not in self._tasks:
                self._tasks[stage] = self._progress.add_task(stage, total=total, note="")
            self._progress.update(self._tasks[stage], completed=position, total=total, note=printable(note))
        elif position == total or time.monotonic() - self._last_line > _PLAIN_EVERY_S:
            self._last_line = time.monotonic()
            self._console.print(f"{stage}: {position}/{total} {note}", soft_wrap=True)

    def _finish(self, stage: str, seconds: float) -> None:
        if self._bars and stage in self._tasks:
            total = self._progress.tasks[self._tasks[stage]].total or 1
            self._progress.update(self._tasks[stage], total=total, completed=total)
        if not self._bars:
            self._console.print(f"{stage}: done in {seconds:.1f} s", soft_wrap=True)


def _note(event: dict[str, Any]) -> str:
    stage = f"stage {event['training_stage']}/{event['training_stages']}, " if "training_stage" in event else ""
    if event["event"] == "step":
        share = f", MFU {100 * event['mfu']:.1f}%" if event.get("mfu") else ""
        return f"{stage}loss {event['loss']:.3f}, {event['tokens'] / event['seconds']:,.0f} tokens/s{share}"
    if event["event"] == "round":
        late = f", up to {event['stalest']} steps late" if event.get("stalest") else ""
        return f"{stage}{len(event['answered'])} silos{late}, {event['bytes'] / 1e6:.1f} MB"
    if event["event"] == "trial":
        return f"trial {event['trial']} {event['status']}" + (f": {event['cause']}" if "cause" in event else "")
    return ""


def _detail(event: dict[str, Any]) -> str:
    if "message" in event or "cause" in event:
        return str(event.get("message") or event.get("cause"))
    return ", ".join(f"{name} {value}" for name, value in event.items() if name not in ("time", "stage", "event"))


def refresh(show: Callable[[], list[str]], seconds: float) -> None:
    """Shows lines anew until Ctrl-C: in place on a terminal, below the last ones elsewhere."""
    console = Terminal()
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False, transient=False) as live:
        while True:
            lines = show()
            if console.is_terminal:
                live.update(Text("\n".join(map(printable, lines))), refresh=True)
            else:
                say(*lines)
            time.sleep(seconds)
    came_through()


_RECORDS = {"silos": "the silos' held-out records", "public": "the public text"}
_MODELS = {"base": "base model", "dp": "with DP", "no_dp": "without DP"}


def figure_tables(in_full: dict[str, dict[str, Any]]) -> list[Table]:
    """What was found of each model in full, on whosever records there were any."""
    return [
        _figures(_RECORDS[whose], models)
        for whose, models in in_full.items()
        if any(model["figures"] for model in models.values())
    ]


def _figures(records: str, models: dict[str, Any]) -> Table:
    one = next(iter(models.values()))
    table = Table(title=f"{records}: {one['records']:,} of {one['units']:,} units", title_justify="left")
    table.add_column("figure")
    table.add_column("by")
    for model in models:
        table.add_column(_MODELS[model], justify="right")
    made = [found["figures"] for found in models.values()]
    rows = [(by, name) for figures in made for by, own in figures.items() for name in own]
    for by, name in dict.fromkeys(rows):
        table.add_row(name, by, *(_with_interval(figures.get(by, {}).get(name)) for figures in made))
    table.caption = "in brackets: 95% of bootstrap draws of whole units"
    return table


def _with_interval(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return rounded(None)
    return f"{rounded(figure['value'])}{_between(figure['interval'])}"


def _between(interval: list[float] | None) -> str:
    return f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""


def result_table(report: dict[str, Any]) -> Table:
    """The demo's result at a glance."""
    federated, privacy, pretrain = report["federated"], report["privacy"], report["pretrain"]
    table = Table(title=f"Siloweave: {report['name']}", title_justify="left")
    table.add_column("")
    metric = federated["metric"]
    table.add_column(f"{FIGURES[metric]} on the silos' held-out records", justify="right")
    table.add_column("epsilon (delta)", justify="right")
    base, claim = federated[f"{metric}_base"], privacy["headline"]
    rows = [
        ("base model, public text only", "base", "0"),
        ("federated with DP", "dp", f"{claim['epsilon']:.2f} ({claim['delta']:g})"),
        ("federated without DP", "no_dp", "unbounded"),
    ]
    for label, model, epsilon in rows:
        value, found = federated[f"{metric}_{model}"], federated["in_full"]["silos"].get(model, {}).get("figures", {})
        change = f"  ({100 * (value / base - 1):+.1f}%)" if value and base and value is not base else ""
        interval = found.get("siloweave", {}).get(metric, {}).get("interval")
        table.add_row(label, f"{rounded(value)}{_between(interval)}{change}", epsilon)
    for found in federated["private_evaluation"]:
        label = f"round {found['round']}" if found["round"] else "base model"
        value, error = found[metric], found[f"{metric}_error"]
        shown = f"{value:.3f} ± {error:.3f}" if value is not None else "lost in the noise"
        for other in ("macro_f1", "answer_chrf"):
            if found.get(other) is not None:
                shown += f"; {FIGURES[other]} {found[other]:.3f} ± {found[f'{other}_error']:.3f}"
        table.add_row(f"{label}, by private evaluation", shown, "included above")
    pretrained = (
        f"{pretrain['tokens']:,} tokens at {pretrain['tokens_per_s']:,.0f} tokens/s on {pretrain['world_size']} ranks; "
        if pretrain  # not a base model that others have made
        else ""
    )
    moved = f"{federated['rounds']} rounds of {federated['bytes_per_round'] / 1e6:.1f} MB"
    table.caption = f"{pretrained}{federated['silos']} silos, {moved}; held-out figures are simulation_only"
    return table
