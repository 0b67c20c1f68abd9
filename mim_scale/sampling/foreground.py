"""Plans that prefer what is not air (2509.07534): boxes drawn again, and masks and children taken there first."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mim_scale.config import ForegroundConfig
from mim_scale.store.foreground import Foreground
from mim_scale.store.geometry import Size3, num_voxels


@dataclass(frozen=True)
class Preference:
    """A volume's foreground, and how strongly it is preferred. Where all is foreground, nothing is changed by it."""

    foreground: Foreground
    config: ForegroundConfig

    def corners(self, draw: Callable[[int, int], NDArray[np.int32]], origin: Size3, size: Size3) -> NDArray[np.int32]:
        """[views, 3] for each view the first corner whose box has its share of foreground, else that of the fullest.

        Args:
            draw: (0, 1) gives the first corners, [1, views, 3]; (1, n) the next ones, [n, views, 3].
            origin: Voxels from the volume's corner to where corners are counted from.
            size: Voxels of the boxes.
        """
        candidates = draw(0, 1)
        full = self._full(candidates, origin, size)
        enough = self.config.box_share * num_voxels(size)
        if self.config.tries > 1 and (full < enough).any():
            others = draw(1, self.config.tries - 1)
            candidates = np.concatenate([candidates, others])
            full = np.concatenate([full, self._full(others, origin, size)])
        # Beyond what is enough one is as good as another: argmax takes the first.
        best = np.minimum(full, np.ceil(enough)).argmax(axis=0)
        return np.asarray(candidates[best, np.arange(len(best))])

    def _full(self, corners: NDArray[np.int32], origin: Size3, size: Size3) -> NDArray[np.int64]:
        found = self.foreground.amounts(corners.reshape(-1, 3) + np.array(origin), size, (1, 1, 1))
        return found.reshape(corners.shape[:2])

    def cells(self, starts: NDArray[Any], size: Size3, cells: Size3) -> NDArray[np.bool_]:
        """[views, cells] whether at least half of each cell is foreground.

        Args:
            starts: [views, 3] voxels from the volume's corner.
            size: Voxels of every view.
        """
        return 2 * self.foreground.amounts(starts, size, cells) >= num_voxels(size)

    def hidden(self, drawn: NDArray[np.uint64], is_foreground: NDArray[np.bool_], count: int) -> NDArray[np.bool_]:
        """[views, cells] the `count` hidden cells of each view: those whose words are largest, of each kind by itself.

        Foreground is taken first, up to its share; then air; and more foreground only where there is not enough air.
        """
        cells = drawn.shape[1]
        total = is_foreground.sum(axis=1, keepdims=True)
        allowed = np.minimum((self.config.hidden_share * total).astype(np.int64), count)
        of_foreground = np.maximum(allowed, count - (cells - total))
        # Air stands before foreground.
        order, place = np.lexsort((drawn, is_foreground)), np.arange(cells)
        air_stop = cells - total
        is_air_hidden = (place < air_stop) & (place >= air_stop - count + of_foreground)
        hidden = np.empty_like(is_foreground)
        np.put_along_axis(hidden, order, is_air_hidden | (place >= cells - of_foreground), axis=1)
        return hidden


def foreground_first(drawn: NDArray[np.uint64], is_foreground: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The permutation that the words draw, along the last axis, but that foreground comes before air."""
    return np.lexsort((drawn, ~is_foreground))
