"""Which volumes are copies of one another, from fingerprints and hashes alone; thousands against thousands.

Marks that agree in one of four 32-bit words bring two volumes together; the pair counts as a near-copy when enough
marks agree in how one volume lies in the other: one turn or mirror image, one shift.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from data_pipeline.volume_fingerprint import FRAMES, Marks, unpack
from mim_scale.store.manifest import FingerprintRow

LEAST_SCORE = 3.5
"""Of near-copies; docs/benchmarks/2026-11-26-leakage.md has what it finds and what it takes for one."""
CERTAIN_SCORE = 8.0
"""Of near-copies that join groups: joins chain, so a few false alarms could make one group of all."""
_FAR_BITS = 16
"""Marks of one place differ in a few bits of 128; from here on they count nothing."""
_EXPECTED_SHARE = 0.1
"""Of the marks where two volumes overlap, copies share more than this; heads of two people hardly half of it."""
_FEWEST = 8
_SHIFT_MM = 8.0
_STRETCH = 0.04
"""A small rotation or a voxel size that is a little off moves marks by so much of their distance."""
_MOST_PAIRS = 300
"""Of marks, looked at in one pair of volumes; the nearest come first."""
_BIN_MM = 24
_BLOCK_MARKS = 1 << 15
_MOST_ALIKE = 200
"""Marks that share a word: a word that more share tells nothing."""
_WORDS = 4
_LEAST_VOTES = 3
"""Marks that must share a word and agree before two volumes are compared."""

_RELATIONS = np.array(
    [[int(((FRAMES[a].T @ FRAMES[b]) == FRAMES).all((1, 2)).argmax()) for b in range(48)] for a in range(48)], np.uint8
)
IDENTITY = int((np.eye(3, dtype=np.int8) == FRAMES).all((1, 2)).argmax())


class Evidence(StrEnum):
    """Why two volumes count as one, strongest first."""

    SAME_VOXELS = "same_voxels"
    SAME_SERIES = "same_series"
    SAME_PATIENT = "same_patient"
    NEAR_COPY = "near_copy"


@dataclass(frozen=True)
class Match:
    """Two volumes that show the same anatomy of the same scan."""

    a: int
    b: int
    """Positions in the two lists that were compared."""
    score: float
    num_marks: int
    relation: int
    """How b's axes lie in a's: index into FRAMES; IDENTITY where it is neither turned nor mirrored."""
    shift_mm: tuple[float, float, float]
    """b = a turned by the relation, then moved by so much (z, y, x)."""


@dataclass(frozen=True)
class Link:
    """Two volumes that must not be on two sides of a split, and why."""

    a: int
    b: int
    evidence: Evidence
    match: Match | None = None
    correlation: float | None = None
    """Of the voxels, laid over each other; None where nobody looked."""


def compare(a: Marks, b: Marks) -> tuple[float, int, int, tuple[float, float, float]]:
    """Score, marks that agree, relation and shift of the best way to lay b over a."""
    nothing = (0.0, 0, IDENTITY, (0.0, 0.0, 0.0))
    if not len(a) or not len(b):
        return nothing
    far = np.bitwise_count(a.bits[:, None] ^ b.bits[None]).sum(2, dtype=np.uint8)
    i, j = np.nonzero(far < _FAR_BITS)
    order = np.argsort(far[i, j], kind="stable")[:_MOST_PAIRS]
    i, j = i[order], j[order]
    if not len(i):
        return nothing
    weight = 1 - far[i, j] / _FAR_BITS
    relation = _RELATIONS[a.frame[i], b.frame[j]]
    at = a.at_mm[i].astype(np.float32)
    shift = b.at_mm[j] - np.einsum("ni,nij->nj", at, FRAMES[relation].astype(np.float32))
    near = np.abs(at[:, None] - at[None]).max(2)
    agrees = np.abs(shift[:, None] - shift[None]).max(2) <= _SHIFT_MM + _STRETCH * near
    agrees &= relation[:, None] == relation[None]
    best = int((agrees @ weight).argmax())
    kept = np.flatnonzero(agrees[best])
    # The nearest pair of each mark counts, and once: pairs come nearest first.
    _, first = np.unique(i[kept], return_index=True)
    kept = kept[np.sort(first)]
    _, first = np.unique(j[kept], return_index=True)
    kept = kept[first]
    moved = np.median(shift[kept], axis=0)
    total = float(weight[kept].sum())
    overlap = max(_overlap(a, b, FRAMES[relation[best]].astype(np.float32), moved), _FEWEST)
    z, y, x = (float(step) for step in moved)
    return total * min(1.0, total / (_EXPECTED_SHARE * overlap)), len(kept), int(relation[best]), (z, y, x)


def _overlap(a: Marks, b: Marks, turn: NDArray[np.float32], moved: NDArray[np.float32]) -> int:
    """Marks that could have agreed: those of either one that lie within the other, whichever are fewer."""
    in_b, in_a = a.at_mm @ turn + moved, (b.at_mm - moved) @ turn.T
    counts = []
    for places, marks in ((in_b, b), (in_a, a)):
        low, high = marks.at_mm.min(0) - _SHIFT_MM, marks.at_mm.max(0) + _SHIFT_MM
        counts.append(int(((places >= low) & (places <= high)).all(1).sum()))
    return min(counts)


def find_copies(a: Sequence[bytes], b: Sequence[bytes] | None = None, least_score: float = LEAST_SCORE) -> list[Match]:
    """Near-copies between two lists of fingerprints, or, without b, within one (each pair once, a < b).

    Memory: about 12 kB a fingerprint; time grows with the marks that look alike, not with the pairs.

    Raises:
        ValueError: something is no fingerprint of this version.
    """
    left = [_marks(mark) for mark in a]
    right = left if b is None else [_marks(mark) for mark in b]
    found = []
    for first, second in _candidates(left, right, within=b is None):
        score, num_marks, relation, shift = compare(left[first], right[second])
        if score >= least_score:
            found.append(Match(first, second, score, num_marks, relation, shift))
    return found


def _marks(fingerprint: bytes) -> Marks:
    return unpack(fingerprint) if fingerprint else _NONE


_NONE = Marks(np.zeros((0, 3), np.int16), np.zeros(0, np.uint8), np.zeros((0, 2), np.uint64))


def _candidates(left: Sequence[Marks], right: Sequence[Marks], within: bool) -> Iterator[tuple[int, int]]:
    """Pairs with a few marks that share a word and say the same of how the volumes lie."""
    if not any(map(len, left)) or not any(map(len, right)):
        return
    index = _Index(right)
    start = 0
    while start < len(left):
        stop, size = start, 0
        while stop < len(left) and (stop == start or size + len(left[stop]) <= _BLOCK_MARKS):
            size += len(left[stop])
            stop += 1
        yield from index.partners(left[start:stop], start, within)
        start = stop


class _Index:
    """Marks of many volumes, sorted by each of their words."""

    def __init__(self, volumes: Sequence[Marks]) -> None:
        self._count = len(volumes)
        self._owner, self._frame, self._at = _columns(volumes, 0)
        words = _words(volumes)
        self._order = [np.argsort(words[:, word], kind="stable").astype(np.int32) for word in range(_WORDS)]
        self._sorted = [words[order, word] for word, order in enumerate(self._order)]

    def partners(self, volumes: Sequence[Marks], start: int, within: bool) -> Iterator[tuple[int, int]]:
        owner, frame, at = _columns(volumes, start)
        words = _words(volumes)
        keys = [self._keys(word, words[:, word], owner, frame, at, within) for word in range(_WORDS)]
        pairs: set[int] = set()
        for shifted in (0, 1):
            # One mark may agree in several words: it counts once.
            votes = np.unique(np.concatenate([key[shifted] for key in keys], axis=0), axis=0)
            found, count = np.unique(votes[:, 0], return_counts=True)
            pairs.update((found[count >= _LEAST_VOTES] // (48 * _BINS**3)).tolist())
        for pair in sorted(pairs):
            yield pair // self._count, pair % self._count

    def _keys(
        self,
        word: int,
        values: NDArray[np.uint32],
        owner: NDArray[np.int64],
        frame: NDArray[np.uint8],
        at: NDArray[np.float32],
        within: bool,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(what a pair of equal words says of how its volumes lie, the mark), in two sets of bins."""
        low = np.searchsorted(self._sorted[word], values, "left")
        counts = np.searchsorted(self._sorted[word], values, "right") - low
        counts[counts > _MOST_ALIKE] = 0
        mine = np.repeat(np.arange(len(values)), counts)
        place = np.arange(len(mine)) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(low, counts)
        theirs = self._order[word][place]
        if within:
            later = self._owner[theirs] > owner[mine]
            mine, theirs = mine[later], theirs[later]
        relation = _RELATIONS[frame[mine], self._frame[theirs]]
        shift = self._at[theirs] - np.einsum("ni,nij->nj", at[mine], FRAMES[relation].astype(np.float32))
        pair = (owner[mine] * self._count + self._owner[theirs]) * 48 + relation
        both = []
        for offset in (0.0, 0.5):
            bins = np.floor(shift / _BIN_MM + offset).astype(np.int64) % _BINS
            both.append(np.stack([((pair * _BINS + bins[:, 0]) * _BINS + bins[:, 1]) * _BINS + bins[:, 2], mine], 1))
        return both[0], both[1]


