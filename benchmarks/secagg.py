"""What a secure sum costs each silo and the server, beside a sum in the clear and Flower's utilities.

Silos that drop out do so after they have shared their keys, which costs the server most. Every sum is compared with
the exact one. Flower's SecAgg+ is legacy, and its workflow does not run on Flower's present messages; its utilities
can be called, so one of each operation is timed and counted as often as the same round needs it. With TenSEAL (`pip
install tenseal`) the same vectors are added under homomorphic encryption, too.

python benchmarks/secagg.py --json secagg.json
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from figures import setting, spread

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout's own packages, as the tests take them

import numpy as np

from privacy.secagg import sharing
from privacy.secagg.agreement import Agreement
from privacy.secagg.client import Client
from privacy.secagg.encoding import Encoding
from privacy.secagg.masks import apply_mask
from privacy.secagg.messages import Phase
from privacy.secagg.server import Server
from privacy.signing import Signer

LIBRARIES = ["numpy", "cryptography", "pycryptodome", "flwr", *(["tenseal"] if find_spec("tenseal") else [])]
SURVIVORS = 0.7  # of all silos have to
COLLUDERS = 0.2  # of all silos may
CKKS_DEGREE, CKKS_CHAIN, CKKS_SCALE = 4096, [60, 49], 2**40  # for sums alone: no product, and SEAL asks for 128 bits


class Meter:
    """Seconds and bytes by party; the server is one of them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.sent: dict[str, int] = defaultdict(int)

    def timed(self, party: str, call: Callable[..., Any], *arguments: Any) -> Any:
        began = time.perf_counter()
        found = call(*arguments)
        self.seconds[party] += time.perf_counter() - began
        return found

    def say(self, party: str, call: Callable[..., bytes], *arguments: Any) -> bytes:
        message = self.timed(party, call, *arguments)
        self.sent[party] += len(message)
        return message


def secure_sum(signers: dict[str, Signer], values: int, dropouts: float) -> dict[str, Any]:
    """One round, in one process, one party at a time."""
    count = len(signers)
    roster = {name: signer.public_key for name, signer in signers.items()}
    agreement = Agreement(
        roster=roster,
        colluders=int(COLLUDERS * count),
        min_survivors=int(np.ceil(SURVIVORS * count)),
        encoding=Encoding(1.0, count),
        length=values,
        context=b"benchmark",
    )
    meter, server = Meter(), Server(agreement)
    clients = {name: meter.timed(name, Client, name, signers[name], agreement) for name in roster}
    gone = set(list(roster)[: round(dropouts * count)])
    expected, encoding_seconds = np.zeros(values, agreement.encoding.dtype), []
    inbox: dict[str, bytes] = dict.fromkeys(roster, b"")
    received: dict[str, int] = defaultdict(int)
    for phase in Phase:
        for name in [name for name in inbox if phase < Phase.MASKED or name not in gone]:
            client, mail = clients[name], inbox[name]
            received[name] += len(mail)
            match phase:
                case Phase.KEYS:
                    message = meter.say(name, client.advertise)
                case Phase.SHARES:
                    message = meter.say(name, client.share, mail)
                case Phase.MASKED:
                    drawn = np.random.default_rng(len(received)).uniform(-1, 1, values)
                    began = time.perf_counter()
                    words = agreement.encoding.encode(drawn)
                    encoding_seconds.append(time.perf_counter() - began)
                    expected += words
                    message = meter.say(name, client.mask, mail, words)
                case Phase.SURVIVORS:
                    message = meter.say(name, client.agree, mail)
                case Phase.REVEALED:
                    message = meter.say(name, client.reveal, mail)
            meter.timed("server", server.receive, message)
        inbox = meter.timed("server", server.advance)
    if not np.array_equal(server.total(), expected):
        raise SystemExit("a secure sum is not the exact sum")
    left = [name for name in roster if name not in gone]
    return {
        "silos": count,
        "values": values,
        "dropouts": dropouts,
        "neighbours": len(agreement.ring.neighbourhood(left[0])) - 1,
        "silo_seconds": spread([meter.seconds[name] for name in left]),
        "encoding_seconds": spread(encoding_seconds),
        "server_seconds": meter.seconds["server"],
        "silo_sends_bytes": max(meter.sent.values()),
        "silo_receives_bytes": max(received.values()),
        "server_receives_bytes": sum(meter.sent.values()),
        "server_sends_bytes": sum(received.values()),
        "masked_vector_bytes": expected.nbytes,
        "sent_to_vector": max(meter.sent.values()) / expected.nbytes,
        "plaintext_sum_seconds": plaintext_sum(len(left), expected),
        "flower": flower(count, len(gone), values, agreement.ring.threshold),
    }


def plaintext_sum(count: int, vector: np.ndarray) -> float:
    """Seconds to add as many vectors that come as bytes."""
    message, total = vector.tobytes(), np.zeros_like(vector)
    began = time.perf_counter()
    for _ in range(count):
        total += np.frombuffer(message, vector.dtype)
    return time.perf_counter() - began


def seconds_of(call: Callable[..., Any], *arguments: Any) -> float:
    """The median of three."""
    found = []
    for _ in range(3):
        began = time.perf_counter()
        call(*arguments)
        found.append(time.perf_counter() - began)
    return sorted(found)[1]


