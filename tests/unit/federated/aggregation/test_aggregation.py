"""Every aggregation against a plain computation, and Flower's strategies where there is one."""

import itertools
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvgM, FedYogi
from flwr.serverapp.strategy.fedtrimmedavg import trim_mean
from flwr.serverapp.strategy.multikrum import compute_distances
from pydantic import ValidationError

from configs.errors import InputError
from configs.schema.base import LARGEST_ADAPTER_VALUE
from configs.schema.federated import FederatedSettings
from federated.adapters.arrays import check_update, from_bytes, to_bytes
from federated.aggregation.aggregation import RoundAggregation, check_size

LAYER = "layer.lora_{}.default.weight"
A, B = LAYER.format("A"), LAYER.format("B")
RANK, SILOS, ROUNDS = 3, ("east", "north", "south", "west"), 4


def random(seed, scale=0.1, rank=RANK):
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(scale=scale, size=shape).astype(np.float32) for name, shape in ((A, (rank, 7)), (B, (9, rank)))
    }


def settings(aggregation="fedavg", **changes):
    return FederatedSettings(aggregation=aggregation, lora_rank=RANK, lora_alpha=6.0, **changes)


def run_rounds(chosen, updates, adapter=None, silos=SILOS):
    """The adapter and the state after each round; both pass through bytes, as they do when a run is continued."""
    adapter, state, history = adapter or random(99), {}, []
    for by_silo in updates:
        aggregation = RoundAggregation(chosen, adapter, state, len(silos))
        for silo, update in by_silo.items():
            aggregation.add(silo, update)
        adapter, state = aggregation.result()
        adapter, state = from_bytes(to_bytes(adapter)), from_bytes(to_bytes(state)) if state else {}
        history.append((adapter, state))
    return history


UPDATES = [{silo: random(10 * number + i) for i, silo in enumerate(SILOS)} for number in range(ROUNDS)]
MEANS = [{name: np.mean([one[name] for one in by_silo.values()], axis=0) for name in (A, B)} for by_silo in UPDATES]


def plain(name, step, **moments):
    """A server optimizer over one array, in float64."""
    weight = random(99)[name].astype(np.float64)
    for mean in MEANS:
        weight = weight + step(mean[name].astype(np.float64), moments)
    return weight


def reddi(kind, rate=0.05, beta1=0.8, beta2=0.9, tau=1e-2):
    """Algorithm 2 of Reddi et al. 2021, term by term."""

    def step(delta, moments):
        moments["m"] = beta1 * moments.get("m", 0) + (1 - beta1) * delta
        v = moments.get("v", tau**2)
        moments["v"] = {
            "fedadagrad": v + delta**2,
            "fedyogi": v - (1 - beta2) * delta**2 * np.sign(v - delta**2),
            "fedadam": beta2 * v + (1 - beta2) * delta**2,
        }[kind]
        return rate * moments["m"] / (np.sqrt(moments["v"]) + tau)

    return step


def with_momentum(delta, moments):
    moments["m"] = 0.7 * moments.get("m", 0) + delta
    return 0.5 * moments["m"]


CHOSEN = {"server_learning_rate": 0.05, "server_tau": 1e-2}
BETAS = {"server_momentum": 0.8, "server_second_moment_decay": 0.9}
OPTIMIZERS = {
    "fedavg": ({"server_learning_rate": 0.5}, lambda delta, _: 0.5 * delta),
    "fedavgm": ({"server_learning_rate": 0.5, "server_momentum": 0.7}, with_momentum),
    "fedadam": ({**CHOSEN, **BETAS}, reddi("fedadam")),
    "fedyogi": ({**CHOSEN, **BETAS}, reddi("fedyogi")),
    "fedadagrad": (CHOSEN, reddi("fedadagrad", beta1=0.0)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_server_optimizers_are_those_of_the_paper(name):
    changes, step = OPTIMIZERS[name]
    final, _ = run_rounds(settings(name, **changes), UPDATES)[-1]
    for array in (A, B):
        np.testing.assert_allclose(final[array], plain(array, step), rtol=1e-4, atol=1e-6)


def flowers(strategy, before_round=lambda *_: None):
    """Weights after the rounds by one of Flower's strategies, which gets every silo's weights after its update."""
    weights = record_of(random(99))
    for number, by_silo in enumerate(UPDATES, start=1):
        strategy.configure_train(number, weights, ConfigRecord(), None)  # asks nobody: the replies are made here
        before_round(strategy, number)
        replies = [
            SimpleNamespace(has_error=lambda: False, content=reply_of(weights, update)) for update in by_silo.values()
        ]
        weights, _ = strategy.aggregate_train(number, replies)
    return {name: array.numpy() for name, array in weights.items()}


def record_of(arrays):
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})


