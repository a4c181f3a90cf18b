"""Secure aggregation's masks, which hide a vector only as well as their key and their generator do."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from traps.cell import Cell, judged

SIZE = 10_000
SEED = bytes(range(32))
FOLDED_ALIKE = b"".join(SEED[at : at + 4] for at in range(28, -1, -4))  # the same 32-bit words, in another order


def judge(mask: Callable[[bytes], np.ndarray]) -> Cell:
    """Whether other keys give other masks, also keys whose 32-bit words have the same XOR, and no key is of 32 bits."""
    keys = [SEED, FOLDED_ALIKE, *(SEED[:at] + bytes([SEED[at] ^ 1]) + SEED[at + 1 :] for at in range(32))]
    masks = [mask(key) for key in keys]
    same = bool(np.array_equal(masks[0], masks[1]))
    others = sum(bool(np.array_equal(one, other)) for one, other in pairwise(masks[2:]))
    folded = np.random.RandomState(int(np.bitwise_xor.reduce(np.frombuffer(SEED, "<u4"))))
    twister = bool(np.array_equal(masks[0], folded.randint(0, 2**32 - 1, (SIZE,), dtype=np.int64)))
    return judged(
        not (same or others or twister),
        f"two keys of 256 bits with the same XOR of their words give the same mask: {same}; "
        f"a Mersenne Twister seeded by 32 bits gives it, too: {twister}",
    )


def flower() -> Cell:
    from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

    def mask(key: bytes) -> np.ndarray:
        return pseudo_rand_gen(key, 2**32, [(SIZE,)])[0]

    return judge(mask)


def siloweave() -> Cell:
    from privacy.secagg.masks import apply_mask

    def mask(key: bytes) -> np.ndarray:
        words = np.zeros(SIZE, np.uint32)
        apply_mask(words, key, 1)
        return words

    return judge(mask)
