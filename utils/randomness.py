"""Random numbers that are a function of a key: of nothing that ran before, on every platform."""

import functools
import hashlib
from typing import Any

import numpy as np


def random_key(*parts: Any) -> int:
    """A seed for torch (63 bits) from whatever it shall depend on."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Draws:
    """A sequence of draws that is a function of the key.

    Made of the raw output of a NumPy bit generator, which is guaranteed not to change.
    """

    def __init__(self, *key: Any):
        digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
        self.bits = np.random.Philox(key=int.from_bytes(digest, "little"))

    def chance(self, probability: float) -> bool:
        return self.bits.random_raw() < probability * 2.0**64

    def below(self, count: int) -> int:
        """A whole number from 0 to count - 1."""
        return self.bits.random_raw() * count >> 64

    def uniform(self, count: int) -> np.ndarray:
        """Of shape (count,), in [0, 1)."""
        return (self.bits.random_raw(count) >> 11) * 2.0**-53

    def permutation(self, count: int) -> list[int]:
        """Of range(count)."""
        return np.argsort(self.bits.random_raw(count), kind="stable").tolist()


@functools.lru_cache(maxsize=64)  # a lane asks for the order of its shards with every chunk
def keyed_permutation(count: int, *key: Any) -> list[int]:
    """A permutation of range(count)."""
    return Draws(*key).permutation(count)