def reply_of(weights, update):
    arrays = record_of({name: array.numpy() + update[name] for name, array in weights.items()})
    return RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})


def starts_at_tau_squared(strategy, number):
    """Flower starts the second moment at 0."""
    if number == 1:
        strategy.v_t = {name: np.full_like(array, 1e-4) for name, array in random(99).items()}


def without_bias_correction(strategy, number):
    """Flower's FedAdam corrects the moments' bias, which Algorithm 2 doesn't, with the exponent of the next round."""
    starts_at_tau_squared(strategy, number)
    strategy.eta = 0.05 * (1 - 0.8 ** (number + 1)) / np.sqrt(1 - 0.9 ** (number + 1))


FLOWERS = {
    "fedavgm": (lambda: FedAvgM(fraction_train=0.0, server_learning_rate=0.5, server_momentum=0.7), lambda *_: None),
    "fedadam": (
        lambda: FedAdam(fraction_train=0.0, eta=0.05, beta_1=0.8, beta_2=0.9, tau=1e-2),
        without_bias_correction,
    ),
    "fedyogi": (lambda: FedYogi(fraction_train=0.0, eta=0.05, beta_1=0.8, beta_2=0.9, tau=1e-2), starts_at_tau_squared),
    "fedadagrad": (lambda: FedAdagrad(fraction_train=0.0, eta=0.05, tau=1e-2), starts_at_tau_squared),
}


@pytest.mark.parametrize("name", FLOWERS)
def test_server_optimizers_are_flowers_but_for_what_is_said(name):
    strategy, before_round = FLOWERS[name]
    final, _ = run_rounds(settings(name, **OPTIMIZERS[name][0]), UPDATES)[-1]
    for array, expected in flowers(strategy(), before_round).items():
        np.testing.assert_allclose(final[array], expected, rtol=1e-4, atol=1e-6)


STATEFUL = {"fedavgm": {}, "fedadam": {}, "fedyogi": {}, "fedadagrad": {}, "scaffold": {"optimizer": "sgd"}}


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("adapters", ["average", "ffa"])
def test_a_run_that_is_continued_gives_the_same_bytes(name, adapters):
    """Round by round through bytes, as a restart reads them, and in memory."""
    chosen = settings(name, adapters=adapters, **STATEFUL[name])
    updates = [{silo: trained(chosen, update) for silo, update in by_silo.items()} for by_silo in UPDATES]
    through_bytes, _ = run_rounds(chosen, updates)[-1]
    adapter, state = random(99), {}
    for by_silo in updates:
        aggregation = RoundAggregation(chosen, adapter, state, len(SILOS))
        for silo, update in by_silo.items():
            aggregation.add(silo, update)
        adapter, state = aggregation.result()
    assert state
    assert to_bytes(adapter) == to_bytes(through_bytes)


def trained(chosen, update):
    return {name: array for name, array in update.items() if chosen.adapters != "ffa" or name == B}


EVERY = {
    **STATEFUL,
    "fedavg": {},
    "median": {},
    "trimmed_mean": {"byzantine_silos": 1, "min_silos": 3},
    "krum": {"min_silos": 3},
}


@pytest.mark.parametrize(("name", "adapters"), [(n, "average") for n in EVERY] + [("fedadam", "product")])
def test_the_order_of_replies_changes_no_bit(name, adapters):
    chosen, results = settings(name, adapters=adapters, **EVERY[name]), set()
    for order in itertools.permutations(SILOS):
        adapter, state = run_rounds(chosen, [{silo: by_silo[silo] for silo in order} for by_silo in UPDATES[:2]])[-1]
        results.add((to_bytes(adapter), to_bytes(state)))
    assert len(results) == 1


