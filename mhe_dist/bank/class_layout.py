"""Class ids and their rows: keyed permutation, heads and slots, mixed radix.

Pure arithmetic on int64 tensors of any device: the cost is per label, no table grows with the
number of classes. -1 stands for "no class" everywhere and passes through every function.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from mhe_dist.seeds import derive

_ROUNDS: Final = 8
_MIX_A: Final = 0x2545F4914F6CDD1D  # odd multipliers that spread low bits upward
_MIX_B: Final = 0x5851F42D4C957F2D


@dataclass(frozen=True)
class LabelLayout:
    """Which head and slot a class has: its position under the permutation, cut into heads.

    Attributes:
        num_classes: C.
        length: L, classes of a head; the last head may have padding slots, which hold no class.
        groups: G, fixed contiguous groups of heads; ranks own whole groups.
        key: chooses the permutation.
    """

    num_classes: int
    length: int
    groups: int
    key: int

    def __post_init__(self) -> None:
        if min(self.num_classes, self.length, self.groups) < 1:
            raise ValueError(f"classes, head length and groups must be positive: {self}")

    @property
    def heads(self) -> int:
        """H = ceil(C / L)."""
        return -(-self.num_classes // self.length)

    def locate(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Head and slot of each class, int64 of the shape of `labels`.

        Labels outside `[0, C)` have head -1 and slot -1.
        """
        known = (labels >= 0) & (labels < self.num_classes)
        position = _permute(torch.where(known, labels, 0), self.num_classes, self.key)
        head = position // self.length
        slot = position - head * self.length
        return torch.where(known, head, -1), torch.where(known, slot, -1)

    def classes(self, heads: Tensor, slots: Tensor) -> Tensor:
        """Class in each slot, the inverse of `locate`; the two shapes broadcast.

        -1 for padding slots and for heads and slots that do not exist.
        """
        position = heads * self.length + slots
        known = (heads >= 0) & (slots >= 0) & (slots < self.length) & (position < self.num_classes)
        labels = _restore(torch.where(known, position, 0), self.num_classes, self.key)
        return torch.where(known, labels, -1)

    def group_heads(self, group: int) -> range:
        """The contiguous, balanced range of heads of a group; empty for some if G > H."""
        return range(group * self.heads // self.groups, (group + 1) * self.heads // self.groups)

    def group_of(self, heads: Tensor) -> Tensor:
        """Group of each head in `[0, H)`, the inverse of `group_heads`; head -1 has group -1."""
        return ((heads + 1) * self.groups - 1) // self.heads


def digits(labels: Tensor, lengths: Sequence[int]) -> Tensor:
    """Mixed-radix digits `[..., levels]` of labels `[...]`, most significant first.

    Negative labels have digits of -1. Labels must be less than the product of the lengths.
    """
    rest, found = labels, []
    for length in reversed(lengths):
        found.append(torch.where(labels < 0, -1, rest % length))
        rest = rest // length
    return torch.stack(found[::-1], dim=-1)


def compose(digits: Tensor, lengths: Sequence[int]) -> Tensor:
    """Labels `[...]` of mixed-radix digits `[..., levels]`, the inverse of `digits`.

    A result that is not less than the number of classes is a padding class. -1 if any digit is
    negative.
    """
    labels = torch.zeros_like(digits[..., 0])
    for level, length in enumerate(lengths):
        labels = labels * length + digits[..., level]
    return torch.where((digits < 0).any(-1), -1, labels)


def balanced_lengths(num_classes: int, levels: int) -> list[int]:
    """Lengths whose product is at least C, that differ by 1 at most, with the least product.

    The longer ones come first.
    """
    length = max(1, round(num_classes ** (1 / levels)))
    while length**levels < num_classes:
        length += 1
    while length > 1 and (length - 1) ** levels >= num_classes:
        length -= 1
    shorter = 0
    while length ** (levels - shorter - 1) * (length - 1) ** (shorter + 1) >= num_classes:
        shorter += 1
    return [length] * (levels - shorter) + [length - 1] * shorter


def _permute(labels: Tensor, size: int, key: int) -> Tensor:
    """Permutation of `[0, size)` that `key` chooses."""
    return _walk(labels, size, key, 1)


def _restore(positions: Tensor, size: int, key: int) -> Tensor:
    """Inverse of `_permute`."""
    return _walk(positions, size, key, -1)


def _walk(values: Tensor, size: int, key: int, direction: int) -> Tensor:
    """Apply the network until every value is inside `[0, size)` again (cycle walking).

    The network permutes a domain that exceeds `size` by less than its root, so the first pass
    settles nearly all. (Black, Rogaway: Ciphers with arbitrary finite domains, 2002.)
    """
    values = _feistel(values, size, key, direction)
    while (outside := values >= size).any():
        values[outside] = _feistel(values[outside], size, key, direction)
    return values


def _feistel(values: Tensor, size: int, key: int, direction: int) -> Tensor:
    """Feistel network on pairs `(value // b, value % b)`, each half shifted modulo its radix."""
    radices = (_ceil_root(size), -(-size // _ceil_root(size)))
    high = values // radices[1]
    halves = [high, values - high * radices[1]]
    keys = _round_keys(key)
    for number in range(_ROUNDS)[::direction]:
        moved = number % 2
        # In place, a sixth faster: the tables of a step's labels fill the cache.
        shift = _scramble(halves[1 - moved], keys[number])
        halves[moved].add_(shift, alpha=direction).remainder_(radices[moved])
    return halves[0].mul_(radices[1]).add_(halves[1])


def _scramble(values: Tensor, key: int) -> Tensor:
    """A keyed 44-bit hash of int64, signed; the products wrap around."""
    mixed = (values ^ key).mul_(_MIX_A)
    return mixed.bitwise_xor_(mixed >> 32).mul_(_MIX_B).bitwise_right_shift_(20)


def _ceil_root(size: int) -> int:
    return math.isqrt(size - 1) + 1


@lru_cache(maxsize=64)
def _round_keys(key: int) -> tuple[int, ...]:
    return tuple(derive(key, "label permutation", number) for number in range(_ROUNDS))
