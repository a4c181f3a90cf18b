"""What ``siloweave tune`` searches: distributions over settings, and the trials drawn from them.

Trial i is a pure function of the seed, the parameters and i: more trials extend a search, and a killed one goes on with
the same trials.
"""

import math
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from configs.errors import InputError
from configs.parse import parse, to_toml
from configs.run_directory import flatten
from configs.schema.places import here, rooted
from configs.schema.schema import RunConfig

_FORM = re.compile(r"^\s*(?P<path>[\w.]+)\s*=\s*(?P<kind>\w+)\s*\((?P<arguments>.*)\)\s*$", re.DOTALL)
_KINDS = ("uniform", "loguniform", "randint", "lograndint", "choice")
_EXAMPLE = "pretrain.learning_rate=loguniform(1e-4,1e-2)"
_DRAWS = 1000
_FEDERATED = {
    *(
        f"federated.{name}"
        for name in ("rounds", "local_steps", "learning_rate", "optimizer", "proximal_mu", "lora_rank", "lora_alpha")
    ),
    *(f"federated.{name}" for name in ("aggregation", "adapters", "server_learning_rate", "server_momentum")),
    *(f"federated.{name}" for name in ("server_second_moment_decay", "server_tau")),
    *(f"privacy.{name}" for name in ("epsilon", "delta", "sampling_rate", "sampler", "max_batch_size")),
    *(f"privacy.{name}" for name in ("max_grad_norm", "clipping_function", "target_quantile")),
}
_FIXED = ("run.name", "run.storage", "run.encryption_key_file", "cluster.address", "cluster.device")


@dataclass(frozen=True)
class Parameter:
    """One setting and the values it may take.

    Attributes:
        path: full name of the setting, for instance ``pretrain.learning_rate``.
        kind: ``uniform``, ``loguniform`` (real numbers), ``randint``, ``lograndint`` (whole ones, both ends included),
            or ``choice``.
        arguments: lower and upper end, or the values.
    """

    path: str
    kind: str
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.path}={self.kind}({','.join(_toml(value) for value in self.arguments)})"

    def draw(self, generator: np.random.Generator) -> Any:
        """One value."""
        if self.kind == "choice":
            return self.arguments[int(generator.integers(len(self.arguments)))]
        low, high = self.arguments
        if self.kind == "uniform":
            return float(generator.uniform(low, high))
        if self.kind == "loguniform":
            return min(max(math.exp(generator.uniform(math.log(low), math.log(high))), low), high)
        if self.kind == "randint":
            return int(generator.integers(low, high, endpoint=True))
        # Every whole number has the weight of its cell, so that the ends are as likely as their neighbours.
        value = math.exp(generator.uniform(math.log(low - 0.5), math.log(high + 0.5)))
        return min(max(round(value), low), high)


def parse_parameters(texts: Sequence[str]) -> tuple[Parameter, ...]:
    """Reads ``group.field=distribution(...)`` texts.

    Raises:
        InputError: a text is malformed, names a setting twice, or one that can't be searched.
    """
    if not texts:
        raise InputError(f"--param is missing: say what to search, for instance --param '{_EXAMPLE}'")
    parameters = tuple(_parameter(text) for text in texts)
    paths = [parameter.path for parameter in parameters]
    for path in paths:
        if paths.count(path) > 1:
            raise InputError(f"--param {path}: given {paths.count(path)} times; give it once")
    return parameters


def _parameter(text: str) -> Parameter:
    found = _FORM.match(text)
    if not found or found["kind"] not in _KINDS:
        raise InputError(
            f"--param {text!r}: write it as group.field=DISTRIBUTION, for instance {_EXAMPLE}; DISTRIBUTION is one of "
            "uniform(LOW,HIGH), loguniform(LOW,HIGH), randint(LOW,HIGH), lograndint(LOW,HIGH), choice(A,B,...)"
        )
    _check_path(found["path"])
    arguments = _values(found["arguments"], text)
    if found["kind"] != "choice":
        _check_range(found["kind"], arguments, text)
    elif not arguments:
        raise InputError(f"--param {text!r}: give choice at least one value")
    return Parameter(found["path"], found["kind"], arguments)


def _check_path(path: str) -> None:
    group = path.split(".", maxsplit=1)[0]
    if path.startswith("data.private"):
        raise InputError(f"--param {path}: the private data are not a setting to search; search another one")
    speed = group in ("federated", "privacy") and path not in _FEDERATED
    if path in _FIXED or group in ("monitoring", "evaluate", "tune") or speed:
        raise InputError(f"--param {path}: it changes nothing about what is learned; search another setting")