def scaffold_by_hand(updates, path, count):
    """Karimireddy et al. 2020, algorithm 1 with option II and server step size 1, on one array."""
    x, c, c_of = random(99)[B].astype(np.float64), 0.0, dict.fromkeys(SILOS, 0.0)
    corrections = []
    for by_silo in updates:
        corrections.append({silo: c - c_of[silo] for silo in SILOS})
        deltas_y, deltas_c = [], []
        for silo, update in by_silo.items():
            c_plus = c_of[silo] - c - update[B].astype(np.float64) / path
            deltas_y.append(update[B])
            deltas_c.append(c_plus - c_of[silo])
            c_of[silo] = c_plus
        x = x + np.mean(deltas_y, axis=0)
        c = c + len(by_silo) / count * np.mean(deltas_c, axis=0)
    return x, corrections


def test_scaffold_is_the_papers_also_when_silos_are_missing():
    chosen = settings("scaffold", optimizer="sgd", learning_rate=0.02, local_steps=5)
    updates = [UPDATES[0], {silo: UPDATES[1][silo] for silo in ("east", "west")}, UPDATES[2], UPDATES[3]]
    expected, corrections = scaffold_by_hand(updates, 0.02 * 5, len(SILOS))
    adapter, state = random(99), {}
    for by_silo, expected_corrections in zip(updates, corrections, strict=True):
        aggregation = RoundAggregation(chosen, adapter, state, len(SILOS))
        for silo, correction in expected_corrections.items():
            found = aggregation.sent(silo).correction[B]
            np.testing.assert_allclose(found, np.broadcast_to(correction, found.shape), rtol=1e-4, atol=1e-5)
        for silo, update in by_silo.items():
            aggregation.add(silo, update)
        adapter, state = aggregation.result()
    np.testing.assert_allclose(adapter[B], expected, rtol=1e-4, atol=1e-6)


def test_no_update_makes_a_correction_that_the_other_silos_refuse():
    """Before: one finite update of 30,000 made corrections of 3,000,000, which every silo refused; no round went on."""
    chosen = settings("scaffold", optimizer="sgd", learning_rate=0.01, local_steps=1)
    adapter, state = random(99), {}
    for number in range(20):
        aggregation = RoundAggregation(chosen, adapter, state, len(SILOS))
        for silo in SILOS:
            check_update(aggregation.sent(silo).correction, adapter)
        for size in (30_000.0, 320.0, 150.0, 80.0):  # the first one that is accepted counts
            huge = {name: np.full_like(array, (-1) ** number * size) for name, array in adapter.items()}
            try:
                aggregation.add("east", huge)
                break
            except ValueError as error:
                assert "mean gradient" in str(error)
        for silo in SILOS[1:]:
            aggregation.add(silo, random(number))
        adapter, state = aggregation.result()


def test_the_common_variate_stays_the_mean_of_all_when_a_silo_joins():
    """And a round's requests are the same, whether or not the new silo is already there when it is asked again."""
    chosen = settings("scaffold", optimizer="sgd")
    adapter, state = run_rounds(chosen, UPDATES[:2], silos=SILOS)[-1]
    fewer, more = (RoundAggregation(chosen, adapter, state, count) for count in (4, 5))
    assert to_bytes(fewer.sent("east").correction) == to_bytes(more.sent("east").correction)
    for silo in (*SILOS[:2], "new"):
        more.add(silo, random(len(silo)))
    _, state = more.result()
    mean = sum(state[f"silo/{silo}/{B}"] for silo in (*SILOS, "new")) / 5
    np.testing.assert_allclose(state[f"common/{B}"], mean, rtol=1e-4, atol=1e-4)


