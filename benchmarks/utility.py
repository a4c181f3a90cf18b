"""What noise costs a federation of small silos: added by each silo, shared by all, or on data in one place.

A simulation in one process: logistic regression on scikit-learn's handwritten digits, dealt out to silos at random, by
DP-SGD whose every step is a sum over all silos' Poisson samples. All ways have the same epsilon, delta, samples and
steps. Shared noise is encoded, added modulo 2^32 and decoded, without masks. Each way is run with every learning rate,
and has the best one, by its median on the held-out records: no private run could choose so, but all ways gain by it.

python benchmarks/utility.py --json utility.json
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from figures import setting, spread

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout's own packages, as the tests take them

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from privacy.accounting.accountant import calibrate
from privacy.accounting.schedule import Schedule
from privacy.distributed.distributed import DistributedNoise
from privacy.distributed.guarantee import calibrated
from privacy.mechanism.noise import noised_sums
from privacy.mechanism.streams import Streams

SILOS, MIN_HONEST, COLLUDERS = 10, 7, 2
RATE, STEPS, DELTA, CLIP = 0.1, 150, 1e-5, 1.0
EPSILONS = (1.0, 4.0)
LEARNING_RATES = (0.5, 1.0, 2.0)
CLASSES, TRAINED = 10, 1437
REACH = CLIP * 64  # a silo's sample has 14 records on average

Array = NDArray[np.float64]
Release = Callable[[list[Array], int, Streams], Array]


@dataclass(frozen=True)
class Data:
    """Records as rows, the last column for the bias, with their labels: of each silo, and held out."""

    silos: Sequence[tuple[Array, NDArray[np.int64]]]
    held_out: tuple[Array, NDArray[np.int64]]

    @classmethod
    def dealt(cls, seed: int) -> "Data":
        pixels, labels = load_digits(return_X_y=True)
        rows = np.hstack([pixels / 16, np.ones((len(pixels), 1))])
        order = np.random.default_rng(seed).permutation(len(rows))
        parts = np.array_split(order[:TRAINED], SILOS)
        held_out = order[TRAINED:]
        return cls([(rows[part], labels[part]) for part in parts], (rows[held_out], labels[held_out]))


def clipped_sum(weights: Array, rows: Array, labels: NDArray[np.int64]) -> Array:
    """The sum of the records' gradients, each clipped, as one vector."""
    scores = rows @ weights.reshape(-1, CLASSES)
    errors = np.exp(scores - scores.max(axis=1, keepdims=True))
    errors /= errors.sum(axis=1, keepdims=True)
    errors[np.arange(len(labels)), labels] -= 1
    norms = np.linalg.norm(rows, axis=1) * np.linalg.norm(errors, axis=1)
    errors *= np.minimum(1, CLIP / np.maximum(norms, 1e-12))[:, None]
    return (rows.T @ errors).ravel()


def accuracy(data: Data, silos: int, release: Release, learning_rate: float, seed: int) -> float:
    """Of a model that the first so many silos have trained."""
    streams, sampler = Streams(seed.to_bytes(32, "little"), "00" * 32), np.random.default_rng(seed)
    weights = np.zeros(data.held_out[0].shape[1] * CLASSES)
    records = sum(len(labels) for _, labels in data.silos[:silos])
    for step in range(STEPS):
        sums = []
        for rows, labels in data.silos[:silos]:
            chosen = sampler.random(len(labels)) < RATE
            sums.append(clipped_sum(weights, rows[chosen], labels[chosen]))
        weights -= learning_rate * release(sums, step, streams) / (RATE * records)
    rows, labels = data.held_out
    return float(((rows @ weights.reshape(-1, CLASSES)).argmax(axis=1) == labels).mean())


def by_each(sigma: float) -> Release:
    """Each silo adds all of its noise; one silo's sum, or the sum of all data in one place, has it once."""

    def release(sums: list[Array], step: int, streams: Streams) -> Array:
        noised = (noised_sums(own, sigma * CLIP, streams, f"{silo}/{step}") for silo, own in enumerate(sums))
        return np.sum(list(noised), axis=0)

    return release


def in_one_place(sigma: float) -> Release:
    """The sum over all silos' samples, which is the sum over a sample of all records, has the noise once."""
    once = by_each(sigma)
    return lambda sums, step, streams: once([np.sum(sums, axis=0)], step, streams)


def shared(noise: DistributedNoise) -> Release:
    """Each silo adds its share; all of them survive."""

    def release(sums: list[Array], step: int, streams: Streams) -> Array:
        words = [noise.encode(own, streams.generator("share", step, f"{silo}")) for silo, own in enumerate(sums)]
        noise.require(len(words))
        return noise.decode(np.sum(words, axis=0, dtype=words[0].dtype))

    return release


def ways(epsilon: float, values: int) -> dict[str, tuple[int, float, Release]]:
    """How many silos, the noise multiplier and the sum of a step, of each way."""
    central = calibrate(epsilon, DELTA, Schedule(STEPS, RATE, 1.0))
    unset = DistributedNoise(1.0, CLIP, REACH, SILOS, MIN_HONEST, COLLUDERS, values)
    noise = calibrated(unset, epsilon, steps=STEPS, delta=DELTA, sampling_rate=RATE)
    return {
        "alone": (1, central, by_each(central)),
        "record": (SILOS, central, by_each(central)),
        "distributed": (SILOS, noise.noise_multiplier, shared(noise)),
        "pooled": (SILOS, central, in_one_place(central)),
    }


def best(dealt: Sequence[Data], silos: int, release: Release) -> dict[str, float]:
    """Accuracy over the seeds, with the learning rate whose median is the best."""
    found = [
        {
            **spread([accuracy(data, silos, release, rate, seed) for seed, data in enumerate(dealt)]),
            "learning_rate": rate,
        }
        for rate in LEARNING_RATES
    ]
    return max(found, key=lambda figure: figure["median"])


def measure(seeds: int, epsilons: Sequence[float]) -> list[dict[str, Any]]:
    dealt = [Data.dealt(seed) for seed in range(seeds)]
    values = dealt[0].held_out[0].shape[1] * CLASSES
    rows: list[dict[str, Any]] = [
        {"way": "no noise", "accuracy": best(dealt, SILOS, lambda sums, *_: np.sum(sums, axis=0))}
    ]
    for epsilon in epsilons:
        for way, (silos, sigma, release) in ways(epsilon, values).items():
            figure = best(dealt, silos, release)
            rows.append({"way": way, "epsilon": epsilon, "noise_multiplier": sigma, "accuracy": figure})
            print(f"{way}, epsilon {epsilon:g}: {figure['median']:.3f}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epsilon", type=float, nargs="+", default=EPSILONS)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    document = {
        **setting(("numpy", "scikit-learn", "randomgen", "dp-accounting")),
        "seeds": arguments.seeds,
        "silos": {"all": SILOS, "min_honest": MIN_HONEST, "colluders": COLLUDERS},
        "schedule": {"sampling_rate": RATE, "steps": STEPS, "delta": DELTA, "clip": CLIP},
        "figures": measure(arguments.seeds, arguments.epsilon),
    }
    arguments.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