_BINS = 64


def _columns(volumes: Sequence[Marks], start: int) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.float32]]:
    owner = np.repeat(np.arange(start, start + len(volumes)), [len(marks) for marks in volumes])
    frame = np.concatenate([marks.frame for marks in volumes])
    at = np.concatenate([marks.at_mm for marks in volumes]).astype(np.float32)
    return owner, frame, at


def _words(volumes: Sequence[Marks]) -> NDArray[np.uint32]:
    return np.concatenate([marks.bits for marks in volumes]).view("<u4")


def links(
    a: Sequence[FingerprintRow],
    b: Sequence[FingerprintRow] | None,
    same_key: bool = True,
    least_score: float = LEAST_SCORE,
) -> list[Link]:
    """What ties volumes of two lists, or of one list, together; of each pair the strongest evidence.

    Args:
        a, b: b None compares a with itself.
        same_key: whether the pseudonyms of both were made under one key; otherwise they are not compared.
        least_score: of near-copies.
    """
    other = a if b is None else b
    found: dict[tuple[int, int], Link] = {}
    kinds = [(Evidence.SAME_VOXELS, "voxel_hash")]
    if same_key:
        kinds += [(Evidence.SAME_SERIES, "series"), (Evidence.SAME_PATIENT, "subject")]
    for evidence, name in kinds:
        places: dict[str, list[int]] = {}
        for j, row in enumerate(other):
            if value := getattr(row, name):
                places.setdefault(value, []).append(j)
        for i, row in enumerate(a):
            for j in places.get(getattr(row, name), ()):
                if b is not None or i < j:
                    found.setdefault((i, j), Link(i, j, evidence))
    marks = [row.fingerprint for row in a], None if b is None else [row.fingerprint for row in b]
    near = find_copies(*marks, least_score)
    for match in near:
        link = found.get((match.a, match.b), Link(match.a, match.b, Evidence.NEAR_COPY))
        found[match.a, match.b] = Link(link.a, link.b, link.evidence, match)
    return [found[pair] for pair in sorted(found)]