def test_an_update_after_the_correction_keeps_the_variate_of_the_plain_gradient():
    """Steps on a constant gradient g with the correction give back c_i = g, and the common variate the mean of them."""
    chosen = settings("scaffold", optimizer="sgd", learning_rate=0.1, local_steps=3)
    adapter, state = random(99), {}
    gradients = {silo: random(i) for i, silo in enumerate(SILOS)}
    for _ in range(2):
        aggregation = RoundAggregation(chosen, adapter, state, len(SILOS))
        for silo, gradient in gradients.items():
            correction = aggregation.sent(silo).correction
            update = {name: (-0.1 * 3 * (gradient[name] + correction[name])).astype(np.float32) for name in gradient}
            aggregation.add(silo, update)
        adapter, state = aggregation.result()
    for silo, gradient in gradients.items():
        np.testing.assert_allclose(state[f"silo/{silo}/{A}"], gradient[A], rtol=1e-4, atol=1e-6)
    mean = np.mean([gradient[A] for gradient in gradients.values()], axis=0)
    np.testing.assert_allclose(state[f"common/{A}"], mean, rtol=1e-4, atol=1e-6)


def one_round(chosen, updates):
    before = random(99)
    after, _ = run_rounds(chosen, [updates], before, silos=tuple(updates))[0]
    return {name: after[name] - before[name] for name in after}


def liars_among(honest, liars):
    updates = {f"silo-{i}": random(i) for i in range(honest)}
    lies = {
        f"liar-{i}": {name: array * 0 + 1000.0 * (-1) ** i for name, array in random(0).items()} for i in range(liars)
    }
    return updates, {**updates, **lies}


def test_median_and_trimmed_mean_are_numpys_and_flowers():
    _, updates = liars_among(5, 2)
    for count in (6, 7):
        shown = dict(list(updates.items())[:count])
        found = one_round(settings("median"), shown)
        np.testing.assert_allclose(found[A], np.median([u[A] for u in shown.values()], axis=0), atol=1e-6)
    found = one_round(settings("trimmed_mean", byzantine_silos=2, min_silos=5), updates)
    np.testing.assert_allclose(found[A], trim_mean(np.stack([u[A] for u in updates.values()]), 2 / 7), atol=1e-6)


def test_krum_takes_the_update_that_flower_would():
    for seed in range(5):
        updates = {f"silo-{i}": random(100 * seed + i) for i in range(7)}
        found = one_round(settings("krum", byzantine_silos=2, min_silos=7), updates)
        distances = compute_distances([record_of(update) for update in updates.values()])
        scores = [np.sort(row)[1 : 7 - 2 - 2 + 1].sum() for row in distances]
        chosen = list(updates.values())[int(np.argmin(scores))]
        np.testing.assert_allclose(found[B], chosen[B], atol=1e-6)


@pytest.mark.parametrize(("name", "liars"), [("median", 2), ("trimmed_mean", 2), ("krum", 2)])
def test_silos_that_lie_move_a_robust_mean_little_and_a_mean_far(name, liars):
    changes = {} if name == "median" else {"byzantine_silos": liars, "min_silos": 7}
    _, updates = liars_among(5, liars)
    updates["liar-1"] = {name: array * 0 + 1000.0 for name, array in random(0).items()}
    assert np.abs(one_round(settings(name, **changes), updates)[A]).max() < 1
    assert np.abs(one_round(settings("fedavg"), updates)[A]).min() > 100


def test_a_robust_mean_holds_no_more_than_it_may():
    chosen = settings("median", max_silos=3)
    aggregation = RoundAggregation(chosen, random(99), {}, 4)
    for number in range(3):
        aggregation.add(f"silo-{number}", random(number))
    with pytest.raises(ValueError, match=r"more than federated\.max_silos"):
        aggregation.add("silo-3", random(3))
    check_size(chosen, 3)
    check_size(settings(), 4000)
    with pytest.raises(InputError, match=r"federated\.max_silos is 3: there are 4 silos"):
        check_size(chosen, 4)


@pytest.mark.parametrize("adapters", ["average", "product"])
def test_memory_does_not_grow_with_the_silos(adapters):
    def peak(silos):
        shape = {A: (RANK, 300), B: (300, RANK)}
        adapter = {name: np.ones(size, dtype=np.float32) for name, size in shape.items()}
        tracemalloc.start()
        aggregation = RoundAggregation(settings(adapters=adapters), adapter, {}, silos)
        for number in range(silos):
            update = {name: np.full(size, number * 1e-3, dtype=np.float32) for name, size in shape.items()}
            aggregation.add(f"silo-{number}", update)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(1)  # what is imported on the way is counted once
    assert peak(200) < 1.05 * peak(10)


