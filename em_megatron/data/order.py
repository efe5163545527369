"""Orders that are functions of a key alone, over releases and machines."""

import numpy as np
from numpy.typing import NDArray

# Of everything that decides which sample is which: packing, permutations, groups, the rule of blends. Another version is
# another order, which a run that goes on refuses.
ORDER_VERSION = 1
PADDING = -1  # in place of a sample's number: a sample without documents


def permutation(count: int, *key: int) -> NDArray[np.int64]:
    """A permutation of range(count) that is a function of the key alone.

    numpy promises equal streams over its versions for bit generators but not for Generator.permutation, and a run
    may be resumed under a newer numpy: so raw 64-bit words are sorted.
    """
    words = np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(words, kind="stable")


def slot_order(samples: int, slots: int) -> NDArray[np.int64]:
    """The numbers of M samples in the order G slots read them, round after round: int64 [ceil(M/G) · G].

    Slot g has samples g·M//G, ..., (g+1)·M//G - 1, in this order, and PADDING where it has none left.
    """
    edges = np.arange(slots + 1, dtype=np.int64) * samples // slots
    numbers = edges[:-1] + np.arange(-(-samples // slots), dtype=np.int64)[:, None]
    return np.where(numbers < edges[1:], numbers, PADDING).ravel()
