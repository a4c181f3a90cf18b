"""Siloweave, through its public names, or by the tests that pin a trap where it takes whole silos."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from pydantic import ValidationError

from configs.errors import InputError, PolicyRefusal
from privacy.mechanism.streams import Streams
from traps import engine, hostile, masks
from traps.cell import Cell, Check, absent, first_line, judged
from traps.layers import (
    LAYERS,
    RIGHT,
    Tokens,
    largest_record,
    median_norm,
    per_record_loop,
    records,
    relative_error,
)
from traps.randomness import correlation, is_poisson, sampling_figures, unrelated

REPOSITORY = Path(__file__).parents[2]


def clipped_sum(name: str) -> Cell:
    """A layer's clipped sum beside the oracle."""
    model, x_B = LAYERS[name].model(), records()
    norm = median_norm(model, x_B)
    expected = per_record_loop(model, x_B, norm)
    try:
        error = relative_error(engine.clipped_sum(model, x_B, norm), expected)
    except InputError as refused:
        return Cell("refuses", first_line(refused))
    return judged(error < RIGHT, f"{error:.0e}" if error < RIGHT else f"off by {error:.2g}")


def largest() -> Cell:
    model, x_B = LAYERS["linear"].model(), records()
    norm = median_norm(model, x_B) / 2
    found = largest_record(lambda one: engine.clipped_sum(model, one, norm), x_B) / norm
    return judged(found <= 1 + RIGHT, f"{found:.3f} C")


def micro_batches() -> Cell:
    model, x_B = LAYERS["linear"].model(), records()
    norm = median_norm(model, x_B)
    expected = per_record_loop(model, x_B, norm)
    worst = max(relative_error(engine.clipped_sum(model, x_B, norm, size), expected) for size in (32, 8, 1))
    return judged(worst < RIGHT, f"{worst:.0e}")


def hostile_adapters() -> Cell:
    found = hostile.siloweave()
    worst = ", ".join(f"{one.adapter} {one.moved:.4f} C, of others {one.beside_its_own:g} C" for one in found)
    return judged(all(one.holds for one in found), worst)


def _linear() -> Tokens:
    model = LAYERS["linear"].model()
    if not isinstance(model, Tokens):
        raise TypeError("the linear layer stands behind an embedding")
    return model


def non_finite() -> Cell:
    """One record's token has an infinite embedding, the others never use it."""
    model = _linear()
    model.embedding.requires_grad_(False)
    model.embedding.weight.data[9] = torch.inf
    x_B = records() % 9
    a_plan = engine.plan(len(x_B), max_grad_norm=median_norm(model, x_B))
    expected = per_record_loop(model, x_B[1:], a_plan.terms.max_grad_norm)
    x_B[0, 3] = 9
    found, _ = engine.train(model, list(x_B), a_plan, synthetic=records(16, seed=99) % 9)
    error = relative_error(found, expected)
    return judged(error < RIGHT, f"the sum is that without the record, to {error:.0e}")


def noise() -> Cell:
    once, twice = engine.noise_alone(1), engine.noise_alone(2)
    first, other = once.values()
    second = next(iter(twice.values())) - first
    ratio = torch.cat([first.flatten(), other.flatten()]).std().item()
    independent = unrelated(first, second) and unrelated(first, other)
    return judged(
        abs(ratio - 1) < 0.01 and independent,
        f"{ratio:.4f} of sigma C over {2 * first.numel():,} values; correlation of two steps "
        f"{correlation(first, second):.4f}, of two parameters {correlation(first, other):.4f}",
    )


def world_sizes() -> Cell:
    """A charge is never split over ranks; what can differ is the number of threads."""
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(engine.noise_alone())
    finally:
        torch.set_num_threads(before)
    same = all(torch.equal(one[name], found[0][name]) for one in found for name in one)
    ratio = next(iter(found[0].values())).std().item()
    evidence = f"a charge is never split over ranks; 1, 2 and 4 threads: the same bits: {same}, {ratio:.4f} of sigma C"
    return judged(same and abs(ratio - 1) < 0.01, evidence)


def empty_batch() -> Cell:
    model = LAYERS["linear"].model()
    a_plan = _short_batches(20)
    _, batches = engine.train(model, list(records(3)), a_plan)
    empty = next(step for step, batch in enumerate(batches) if not batch)
    lost = [
        engine.train(model, list(records(3)), _short_batches(steps))[0]["head.weight"] for steps in (empty, empty + 1)
    ]
    moved, counted = bool((lost[0] != lost[1]).any()), a_plan.terms.steps == len(batches)
    return judged(moved and counted, f"noise added: {moved}, every step of the plan is charged: {counted}")