def test_a_frozen_a_neither_travels_nor_changes():
    chosen, adapter = settings(adapters="ffa"), random(99)
    aggregation = RoundAggregation(chosen, adapter, {}, len(SILOS))
    sent = aggregation.sent("east").adapter
    assert set(sent) == {B}
    for silo, update in UPDATES[0].items():
        aggregation.add(silo, {B: update[B]})
    after, _ = aggregation.result()
    assert np.array_equal(after[A], adapter[A])
    np.testing.assert_allclose(after[B], adapter[B] + MEANS[0][B], atol=1e-6)
    # With A the same for all, the mean of B is exactly the mean of the products.
    whole = np.mean([(adapter[B] + update[B]) @ adapter[A] for update in UPDATES[0].values()], axis=0)
    np.testing.assert_allclose(after[B] @ after[A], whole, atol=1e-5)
    with pytest.raises(ValueError, match="names or shapes"):
        RoundAggregation(chosen, adapter, {}, 1).add("east", UPDATES[0]["east"])


LOW, HIGH = "layers.0.lora_{}.default.weight", "layers.1.lora_{}.default.weight"


def two_layers(seed):
    return {
        layer.format(factor): array
        for number, layer in enumerate((LOW, HIGH))
        for factor, array in zip("AB", random(seed + number).values(), strict=True)
    }


WAYS = set(itertools.product(("fedavg", "fedavgm", "fedadam", "scaffold"), ("average", "ffa", "product")))


@pytest.mark.parametrize(("name", "adapters"), sorted(WAYS - {("scaffold", "product")}))
def test_what_is_held_back_keeps_its_bits_and_its_state_while_the_rest_goes_on(name, adapters):
    chosen = settings(name, adapters=adapters, **({"optimizer": "sgd"} if name == "scaffold" else {}))
    travelling = {factor for factor in two_layers(0) if adapters != "ffa" or ".lora_A." not in factor}
    low = frozenset(factor for factor in travelling if "layers.0." in factor)
    adapter, state = two_layers(99), {}
    for number, held_back in enumerate((frozenset(), low, low, frozenset())):
        aggregation = RoundAggregation(chosen, adapter, state, 2, held_back=held_back)
        sent = aggregation.sent("east")
        assert (set(sent.frozen), set(sent.adapter)) == (set(held_back), travelling - held_back)
        assert all(np.array_equal(sent.frozen[factor], adapter[factor]) for factor in held_back)
        for seed, silo in enumerate(("east", "west")):
            aggregation.add(silo, {factor: two_layers(10 * number + seed)[factor] for factor in sent.adapter})
        after, kept = aggregation.result()
        for factor, before in adapter.items():
            assert np.array_equal(after[factor], before) == (factor not in sent.adapter), factor
        of_low = {key for key in state if "layers.0." in key}
        assert all(np.array_equal(kept[key], state[key]) for key in of_low) == bool(held_back or not of_low)
        assert set(kept) >= set(state)
        adapter, state = after, kept


def test_an_update_of_what_is_held_back_is_refused():
    adapter = two_layers(99)
    low = frozenset(factor for factor in adapter if "layers.0." in factor)
    aggregation = RoundAggregation(settings(), adapter, {}, 1, held_back=low)
    with pytest.raises(ValueError, match="names or shapes are not the adapter's"):
        aggregation.add("east", two_layers(1))


def test_products_are_averaged_exactly_and_factored_again():
    """Where the mean product has the rank, it comes back; averaging the factors would give something else."""
    before, same = random(99), random(98)
    updates = {"east": {A: same[A] * 0, B: random(1)[B]}, "west": {A: same[A] * 0, B: random(2)[B]}}
    after, _ = run_rounds(settings(adapters="product"), [updates], before, silos=("east", "west"))[0]
    whole = np.mean([(before[B] + update[B]) @ before[A] for update in updates.values()], axis=0)
    np.testing.assert_allclose(after[B] @ after[A], whole, atol=1e-5)

    updates = {"east": random(1), "west": random(2)}
    after, _ = run_rounds(settings(adapters="product"), [updates], before, silos=("east", "west"))[0]
    whole = np.mean([(before[B] + u[B]) @ (before[A] + u[A]) for u in updates.values()], axis=0)
    left, sizes, right = np.linalg.svd(whole)
    nearest = (left[:, :RANK] * sizes[:RANK]) @ right[:RANK]
    np.testing.assert_allclose(after[B] @ after[A], nearest, atol=1e-5)
    averaged, _ = run_rounds(settings(), [updates], before, silos=("east", "west"))[0]
    assert np.linalg.norm(averaged[B] @ averaged[A] - whole) > 1.2 * np.linalg.norm(nearest - whole)