def is_federated(parameters: Sequence[Parameter]) -> bool:
    """Whether a search is one over federations; else it is one over pretraining.

    Raises:
        InputError: it would be both.
    """
    federated = [parameter.path for parameter in parameters if parameter.path in _FEDERATED]
    others = [parameter.path for parameter in parameters if parameter.path not in _FEDERATED]
    if federated and others:
        raise InputError(
            f"--param {others[0]} and {federated[0]}: federations are searched on one base model; search pretraining "
            "first, then the federation"
        )
    return bool(federated)


def _values(text: str, whole: str) -> tuple[Any, ...]:
    try:
        return tuple(tomllib.loads(f"values = [{text}]")["values"])
    except tomllib.TOMLDecodeError:
        words = [word.strip() for word in text.split(",")]
    values = [_value(word) for word in words]
    if not all(words) or any(isinstance(value, dict | list) for value in values):
        raise InputError(f"--param {whole!r}: can't read the values ({text}); separate them with commas, quote texts")
    return tuple(values)


def _value(word: str) -> Any:
    try:
        return tomllib.loads(f"value = {word}")["value"]
    except tomllib.TOMLDecodeError:
        return word


def _check_range(kind: str, arguments: tuple[Any, ...], text: str) -> None:
    numbers = [value for value in arguments if isinstance(value, int | float) and not isinstance(value, bool)]
    whole = kind in ("randint", "lograndint")
    if len(numbers) != 2 or len(arguments) != 2 or not all(math.isfinite(value) for value in numbers):
        raise InputError(f"--param {text!r}: {kind} takes two numbers, the lower and the upper end")
    low, high = numbers
    if whole and not all(isinstance(value, int) for value in numbers):
        real = kind.replace("randint", "uniform")
        raise InputError(f"--param {text!r}: {kind} takes whole numbers; for others there is {real}")
    if low >= high or (kind.startswith("log") and low <= 0):
        above = " above 0" if kind.startswith("log") else ""
        raise InputError(f"--param {text!r}: give {kind} a lower end{above} and a larger upper end")


@dataclass(frozen=True)
class Trial:
    """One point of the search.

    Attributes:
        number: 0, 1, ...
        values: value of each searched setting, by its full name.
        config: the settings to train with, in a run directory of the trial's own.
    """

    number: int
    values: dict[str, Any]
    config: RunConfig

    @property
    def name(self) -> str:
        """Name of the trial's run directory."""
        return self.config.run.name


def draw_trials(base: RunConfig, parameters: Sequence[Parameter], count: int, storage: str) -> list[Trial]:
    """The first ``count`` trials of a search; no two are equal.

    Args:
        base: settings of everything that is not searched; its seed is the search's.
        parameters: what is searched.
        count: number of trials.
        storage: folder of the trials' run directories.

    Raises:
        InputError: there is no such setting, the schema refuses a trial's values, or there are fewer different trials.
    """
    known = dict(flatten(base))
    for parameter in parameters:
        if parameter.path not in known:
            raise InputError(f"--param {parameter.path}: no such setting; check its spelling")
    generator = np.random.default_rng([base.run.seed, len(parameters)])
    trials: list[Trial] = []
    for _ in range(count + _DRAWS):
        if len(trials) == count:
            return trials
        values = {parameter.path: parameter.draw(generator) for parameter in parameters}
        if all(values != trial.values for trial in trials):
            trials.append(Trial(len(trials), values, _settings(base, values, storage, f"trial-{len(trials):04d}")))
    if len(trials) == count:
        return trials
    raise InputError(f"--trials {count}: these parameters have {len(trials)} different values; lower --trials")


def with_values(base: RunConfig, values: dict[str, Any], origin: str) -> RunConfig:
    """The settings with some of them replaced.

    Raises:
        InputError: the schema refuses them; the message names the field and the value.
    """
    tree = tomllib.loads(to_toml(base))
    for path, value in values.items():
        *groups, field = path.split(".")
        inner = tree
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[field] = value
    return parse(RunConfig, rooted(RunConfig, tree, here(), origin), origin)


def _settings(base: RunConfig, values: dict[str, Any], storage: str, name: str) -> RunConfig:
    shown = ", ".join(f"{path}={_toml(value)}" for path, value in values.items())
    return with_values(base, {**values, "run.storage": storage, "run.name": name}, f"{name} ({shown})")


def _toml(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else f"{value!r}"