def flower(silos: int, gone: int, values: int, threshold: int) -> dict[str, float]:
    """Flower's utilities in the same round: all pairs, the same threshold, its words of 64 bits."""
    from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
    from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

    seed, left = bytes(range(32)), silos - gone
    shares = create_shares(seed, threshold, silos)
    mask = seconds_of(pseudo_rand_gen, seed, 2**32, [(values,)])
    split = seconds_of(create_shares, seed, threshold, silos)
    combine = seconds_of(combine_shares, shares[:threshold])
    masks = left + gone * left
    return {
        "mask_seconds": mask,
        "split_seconds": split,
        "combine_seconds": combine,
        "silo_seconds_computed": silos * mask + 2 * split,
        "server_masks_seconds_computed": masks * mask,
        "server_seconds_computed": masks * mask + silos * combine,
    }


def operations(values: int) -> dict[str, float]:
    """One of each of Siloweave's, as Flower's above; 34 of 50 shares."""
    words, shares = np.zeros(values, np.uint32), sharing.split(bytes(32), 34, 50)
    numbered = dict(enumerate(shares[:34], 1))
    return {
        "mask_seconds": seconds_of(apply_mask, words, bytes(32), 1),
        "split_seconds": seconds_of(sharing.split, bytes(32), 34, 50),
        "combine_seconds": seconds_of(sharing.combine, numbered),
    }


def homomorphic(silos: int, values: int) -> dict[str, Any]:
    """A sum under CKKS (Cheon et al. 2017) by TenSEAL, with the least parameters of 128 bits that hold it.

    A silo has the secret key, the others and the server the public one. Also what the key's holder makes of one silo's
    message where the server gives it that for the sum.
    """
    import tenseal

    secret = tenseal.context(tenseal.SCHEME_TYPE.CKKS, CKKS_DEGREE, coeff_mod_bit_sizes=CKKS_CHAIN)
    secret.global_scale = CKKS_SCALE
    public = tenseal.context_from(secret.serialize(save_secret_key=False))
    vectors = [np.random.default_rng(silo).uniform(-1, 1, values) for silo in range(silos)]

    def encrypted(vector: np.ndarray) -> list[bytes]:
        parts = (vector[start : start + CKKS_DEGREE // 2] for start in range(0, values, CKKS_DEGREE // 2))
        return [tenseal.ckks_vector(public, part).serialize() for part in parts]

    def added(messages: list[list[bytes]]) -> list[bytes]:
        parts = ([tenseal.ckks_vector_from(public, part) for part in parts] for parts in zip(*messages, strict=True))
        return [sum(rest, first).serialize() for first, *rest in parts]

    def decrypted(message: list[bytes]) -> np.ndarray:
        return np.concatenate([tenseal.ckks_vector_from(secret, part).decrypt() for part in message])

    meter = Meter()
    messages = [meter.timed("silo", encrypted, vector) for vector in vectors]
    total = meter.timed("server", added, messages)
    found = meter.timed("holder", decrypted, total)
    return {
        "silos": silos,
        "values": values,
        "silo_seconds": meter.seconds["silo"] / silos,
        "server_seconds": meter.seconds["server"],
        "holder_seconds": meter.seconds["holder"],
        "silo_sends_bytes": (sent := sum(map(len, messages[0]))),
        "sent_to_vector": sent / (4 * values),
        "error": float(np.abs(found - sum(vectors)).max()),
        "error_of_one_silo_alone": float(np.abs(decrypted(messages[0]) - vectors[0]).max()),
    }


def line(found: dict[str, Any]) -> str:
    """A round in one line."""
    server, clear = found["server_seconds"], found["plaintext_sum_seconds"]
    return (
        f"{found['silos']} silos, {found['values']} values, {found['dropouts']:.0%} gone: "
        f"a silo {found['silo_seconds']['median']:.3f} s, the server {server:.3f} s (in the clear {clear:.3f} s, "
        f"Flower's {found['flower']['server_seconds_computed']:.3f} s), {found['sent_to_vector']:.4f} vectors sent"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--silos", type=int, nargs="+", default=[10, 50, 100])
    parser.add_argument("--values", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--dropouts", type=float, nargs="+", default=[0.0, 0.1, 0.3])
    parser.add_argument("--small", action="store_true", help="a few silos and values: whether it runs")
    arguments = parser.parse_args()
    if arguments.small:
        arguments.silos, arguments.values = [10], [10_000]
    document: dict[str, Any] = {**setting(LIBRARIES), "rounds": []}
    document["operations"] = operations(max(arguments.values))
    if "tenseal" in LIBRARIES:
        document["homomorphic"] = [homomorphic(*size) for size in itertools.product(arguments.silos, arguments.values)]
        print(*document["homomorphic"], sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for silos in arguments.silos:
            signers = {f"silo-{number:03}": Signer(Path(folder) / f"{silos}-{number}.key") for number in range(silos)}
            for values in arguments.values:
                for dropouts in arguments.dropouts:
                    document["rounds"].append(found := secure_sum(signers, values, dropouts))
                    print(line(found), flush=True)
    arguments.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