def _short_batches(steps: int) -> engine.PrivacyPlan:
    return engine.plan(3, sampling_rate=0.2, steps_per_round=steps, noise_multiplier=0.8)


def sampling(steps: int = 2000) -> Cell:
    figures = sampling_figures(engine.batches(100, 0.05, steps), 0.05)
    return judged(
        is_poisson(figures, steps),
        f"{steps} steps: share {figures['rate']:.1f} and largest pair {figures['pairs']:.1f} standard errors off, "
        f"variance of the size {figures['size']:.2f} of the binomial's",
    )


def shuffling() -> Cell:
    try:
        engine.PlanTerms.model_validate({**engine.plan(100).terms.model_dump(), "sampler": "shuffle"})
    except ValidationError as error:
        return Cell("refuses", f"a plan with sampler 'shuffle': {error.errors()[0]['msg']}")
    return Cell("fails", "a plan takes a shuffling sampler")


def put_back(files: Callable[[Path, Path], None]) -> Cell:
    """Spends once, keeps a copy, spends again, puts the copy back, and opens."""
    from privacy.ledger.chain import Budget
    from privacy.ledger.ledger import Ledger

    a_plan = engine.plan(5000, sampling_rate=0.02, noise_multiplier=0.5, rounds=3, steps_per_round=4)
    with tempfile.TemporaryDirectory() as folder:
        state, copy = Path(folder) / "state", Path(folder) / "copy"

        def opened() -> Ledger:
            return Ledger.open(state, "north", "hospital", Budget(20.0, 3e-5))

        ledger = opened()
        ledger.reserve("run-1", a_plan)
        files(state, copy)
        ledger.reserve("run-2", a_plan)
        spent = 20 - ledger.left().epsilon
        ledger.close_file()
        for path in state.glob("ledger.sqlite*"):
            path.unlink()
        for path in copy.glob("ledger.sqlite*"):
            shutil.copy(path, state)
        try:
            shown = 20 - opened().left().epsilon
        except (InputError, PolicyRefusal) as refused:
            return Cell("refuses", first_line(refused).replace(folder, ""))
    return judged(shown >= spent, f"an older file opens: spent {spent:.2f}, shown {shown:.2f}")


def _whole(state: Path, copy: Path) -> None:
    shutil.copytree(state, copy)


def _without_wal(state: Path, copy: Path) -> None:
    """As a copy of the one file that looks like the ledger does: what is in the -wal stays behind."""
    copy.mkdir()
    shutil.copy(state / "ledger.sqlite", copy)


def dropout() -> Cell:
    """Three silos' noise, folded as the coordinator does, with one of them missing and without."""
    from federated.aggregation.exact_sum import FixedPointSum

    silos = [
        {name: value.numpy() for name, value in engine.noise_alone(seed=bytes([number] * 32)).items()}
        for number in range(3)
    ]
    found = {}
    for count in (3, 2, 1):
        total = FixedPointSum(silos[0])
        for silo in silos[:count]:
            total.add(silo)
        values = np.concatenate([array.ravel() for array in total.mean().values()]) * count
        found[count] = values.std().item()
    evidence = ", ".join(f"{count} of 3 answer: {value:.3f}" for count, value in found.items())
    return judged(min(found.values()) > 0.99, f"noise on the sum in units of what each silo charged: {evidence}")


def weights() -> Cell:
    from federated.aggregation.exact_sum import FixedPointSum

    updates = [{"w": np.full(4, value, np.float32)} for value in (0.0, 0.0, 0.0, 1.0)]
    total = FixedPointSum(updates[0])
    for update in updates:
        total.add(update)
    share = float(total.mean()["w"][0])
    return judged(share == 0.25, f"one of 4 silos moves the mean by {share:g} of its update, whatever data it has")


