"""Counter-based randomness: every draw is a pure function of (seed, purpose, ids).

Nothing here keeps a running state, so a draw does not depend on the number of ranks, on the
order of the calls or on what else was drawn.
"""

from __future__ import annotations

import hashlib
from typing import Final

import numpy as np
import numpy.typing as npt

# splitmix64 (Steele, Lea, Flood 2014): its increment, and the factors of its output function.
GOLDEN: Final = 0x9E3779B97F4A7C15
MIX_A: Final = 0xBF58476D1CE4E5B9
MIX_B: Final = 0x94D049BB133111EB
_TABLE: Final = 32  # the largest population, in draws, for which a table of it is made


def derive(seed: int, purpose: str, *ids: int) -> int:
    """A key in `[0, 2**63)` of (seed, purpose, ids), the same on every platform and version."""
    text = "/".join([str(int(seed)), purpose, *(str(int(i)) for i in ids)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def mix64(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The output function of splitmix64; its products wrap around."""
    for shift, factor in ((30, MIX_A), (27, MIX_B), (31, 1)):
        words = (words ^ (words >> np.uint64(shift))) * np.uint64(factor)
    return words


def signed(word: int, bits: int) -> int:
    """The signed integer of `bits` bits that has the lowest bits of a word."""
    word &= (1 << bits) - 1
    return word - (word >> (bits - 1) << bits)


def generator(seed: int, purpose: str, *ids: int) -> np.random.Generator:
    """NumPy's counter-based Philox generator, keyed by `derive`."""
    return np.random.Generator(np.random.Philox(key=derive(seed, purpose, *ids)))


def seed_torch(seed: int, purpose: str, *ids: int) -> None:
    """Seed torch's default generators of the host and of every device; waits for nothing."""
    import torch  # here: the launcher draws, too, and does without torch

    torch.manual_seed(derive(seed, purpose, *ids))


def sample_without_replacement(
    population: int, count: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """`count` distinct numbers of `[0, population)`, uniform over all such sets, sorted.

    Time and memory are O(count), whatever the population.

    Raises:
        ValueError: more are asked for than there are.
    """
    if not 0 <= count <= population:
        raise ValueError(f"cannot draw {count} of {population} without replacement")
    if population <= 3 * count:
        return np.sort(rng.permutation(population)[:count])
    # The first `count` distinct values of a sequence of independent draws are such a sample.
    drawn = np.empty(0, np.int64)
    while True:
        drawn = np.concatenate([drawn, rng.integers(0, population, count + count // 4 + 8)])
        first = _first_positions(drawn, population)
        if len(first) >= count:
            return np.sort(drawn[first[:count]])


def _first_positions(drawn: npt.NDArray[np.int64], population: int) -> npt.NDArray[np.int64]:
    """Ascending positions at which a number of `[0, population)` is drawn for the first time."""
    if population > _TABLE * len(drawn):
        return np.sort(np.unique(drawn, return_index=True)[1])
    # A table of the population instead of a sort: ten times as fast.
    numbers = np.arange(len(drawn))
    first = np.empty(population, np.int64)
    first[drawn[::-1]] = numbers[::-1]
    return np.flatnonzero(first[drawn] == numbers)