def groups(rows: Iterable[FingerprintRow], aliases: Iterable[tuple[str, str]] = ()) -> dict[str, str]:
    """Of each volume's key the group whose volumes stay on one side of a split: the smallest subject in it.

    Volumes of one subject, of one series, of equal voxels, and certain near-copies are in one group.

    Args:
        aliases: (key, subject) of copies that are not among the rows: whose their volume is, too.
    """
    rows = list(rows)
    parents = list(range(len(rows)))

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = parents[parents[i]]
            i = parents[i]
        return i

    def join(i: int, j: int) -> None:
        i, j = root(i), root(j)
        parents[max(i, j)] = min(i, j)

    first: dict[tuple[str, str], int] = {}
    for i, row in enumerate(rows):
        for name in ("subject", "series", "voxel_hash"):
            if value := getattr(row, name):
                join(first.setdefault((name, value), i), i)
    place_of = {row.key: i for i, row in enumerate(rows)}
    for key, subject in aliases:
        if key in place_of:
            join(first.setdefault(("subject", subject), place_of[key]), place_of[key])
    for match in find_copies([row.fingerprint for row in rows], least_score=CERTAIN_SCORE):
        join(match.a, match.b)
    names: dict[int, str] = {}
    for i, row in enumerate(rows):
        names[root(i)] = min(names.get(root(i), row.subject), row.subject)
    return {row.key: names[root(i)] for i, row in enumerate(rows)}