def generator() -> Cell:
    """The stream's raw words beside AES-128 in counter mode of another library, under a key derived there too."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    stream = Streams(engine.SEED, engine.DIGEST).generator("noise", 3, "w")
    info = b"siloweave/1/noise/3/w"
    key = HKDF(SHA256(), 16, salt=bytes.fromhex(engine.DIGEST), info=info).derive(engine.SEED)
    counters = b"".join(counter.to_bytes(16, "little") for counter in range(500))
    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # of counters: counter mode
    expected = np.frombuffer(block.update(counters), "<u8")
    same = bool(np.array_equal(stream.bit_generator.random_raw(1000), expected))
    return judged(same, f"1,000 words are HKDF-SHA256 and AES-128 in counter mode of another library: {same}")


def zero_update() -> Cell:
    """Private records hold a token whose y, and with it every gradient, is zero; the made-up ones do not."""
    model = _linear()
    model.embedding.requires_grad_(False)
    model.embedding.weight.data[0] = 0
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.zero_()
    zeros = torch.zeros_like(records())
    moved = engine.clipped_sum(model, zeros, 0.5).values()
    norm = torch.cat([value.flatten() for value in moved]).norm().item()
    return judged(norm < RIGHT, f"zero gradients add {norm:.0e}")


def client_sampling() -> Cell:
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    values = {"sampling_rate": 0.03, "noise_multiplier": 0.59, "rounds": 3, "steps_per_round": 12, "delta": 1e-5}
    request = engine.plan(5000, **values).terms
    try:
        engine.PlanTerms.model_validate({**request.model_dump(), "participation": 0.5})
    except ValidationError:
        taken = False
    else:
        taken = True
    event = dp_accounting.PoissonSampledDpEvent(0.03, dp_accounting.GaussianDpEvent(0.59))
    oracle = PLDAccountant().compose(event, 36).get_epsilon(1e-5)
    halved = dp_accounting.PoissonSampledDpEvent(0.015, dp_accounting.GaussianDpEvent(0.59))
    wrong = PLDAccountant().compose(halved, 36).get_epsilon(1e-5)
    evidence = (
        f"each silo is charged {request.epsilon:.2f} whoever is asked; half the silos at random would claim {wrong:.2f}"
    )
    return judged(not taken and request.epsilon >= oracle * (1 - 1e-9), evidence)


LEDGER, SILO = "tests/unit/privacy/ledger/test_ledger.py", "tests/unit/federated/silo/test_silo.py"
FEDERATED = "tests/unit/federated/silo/test_conformance.py"
TESTS = {
    "resume": (
        "tests/integration/test_federation.py::test_one_or_two_workers_and_a_restart_give_the_same_bytes",
        "tests/unit/privacy/mechanism/test_dp_sgd.py::test_the_same_seed_gives_the_same_bits_and_another_seed_does_not",
    ),
    "other_adapter": (f"{SILO}::test_two_requests_of_one_round_with_other_adapters_never_share_noise",),
    "killed": (f"{LEDGER}::test_kill_9_between_charge_and_release",),
    "two_processes": (f"{LEDGER}::test_two_processes_at_once_spend_once",),
    "edited": (f"{LEDGER}::test_an_edited_row_is_noticed",),
    "number_of_records": (
        f"{FEDERATED}::test_the_number_of_records_changes_nothing_but_the_noised_update",
        "tests/unit/privacy/mechanism/test_dp_sgd.py::test_the_normaliser_is_the_declared_count_not_the_data",
    ),
    "refusals": (
        f"{SILO}::test_refusals_are_alike_on_neighbouring_datasets",
        f"{SILO}::test_a_failure_leaves_as_one_constant_code",
    ),
    "personal_state": (f"{FEDERATED}::test_what_other_data_left_in_the_warm_model_never_reaches_a_release",),
}


@cache
def outcomes() -> dict[str, tuple[int, int]]:
    """Runs all the tests that cells name, in one session: (passed, run) by test."""
    names = sorted({name for group in TESTS.values() for name in group})
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *names],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
        )
        cases = list(ElementTree.parse(report).iter("testcase"))
    found = {}
    for name in names:
        module, function = name.split(".py::")
        mine = [case for case in cases if case.get("classname") == module.replace("/", ".")]
        mine = [case for case in mine if (case.get("name") or "").split("[")[0] == function]
        broken = [error.get("message") for case in mine for error in case.iter("error")]
        if broken or not mine:  # it says nothing about the trap
            raise RuntimeError(f"{name} could not be run: {broken}")
        found[name] = (sum(len(case) == 0 for case in mine), len(mine))
    return found


def by_tests(names: tuple[str, ...]) -> Cell:
    results = {name: outcomes()[name] for name in names}
    evidence = ", ".join(f"{passed} of {count} {name}" for name, (passed, count) in results.items())
    return judged(all(passed == count > 0 for passed, count in results.values()), evidence)


CELLS: dict[str, Check] = {
    **{f"sum_{name}": lambda name=name: clipped_sum(name) for name in LAYERS},
    "largest": largest,
    "micro_batches": micro_batches,
    "hostile_adapters": hostile_adapters,
    "non_finite": non_finite,
    "noise": noise,
    "world_sizes": world_sizes,
    "uneven_ranks": absent("a charge is never split over ranks; silos do not wait for each other inside a step"),
    "empty_batch": empty_batch,
    "sampling": sampling,
    "shuffling": shuffling,
    "restored": lambda: put_back(_whole),
    "without_wal": lambda: put_back(_without_wal),
    "dropout": dropout,
    "weights": weights,
    "generator": generator,
    "mask_keys": masks.siloweave,
    "zero_update": zero_update,
    "client_sampling": client_sampling,
    **{trap: lambda names=names: by_tests(names) for trap, names in TESTS.items()},
}
