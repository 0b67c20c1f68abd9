"""Many names of 16 hex digits (keys of volumes and of sources) in eight bytes each: a build of a million fits."""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray


def number_of(name: str) -> int:
    """A name of 16 hex digits as a number; ValueError for other text."""
    return int.from_bytes(bytes.fromhex(name))


def name_of(number: int) -> str:
    """The name that the number stands for."""
    return f"{number:016x}"


class Names:
    """A set of such names."""

    def __init__(self, numbers: NDArray[np.uint64]) -> None:
        self._numbers: NDArray[np.uint64] = np.unique(numbers.astype(np.uint64))

    @classmethod
    def of(cls, names: Iterable[str]) -> "Names":
        """What of this are such names, in a set."""
        return cls(np.fromiter(_numbers(names), np.uint64))

    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, name: object) -> bool:
        for number in _numbers([str(name)]):
            place = int(np.searchsorted(self._numbers, np.uint64(number)))
            return place < len(self._numbers) and int(self._numbers[place]) == number
        return False

    def __iter__(self) -> Iterator[str]:
        return map(name_of, self._numbers.tolist())

    def num_shared(self, other: "Names") -> int:
        """How many names are in both."""
        return len(np.intersect1d(self._numbers, other._numbers, assume_unique=True))


def _numbers(names: Iterable[str]) -> Iterator[int]:
    for name in names:
        try:
            if len(name) == 16:
                yield number_of(name)
        except ValueError:
            continue
