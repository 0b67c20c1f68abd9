"""What a corpus must not contain, and which of its volumes are that: `--hold-out`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.deidentify import PseudonymKey
from data_pipeline.duplicates import Evidence
from data_pipeline.leakage import Side, find_leaks, load_side
from data_pipeline.overlay import NO_VOXELS, Voxels, score_of
from mim_scale.errors import SourceError
from mim_scale.store.manifest import FingerprintRow


@dataclass(frozen=True)
class Held:
    """Why a volume is held out."""

    evidence: Evidence
    key: str
    """Of the held-out image."""
    list_name: str
    """Which hold-out it is in: its place in the order given, and the start of its digest."""
    score: float


class HoldOut:
    """Images that a corpus must not contain."""

    def __init__(self, sides: Sequence[Side]) -> None:
        self.sides = tuple(sides)

    @classmethod
    def load(cls, paths: Iterable[Path], key: PseudonymKey | None = None) -> "HoldOut":
        """From stores, folders, images or lists of fingerprints.

        Raises:
            SourceError: one of them is missing, or an image in it cannot be read: what is not read is not kept out.
            StoreError: a store that cannot be used.
        """
        sides = []
        for path in paths:
            side = load_side(path, key)
            if side.refused:
                reason, detail = side.refused[0]
                raise SourceError(
                    f"{path}: {len(side.refused)} inputs to hold out cannot be read (first: {reason}: {detail}); "
                    "mend or remove them, so that nothing is missed"
                )
            sides.append(side)
        return cls(sides)

    @property
    def names(self) -> tuple[str, ...]:
        """Of each hold-out: its place in the order given, and the start of its digest."""
        return tuple(f"hold-out {place} ({side.digest[:8]})" for place, side in enumerate(self.sides, start=1))

    def matches(
        self, rows: Sequence[FingerprintRow], key_check: str = "", voxels: Voxels = NO_VOXELS
    ) -> dict[str, Held]:
        """Of the volumes that are held out, by key, the strongest evidence why.

        Args:
            key_check: of the key of the rows' pseudonyms; patients and series are compared where it is the same.
            voxels: of the volumes: they confirm near-copies or refute them, where the hold-out has voxels too.
        """
        own = Side("store", tuple(rows), key_check, voxels=voxels)
        found: dict[str, Held] = {}
        order = list(Evidence)
        for name, side in zip(self.names, self.sides, strict=True):
            for key, held_key, link in find_leaks(own, side)[0]:
                held = Held(link.evidence, held_key, name, score_of(link))
                before = found.get(key)
                if before is None or (order.index(held.evidence), -held.score) < (
                    order.index(before.evidence),
                    -before.score,
                ):
                    found[key] = held
        return found
