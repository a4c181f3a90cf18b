"""How a model chooses the tokens that it writes."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from configs.errors import InputError

_MOST_BEAMS = 64
_MOST_STOPS = 16
_MOST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Decoding:
    """Settings of one piece of writing.

    Attributes:
        max_new_tokens: most tokens to write, at least 1; the model's context ends them, too.
        temperature: softmax temperature; 0 takes the likeliest token, whatever ``top_k`` and ``top_p`` say.
        top_k: draws from so many of the likeliest tokens; 0: from all.
        top_p: draws from the fewest likeliest tokens that have this much of the probability, above 0 and at most 1.
        repetition_penalty: divides the logits of tokens that stand there already, above 0; 1 changes nothing.
        beams: beginnings that a beam search keeps; 1: no such search. It takes the likeliest, so temperature is 0.
        stop: texts that end what is written, and are no part of it.
        seed: of the draws.

    Raises:
        InputError: a setting is out of its range, or two of them contradict each other.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    beams: int = 1
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name, good, wanted in self._ranges():
            if not good:
                raise InputError(f"{name} is {getattr(self, name)!r}; give {wanted}")
        if self.beams > 1 and self.temperature > 0:
            raise InputError(
                f"temperature is {self.temperature!r} with {self.beams} beams, which draw nothing; give temperature 0, "
                "or 1 beam"
            )

    def _ranges(self) -> tuple[tuple[str, bool, str], ...]:
        stops = len(self.stop) <= _MOST_STOPS and all(self.stop)
        return (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < math.inf, "0 or more; 0 takes the likeliest token"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0, and at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a number above 0; 1 changes nothing"),
            ("beams", 1 <= self.beams <= _MOST_BEAMS, f"1 to {_MOST_BEAMS}"),
            ("stop", stops, f"at most {_MOST_STOPS} texts, none of them empty"),
            ("seed", 0 <= self.seed <= _MOST_SEED, "0 or more, below 2 to the power of 63"),
        )

    @property
    def arguments(self) -> dict[str, Any]:
        """The same for transformers' ``generate``, but for the stop strings.

        All of it is named: what a model's own generation_config.json says of these does not matter.
        """
        drawn = self.temperature > 0
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": drawn,
            "temperature": self.temperature if drawn else 1.0,
            "top_k": self.top_k if drawn else 0,
            "top_p": self.top_p if drawn else 1.0,
            "repetition_penalty": self.repetition_penalty,
            "num_beams": self.beams,
            **_NOTHING_ELSE,
        }


_NOTHING_ELSE = {
    "num_return_sequences": 1,
    "min_length": 0,
    "min_new_tokens": None,
    "max_time": None,
    "stop_strings": None,
    "use_cache": True,
}


def with_settings(decoding: Decoding, texts: Sequence[str]) -> Decoding:
    """The same decoding with other settings, as a person writes them.

    Args:
        decoding: what holds where nothing else is said. With beams and no temperature said, that is 0.
        texts: ``name=value`` each; ``stop`` may come several times, in double quotes with JSON's escapes.

    Raises:
        InputError: a text is none, names no setting, or has a value that this one can't have.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in _KINDS:
            raise InputError(f"--decode {text!r}: give NAME=VALUE, with one of the names {', '.join(_KINDS)}")
        read = _value(text, name, value)
        found[name] = (*found.get(name, ()), read) if name == "stop" else read
    if found.get("beams", 1) > 1:
        found.setdefault("temperature", 0.0)
    return replace(decoding, **found)


def _value(text: str, name: str, value: str) -> Any:
    kind = _KINDS[name]
    try:
        if kind is str:
            return str(json.loads(value)) if value.startswith('"') else value
        return kind(value)
    except ValueError:
        wanted = {int: "a whole number", float: "a number", str: "a text, or one in double quotes with JSON's escapes"}
        raise InputError(f"--decode {text!r}: give {wanted[kind]}") from None


_KINDS: dict[str, type] = {one.name: str if one.name == "stop" else type(one.default) for one in fields(Decoding)}
