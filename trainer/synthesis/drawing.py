"""Records of a model's own: drawn batch by batch, filtered, and each of them once.

A batch is a function of the model, the settings and its number, and lies in a file as soon as it is drawn: an
interrupted command goes on where it stopped, and what comes out is the same, byte for byte. All that is looked at is
what the model has written, so all of it is post-processing of the model.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, BinaryIO

from configs.errors import InputError, SiloweaveError
from configs.storage.files import digest_json
from trainer.data.cleaning import CleaningCounts, Copies, candidates, normalise
from trainer.inference import part_files
from trainer.inference.decoding import Decoding
from trainer.inference.generation import draw, room_of
from trainer.inference.tables import json_line
from trainer.synthesis.conditions import Condition, Form
from trainer.synthesis.filters import Filter

BATCH = 32
SIMILARITY = 0.5
"""Share of words in a row that two records have in common from which on they are one (estimated, MinHash)."""
_FRUITLESS = 20


class Fruitless(SiloweaveError):
    """Nothing can be kept of what the model writes."""


@dataclass(frozen=True)
class Drawing:
    """What records are drawn with.

    Attributes:
        model: that writes them, in evaluation mode.
        tokenizer: the model's.
        context_length: of the model.
        form: of a record.
        conditions: that records are drawn for, as many for each of them.
        decoding: how tokens are chosen.
        number: of records.

    Raises:
        InputError: every text would be the same, or what is given fills the model's context.
    """

    model: Any
    tokenizer: Any
    context_length: int
    form: Form
    conditions: Sequence[Condition]
    decoding: Decoding
    number: int

    @property
    def identity(self) -> dict[str, Any]:
        """All that shapes the batches beside the model."""
        given = [[dict(condition.given), condition.opening.ids] for condition in self.conditions]
        return {"batch": BATCH, "number": self.number, "decoding": asdict(self.decoding), "given": given}

    def __post_init__(self) -> None:
        """Refuses what can't be drawn before anything is."""
        if not self.decoding.temperature:
            raise InputError("--decode temperature=0: every text would be the same; give a temperature above 0")
        for condition in self.conditions:
            room_of(self.model, condition.opening, self.context_length)

    def batch(self, number: int, condition: Condition) -> list[tuple[str, str]]:
        """The texts of one batch, each with why it is dropped."""
        room = room_of(self.model, condition.opening, self.context_length)
        seed = int(digest_json([self.decoding.seed, number])[:15], 16)
        drawn = draw(
            self.model,
            self.tokenizer,
            condition.opening,
            self.context_length,
            replace(self.decoding, seed=seed),
            BATCH,
        )
        check = Filter(self.tokenizer, full=self.decoding.max_new_tokens >= room)
        return [(one.text, check.fault(one)) for one in drawn]


@dataclass(frozen=True)
class Synthesis:
    """What was drawn.

    Attributes:
        records: that were kept, with the columns of the run's own data; those of all conditions take turns.
        drawn: texts in all.
        dropped: how many of them, by why.
        resumed: how many of them earlier tries had drawn.
    """

    records: Sequence[Mapping[str, Any]]
    drawn: int
    dropped: Mapping[str, int]
    resumed: int


class _Kept:
    """What is kept of the batches, condition by condition."""

    def __init__(self, drawing: Drawing) -> None:
        conditions = len(drawing.conditions)
        self._drawing = drawing
        each, left = divmod(drawing.number, conditions)
        self._wanted = [each + (place < left) for place in range(conditions)]
        self._records: list[list[Mapping[str, Any]]] = [[] for _ in range(conditions)]
        self._batches, self._fruitless = [0] * conditions, [0] * conditions
        self._copies = Copies(SIMILARITY)
        self.dropped, self.drawn = Counter[str](), 0

    @property
    def number(self) -> int:
        return sum(map(len, self._records))

    def next(self) -> int | None:
        """The condition whose turn it is; None: all of them have enough.

        Raises:
            Fruitless: nothing can be kept of what the model writes for it.
        """
        short = [place for place, wanted in enumerate(self._wanted) if len(self._records[place]) < wanted]
        if not short:
            return None
        place = min(short, key=lambda one: self._batches[one])
        if self._fruitless[place] == _FRUITLESS:
            reasons = ", ".join(f"{name} {count}" for name, count in self.dropped.most_common())
            raise Fruitless(
                f"{self._drawing.conditions[place]}: of the last {_FRUITLESS * BATCH} texts none could be kept, after "
                f"{self.number} records; of all {self.drawn} texts were dropped: {reasons}; ask for fewer records, or "
                "set another --decode"
            )
        return place

    def add(self, place: int, texts: Sequence[Sequence[str]]) -> None:
        before = len(self._records[place])
        for text, fault in texts:
            self.drawn += 1
            if why := fault or self._copied(place, text):
                self.dropped[why] += 1
        self._batches[place] += 1
        self._fruitless[place] = 0 if len(self._records[place]) > before else self._fruitless[place] + 1

    def _copied(self, place: int, text: str) -> str:
        """Keeps a record; says why not, if it doesn't. The same text is no record twice, whatever else is given."""
        if len(self._records[place]) == self._wanted[place]:
            return "more than wanted"
        counts = CleaningCounts()
        (candidate,) = candidates([normalise(text)], 0)
        if not self._copies.keep(candidate, counts):
            return "an exact copy" if counts.exact_duplicates else "a near copy"
        self._records[place].append(self._drawing.form.record(self._drawing.conditions[place], text))
        return ""

    def records(self) -> list[Mapping[str, Any]]:
        return [record for turn in zip_longest(*self._records) for record in turn if record is not None]


def synthesise(
    drawing: Drawing,
    part: Path,
    identity: Mapping[str, Any],
    on_progress: Callable[[int, int], None] = lambda _done, _of: None,
) -> Synthesis:
    """Draws records until there are as many as are wanted.

    Args:
        drawing: what they are drawn with.
        part: file in which batches collect; an interrupted call goes on with those that are there.
        identity: which model it is: batches of another one are refused.
        on_progress: told how many records there are, and how many are wanted.

    Raises:
        InputError: the file is another call's, or damaged.
        Fruitless: nothing can be kept of what the model writes.
    """
    kept = _Kept(drawing)
    with part.open("a+b") as file:
        part_files.lock(file, part)
        earlier = part_files.resumed(file, digest_json({**identity, **drawing.identity}), part)
        lines = _lines(part, earlier)
        number = 0
        while (place := kept.next()) is not None:
            if number < earlier:
                texts = next(lines)
            else:
                texts = drawing.batch(number, drawing.conditions[place])
                _append(file, texts)
            kept.add(place, texts)
            number += 1
            on_progress(kept.number, drawing.number)
    return Synthesis(kept.records(), kept.drawn, dict(kept.dropped), min(earlier, number) * BATCH)


def _append(file: BinaryIO, texts: Sequence[tuple[str, str]]) -> None:
    file.write(json_line(texts))
    file.flush()
    os.fsync(file.fileno())


def _lines(part: Path, number: int) -> Iterator[list[tuple[str, str]]]:
    with part.open("rb") as file:
        for line in islice(file, 1, number + 1):
            try:
                yield [(str(text), str(fault)) for text, fault in json.loads(line)]
            except (ValueError, TypeError):
                raise InputError(f"{part}: is damaged; delete it, and give the command again") from None