def test_silos_of_different_ranks_train_the_same_product():
    chosen = settings(adapters="product", lora_ranks={"west": 1})
    adapter, _ = run_rounds(chosen, [{"east": random(5)}], silos=("east", "west"))[0]
    aggregation = RoundAggregation(chosen, adapter, {}, 2)
    small, large = aggregation.sent("west"), aggregation.sent("east")
    assert (small.rank, small.adapter[A].shape, small.adapter[B].shape) == (1, (1, 7), (9, 1))
    assert aggregation.sent("west ").rank == 1  # deployed when names were taken as they came
    assert small.alpha / small.rank == large.alpha / large.rank == 6.0 / RANK
    left, sizes, right = np.linalg.svd(adapter[B] @ adapter[A])
    np.testing.assert_allclose(small.adapter[B] @ small.adapter[A], (left[:, :1] * sizes[:1]) @ right[:1], atol=1e-5)
    update = random(6, rank=1)
    aggregation.add("west", update)
    aggregation.add("east", {name: array * 0 for name, array in adapter.items()})
    after, _ = aggregation.result()
    # A silo of small rank changes what it was sent; the directions that it never saw stay as they are.
    moved = (small.adapter[B] + update[B]) @ (small.adapter[A] + update[A]) - small.adapter[B] @ small.adapter[A]
    whole = adapter[B] @ adapter[A] + moved / 2
    left, sizes, right = np.linalg.svd(whole)
    np.testing.assert_allclose(after[B] @ after[A], (left[:, :RANK] * sizes[:RANK]) @ right[:RANK], atol=1e-5)
    with pytest.raises(ValueError, match="names or shapes"):
        aggregation.add("west", random(6))


def test_an_unused_direction_can_still_be_learned():
    """After a product of rank 1, and after none at all, every row of A is as long as at the start, and B's are 0."""
    before = {A: random(99)[A], B: random(99)[B] * 0}
    for update in (random(1)[B] * [1, 0, 0], random(1)[B] * 0):
        updates = {"east": {A: before[A] * 0, B: update.astype(np.float32)}}
        after, _ = run_rounds(settings(adapters="product"), [updates], before, silos=("east",))[0]
        np.testing.assert_allclose(np.linalg.norm(after[A], axis=1), 3**-0.5, rtol=1e-5)
        np.testing.assert_allclose(after[B][:, 1:], 0, atol=1e-7)
        np.testing.assert_allclose(after[B] @ after[A], update @ before[A], atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"server_tau": 0.1}, "federated.server_tau is 0.1: federated.aggregation 'fedavg' has no use for it"),
        ({"aggregation": "median", "server_learning_rate": 0.1}, "server_learning_rate is 0.1"),
        ({"aggregation": "fedadagrad", "server_momentum": 0.5}, "server_momentum is 0.5"),
        ({"max_silos": 7}, "max_silos is 7"),
        ({"aggregation": "krum", "byzantine_silos": 2}, "means something only from 7 updates on"),
        ({"aggregation": "trimmed_mean", "byzantine_silos": 2, "min_silos": 4}, "only from 5 updates on"),
        ({"aggregation": "scaffold"}, "federated.optimizer is 'adam'"),
        ({"aggregation": "scaffold", "optimizer": "sgd", "proximal_mu": 1.0}, "proximal_mu is 1"),
        ({"aggregation": "scaffold", "optimizer": "sgd", "adapters": "product"}, "adapters is 'product'"),
        ({"lora_ranks": {"east": 2}}, "factors of different ranks have no mean"),
        ({"adapters": "product", "lora_ranks": {"east": 99}}, "at most federated.lora_rank (16)"),
        ({"proximal_mu": float("nan")}, "proximal_mu"),
        (
            {"proximal_mu": 3.0, "learning_rate": 0.5},
            "federated.proximal_mu is 3 and federated.learning_rate 0.5: their",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, expected):
    with pytest.raises(ValidationError) as caught:
        FederatedSettings(**changes)
    assert expected in str(caught.value)


