"""Many frames in one DICOM file: each frame seen as if it were the header of a single slice.

Enhanced and Legacy Converted Enhanced CT keep geometry and rescale in functional groups, shared by all frames or given
for each; what a group does not say is looked for at the top of the file.
"""

from collections.abc import Iterator
from typing import Any

from data_pipeline.reasons import Reason, Rejected
from data_pipeline.sources.dicom_header import Header, sop_class, text, whole

_ENHANCED = frozenset({"1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2"})


class FrameHeader:
    """One frame's view of a header: its own functional groups first, then the shared ones, then the top."""

    def __init__(self, header: Any, own: list[Any], shared: list[Any]) -> None:
        self.file_meta = header.file_meta
        self._places = [*own, *shared, header]

    def get(self, name: str, default: Any = None, /) -> Any:
        """The nearest value of an attribute."""
        return next((place.get(name) for place in self._places if name in place), default)


def is_multi_frame(header: Any) -> bool:
    """Whether a CT file is of a class, or of a count of frames, whose geometry lies in functional groups."""
    is_ct = text(header, "Modality").upper() == "CT"
    return is_ct and (sop_class(header) in _ENHANCED or whole(header, "NumberOfFrames", 1) > 1)


def frame_headers(header: Any) -> list[Any]:
    """A view for each frame of a CT file; for one without functional groups, the header itself.

    Raises:
        Rejected: the groups are not as many as the frames.
    """
    per_frame = header.get("PerFrameFunctionalGroupsSequence") if is_multi_frame(header) else None
    if not per_frame:
        return [header]
    if len(per_frame) != whole(header, "NumberOfFrames", 1):
        raise Rejected(Reason.NO_GEOMETRY, "the functional groups are not as many as the frames")
    shared = [item for group in header.get("SharedFunctionalGroupsSequence") or [] for item in _items(group)]
    return [FrameHeader(header, list(_items(group)), shared) for group in per_frame]


def _items(group: Any) -> Iterator[Any]:
    """The first item of every macro in a functional group."""
    for element in group:
        if element.VR == "SQ" and element.value:
            yield element.value[0]


def check_one_stack(frames: list[Header], num_frames: int) -> None:
    """Raise Rejected where many frames have no places of their own, or make several stacks."""
    if num_frames != len(frames):
        raise Rejected(Reason.MULTI_FRAME, "many frames in one file, and no position for each")
    stacks = len({text(frame, "StackID") for frame in frames})
    if stacks > 1:
        raise Rejected(Reason.MULTI_FRAME, f"{stacks} stacks of frames in one file")
