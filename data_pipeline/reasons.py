"""Why an input is not in the store: one code for each cause, and the exception that carries it.

A rejection is an outcome, not a failure: it ends as one quarantine row and the build goes on. Details name no file,
path or person.
"""

import os
import zlib
from enum import StrEnum


class Reason(StrEnum):
    """The codes that a quarantine row can carry."""

    UNREADABLE = "unreadable"
    ARCHIVE = "archive"
    NO_PIXELS = "no_pixels"
    NOT_CT = "not_ct"
    LOCALIZER = "localizer"
    DERIVED_MAP = "derived_map"
    LABEL_MAP = "label_map"
    SECONDARY_CAPTURE = "secondary_capture"
    MULTI_FRAME = "multi_frame"
    NO_GEOMETRY = "no_geometry"
    MIXED_SIZES = "mixed_sizes"
    MIXED_ORIENTATION = "mixed_orientation"
    MIXED_SERIES = "mixed_series"
    REPEATED_POSITIONS = "repeated_positions"
    MISSING_SLICES = "missing_slices"
    UNEVEN_SPACING = "uneven_spacing"
    GANTRY_TILT = "gantry_tilt"
    TOO_FEW_SLICES = "too_few_slices"
    NOT_3D = "not_3d"
    SHEARED_AFFINE = "sheared_affine"
    SPACING_IMPLAUSIBLE = "spacing_implausible"
    NON_FINITE = "non_finite"
    CONSTANT = "constant"
    HU_IMPLAUSIBLE = "hu_implausible"
    DUPLICATE = "duplicate"
    HELD_OUT = "held_out"
    WORKER_DIED = "worker_died"
    IO_ERROR = "io_error"


PASSING = frozenset({Reason.WORKER_DIED, Reason.IO_ERROR})
"""Reasons that lie in the machine and not in the input: never remembered, so that the next build tries again."""


class Rejected(Exception):
    """An input that cannot become a volume; caught where the input's outcome is recorded."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def reading_failed(error: Exception, what: str) -> Rejected:
    """The rejection for an exception of a reader: errors of the system may pass, all others lie in the file.

    Args:
        error: caught while a file was opened or read.
        what: could not be done, such as "the header cannot be read".
    """
    # Decoders raise OSError without a number for files that are too short or no gzip: those will not pass.
    if isinstance(error, OSError) and error.errno is not None:
        return Rejected(Reason.IO_ERROR, f"{what} ({os.strerror(error.errno)}); the next build tries it again")
    name = "damaged compression" if isinstance(error, zlib.error) else type(error).__name__
    return Rejected(Reason.UNREADABLE, f"{what} ({name})")
