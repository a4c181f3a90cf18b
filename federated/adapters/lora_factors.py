"""The two factors of a LoRA adapter: A frozen (FFA-LoRA), and their product averaged exactly and factored again.

The mean of B and the mean of A are not the factors of the mean of B A. Two ways round it: train B alone (Sun et al.
2024, "Improving LoRA in Privacy-preserving Federated Learning": the product of A's and B's noises goes away, too), or
average the products and factor the result by its singular values, which also lets ranks differ among silos.
"""

import numpy as np
import numpy.typing as npt

from configs.storage.files import digest_bytes
from federated.adapters.arrays import Arrays, to_bytes

_A, _B = ".lora_A.", ".lora_B."
_START_NORM = 3**-0.5  # of a row of A as peft starts it: uniform values of variance 1 / (3 width)


def frozen(name: str) -> bool:
    """Whether a parameter is an A, which FFA-LoRA doesn't train."""
    return _A in name


def frozen_digest(adapter: Arrays) -> str:
    """Digest of an adapter's A matrices: by it coordinator and silo know that they mean the same ones."""
    return digest_bytes(to_bytes({name: array for name, array in adapter.items() if frozen(name)}))


def cut(adapter: Arrays, rank: int) -> Arrays:
    """The first ``rank`` directions of an adapter; of one that ``factored`` made, the best approximation."""
    return {name: _cut(name, array, rank) for name, array in adapter.items()}


def _cut(name: str, array: npt.NDArray[np.float32], rank: int) -> npt.NDArray[np.float32]:
    """A head has no directions, and stays whole."""
    if frozen(name):
        return array[:rank]
    return array[:, :rank] if _B in name else array


def products(adapter: Arrays) -> Arrays:
    """B A of each layer, shape (out, in), by the name of its A."""
    return {name: _product(adapter, name).astype(np.float32) for name in adapter if frozen(name)}


def change(before: Arrays, update: Arrays) -> Arrays:
    """What an update changes in each layer's B A, shape (out, in), by the name of its A."""
    after = {name: array + update[name] for name, array in before.items()}
    return {
        name: (_product(after, name) - _product(before, name)).astype(np.float32) for name in before if frozen(name)
    }


def _product(adapter: Arrays, name: str) -> npt.NDArray[np.float64]:
    return adapter[_b_of(name)].astype(np.float64) @ adapter[name].astype(np.float64)


def factored(wholes: Arrays, rank: int) -> Arrays:
    """Adapters of a rank whose products are nearest to the given ones, largest singular value first.

    A keeps the norm that it starts with, and the sizes go into B: a direction that isn't used yet (singular value 0)
    can still be learned, where splitting evenly would make both its factors 0 for good.
    """
    adapter: Arrays = {}
    for name, whole in wholes.items():
        left, sizes, right = np.linalg.svd(whole.astype(np.float64), full_matrices=False)
        signs = np.sign(right[np.arange(len(right)), np.abs(right).argmax(axis=1)])  # fixed: libraries differ
        b, a = left * sizes * signs / _START_NORM, right * signs[:, None] * _START_NORM
        missing = max(0, rank - len(sizes))  # a rank beyond the layer's own width adds nothing
        adapter[_b_of(name)] = np.pad(b[:, :rank], ((0, 0), (0, missing))).astype(np.float32)
        adapter[name] = np.pad(a[:rank], ((0, missing), (0, 0))).astype(np.float32)
    return adapter


def _b_of(name: str) -> str:
    return name.replace(_A, _B)