@pytest.mark.parametrize("changes", [{}, {"aggregation": "fedavgm"}])
def test_a_silo_that_sends_huge_updates_leaves_an_adapter_that_the_others_take(changes):
    """Finite updates of 30,000 pushed the mean beyond what silos' policies take, and none would have trained on it."""
    huge = {name: np.full_like(array, 30_000) for name, array in random(0).items()}
    rounds = [{**by_silo, "south": huge} for by_silo in UPDATES]
    for adapter, _ in run_rounds(settings(**changes), rounds):
        assert all(np.abs(array).max() <= LARGEST_ADAPTER_VALUE for array in adapter.values())
    honest = run_rounds(settings(**changes), UPDATES)[-1][0]
    assert all(np.abs(array).max() < 1 for array in honest.values())


# The anchor


def pulled(chosen, sent, weights):
    """What a silo adds to a gradient at these weights."""
    return {name: chosen.pull * (weights[name] - sent.adapter[name]) + sent.correction[name] for name in weights}


@pytest.mark.parametrize("aggregation", ["fedavg", "fedadam", "median"])
@pytest.mark.parametrize("adapters", ["average", "ffa"])
def test_the_anchor_pulls_to_the_start_in_every_round(aggregation, adapters):
    """The gradient of strength / 2 * |w - start|^2, wherever rounds have led and a step stands."""
    chosen = settings(aggregation, adapters=adapters, anchor=0.8, min_silos=4)
    before = random(99)
    named = [name for name in before if adapters == "average" or name == B]
    updates = [{silo: {name: one[name] for name in named} for silo, one in by_silo.items()} for by_silo in UPDATES]
    assert not any(array.any() for array in RoundAggregation(chosen, before, {}, 4).sent("east").correction.values())
    for adapter, state in run_rounds(chosen, updates, before):
        sent = RoundAggregation(chosen, adapter, state, 4).sent("east")
        assert set(sent.correction) == set(named)
        stands = {name: array for name, array in random(7, scale=3.0).items() if name in named}
        for name, pull in pulled(chosen, sent, stands).items():
            np.testing.assert_allclose(pull, 0.8 * (stands[name] - before[name]), rtol=1e-4, atol=1e-5)


def test_the_anchor_changes_nothing_of_what_becomes_of_updates():
    """It acts in the silos' steps; and without it the state is what it was."""
    for aggregation in ("fedavg", "fedadam"):
        plain = run_rounds(settings(aggregation), UPDATES)
        anchored = run_rounds(settings(aggregation, anchor=0.8), UPDATES)
        for (adapter, state), (other, more) in zip(plain, anchored, strict=True):
            assert all(np.array_equal(adapter[name], other[name]) for name in adapter)
            assert {name for name in more if not name.startswith("start/")} == set(state)


def test_what_the_anchor_sends_stays_within_what_silos_accept():
    chosen, start = settings(anchor=100.0), random(99)
    _, state = run_rounds(chosen, UPDATES[:1], start)[0]
    far = {name: array + 900 for name, array in start.items()}
    for array in RoundAggregation(chosen, far, state, 4).sent("east").correction.values():
        assert array.max() == LARGEST_ADAPTER_VALUE
        assert array.dtype == np.float32


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"aggregation": "scaffold", "optimizer": "sgd"}, "federated.anchor is 0.5: with federated.aggregation"),
        ({"adapters": "product"}, "federated.anchor is 0.5: with federated.adapters 'product'"),
        ({"learning_rate": 1.0, "proximal_mu": 0.6}, "federated.proximal_mu is 0.6, federated.anchor 0.5"),
        ({"anchor": -0.1}, "greater than or equal to 0"),
        ({"anchor": float("nan")}, "anchor"),
        ({"anchor": float("inf")}, "less than or equal to 100"),
    ],
)
def test_an_anchor_that_means_nothing_is_refused(changes, said):
    with pytest.raises(ValidationError) as caught:
        settings(**{"anchor": 0.5, **changes})
    assert said in str(caught.value)
