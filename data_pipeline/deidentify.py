"""What may leave a header: an allow-list of acquisition facts, and pseudonyms under a secret key. Pure.

Nothing that a person typed is passed on as it was: manufacturer, model and kernel are matched against vocabularies, and
whatever is not in them becomes "other". Descriptions are looked at for a yes or a no, and left behind.
"""

import hashlib
import hmac
import json
import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from data_pipeline import vocabulary
from mim_scale.store.volume import Volume

_DIGITS = 16
_MOST_THICKNESS_MM = 50.0
_TUBE_KV = (40.0, 200.0)
_NO_CONTRAST = frozenset({"", "NO", "N", "NONE", "NATIVE", "PLAIN", "WITHOUT", "NO CONTRAST", "0", "NOT APPLIED"})
_DESCRIPTIONS = (
    *("BodyPartExamined", "StudyDescription", "SeriesDescription", "ProtocolName", "RequestedProcedureDescription"),
    *("PerformedProcedureStepDescription", "AcquisitionProtocolDescription", "AnatomicRegionSequence"),
)
"""Free text, or codes for it: read for `face_likely` alone."""

_CELL_MM = (5.0, 4.5, 4.5)
"""Volumes are looked at in steps of about this (z, y, x): finer ones say no more about heads."""
_BONE_HU, _AIR_HU, _BRAIN_HU = 200, -400, (-20, 110)
_BRAIN_SHARE = 0.7
"""Of what bone encloses in a slice, at least: chests and pelves hold air, fat and contrast agent."""
_BRAIN_MM2 = (2500.0, 26000.0)
_NECK_MM2 = (4000.0, 30000.0)
_AIRWAY_MM2 = (60.0, 4000.0)
"""Areas in one slice."""
_BORDER_SHARE = 0.1
"""Of the edges of a slice that the body may touch: what is cut off has no size."""
_BRAIN_MM, _NECK_MM = 10.0, 20.0
"""Along the body, together: so many millimetres of slices that show it."""


class Header(Protocol):
    """A data set, or one frame's view of it."""

    def get(self, name: str, default: Any = None, /) -> Any: ...


@dataclass(frozen=True)
class Acquisition:
    """How a scan was made, in words that name nobody; empty or 0 where the source does not say."""

    manufacturer: str = ""
    model: str = ""
    kernel: str = ""
    slice_thickness_mm: float = 0.0
    tube_kv: float = 0.0
    flags: tuple[str, ...] = ()
    """What a user should know: burned_in_text_possible, contrast_agent, face_likely; sorted."""


@dataclass(frozen=True)
class Identity:
    """Whose scan it is, in clear: lives in memory only and is never written, printed or sent."""

    patient: str = field(default="", repr=False)
    study: str = field(default="", repr=False)
    series: str = field(default="", repr=False)

    def __reduce__(self) -> Any:
        """Refuse to become bytes: what can be pickled ends in a queue, a cache or a log."""
        raise TypeError("an identity in clear is not sent or stored: make it a pseudonym first")


@dataclass(frozen=True)
class PseudonymKey:
    """The secret that turns names into pseudonyms: equal ones for equal names and keys, only."""

    secret: bytes = field(repr=False)

    @property
    def check(self) -> str:
        """8 hex digits that tell whether two stores were made under one key."""
        return hmac.new(self.secret, b"mim-scale key check", hashlib.sha256).hexdigest()[:8]

    def digest(self, values: Any) -> str:
        """64 hex digits for JSON values: without the key nobody can tell whether a guess at them is right."""
        return hmac.new(self.secret, json.dumps(values, sort_keys=True).encode(), hashlib.sha256).hexdigest()

    def subject(self, listed: str, patient: str) -> str:
        """Whose a volume is: as a list or description names them, else as its header does; empty where neither does."""
        if listed:
            return self.pseudonym("listed", listed)
        return self.pseudonym("patient", patient) if patient else ""

    def pseudonym(self, kind: str, name: str) -> str:
        """16 hex digits that stand for a name; kind (patient, study, series, source, ...) keeps names apart."""
        message = f"{kind}\n{name}".encode("utf-8", "surrogateescape")
        return hmac.new(self.secret, message, hashlib.sha256).hexdigest()[:_DIGITS]


def acquisition_of_dicom(header: Header) -> Acquisition:
    """How a CT slice was made, from the attributes of the allow-list; all others are left behind.

    Never raises: what cannot be understood counts as not said.
    """
    thickness, kv = _number(header, "SliceThickness"), _number(header, "KVP")
    flags = {
        "burned_in_text_possible": _burned_in_text_possible(header),
        "contrast_agent": _has_contrast_agent(header),
        "face_likely": _names_head(header),
    }
    return Acquisition(
        vocabulary.manufacturer(_text(header, "Manufacturer")),
        vocabulary.model(_text(header, "ManufacturerModelName")),
        vocabulary.kernel(_texts(header, "ConvolutionKernel")),
        round(thickness, 3) if 0 < thickness <= _MOST_THICKNESS_MM else 0.0,
        float(round(kv)) if _TUBE_KV[0] <= kv <= _TUBE_KV[1] else 0.0,
        tuple(sorted(name for name, applies in flags.items() if applies)),
    )


def deidentification_record(key: PseudonymKey) -> dict[str, Any]:
    """What was done to the headers, in the words and codes of DICOM PS3.15 Annex E; for the store's record.

    The stored volumes are not DICOM objects: the profile is followed in substance, its attributes are written here.
    """
    return {
        "method": "attributes by allow-list; names and UIDs as pseudonyms (HMAC-SHA256 under a secret key, 64 bits)",
        "key_check": key.check,
        "method_codes": [_code(*code) for code in _APPLIED],
        "not_applied": [_code(*code) for code in _NOT_APPLIED],
        "patient_identity_removed": "NO",
        "longitudinal_temporal_information_modified": "REMOVED",
    }


_APPLIED = (
    ("113100", "Basic Application Confidentiality Profile"),
    # Of descriptions and the contrast agent, cleaned values remain: two yes-or-no flags.
    ("113105", "Clean Descriptors Option"),
)
_NOT_APPLIED = (
    ("113101", "Clean Pixel Data Option"),
    ("113102", "Clean Recognizable Visual Features Option"),
)
"""Without these nobody may say that the patient's identity was removed "from the Attributes and the Pixel Data"."""


def _code(value: str, meaning: str) -> dict[str, str]:
    return {"code_value": value, "coding_scheme_designator": "DCM", "code_meaning": meaning}


def face_risk(volume: Volume) -> bool:
    """Whether a volume shows a head or a neck, so that a face, or part of one, may be rendered from it.

    Looks at about every fifth millimetre for slices with a brain inside a skull, and for slices with an airway in a
    body as small as a neck. Children's chests pass for necks; a head that is cut off at all sides is missed.
    """
    strides = [max(1, round(cell / step)) for cell, step in zip(_CELL_MM, volume.spacing_mm, strict=True)]
    voxels = volume.voxels[tuple(slice(stride // 2, None, stride) for stride in strides)]
    z_mm, y_mm, x_mm = (step * stride for step, stride in zip(volume.spacing_mm, strides, strict=True))
    mm2 = y_mm * x_mm
    num_brain = int(_shows_brain(voxels, mm2).sum())
    return num_brain * z_mm >= _BRAIN_MM or int(_shows_neck(voxels, mm2).sum()) * z_mm >= _NECK_MM


def _shows_brain(voxels: NDArray[np.int16], mm2: float) -> NDArray[np.bool_]:
    """Of each slice whether bone encloses something in it, and that is mostly brain."""
    # One cell thicker: the thin bone of the temples falls between cells.
    bone = ndimage.binary_dilation(voxels > _BONE_HU, _IN_PLANE)
    inside = ~bone & ~_reached_from_edges(~bone)
    brain = inside & (voxels >= _BRAIN_HU[0]) & (voxels <= _BRAIN_HU[1])
    enclosed = inside.sum((1, 2))
    is_brain: NDArray[np.bool_] = brain.sum((1, 2)) >= _BRAIN_SHARE * enclosed
    return is_brain & _is_within(enclosed * mm2, _BRAIN_MM2)


def _shows_neck(voxels: NDArray[np.int16], mm2: float) -> NDArray[np.bool_]:
    """Of each slice whether it shows a whole body, small, with an airway and bone."""
    air = voxels < _AIR_HU
    around = _reached_from_edges(air)
    body = ~around
    edges = (body[:, 0], body[:, -1], body[:, :, 0], body[:, :, -1])
    is_whole = sum(edge.mean(1) for edge in edges) < _BORDER_SHARE
    has_bone = (voxels > _BONE_HU).sum((1, 2)) * mm2 > _AIRWAY_MM2[0]
    is_small = _is_within(body.sum((1, 2)) * mm2, _NECK_MM2)
    is_neck: NDArray[np.bool_] = is_whole & has_bone & is_small
    return is_neck & _is_within((air & body).sum((1, 2)) * mm2, _AIRWAY_MM2)


_IN_PLANE = np.zeros((3, 3, 3), bool)
_IN_PLANE[1] = ndimage.generate_binary_structure(2, 1)


def _reached_from_edges(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Where each slice's mask hangs together with the slice's edges."""
    regions, count = ndimage.label(mask, _IN_PLANE)
    is_reached = np.zeros(count + 1, bool)
    for edge in (regions[:, 0], regions[:, -1], regions[:, :, 0], regions[:, :, -1]):
        is_reached[edge] = True
    is_reached[0] = False
    reached: NDArray[np.bool_] = is_reached[regions]
    return reached


def _is_within(areas: NDArray[Any], limits: tuple[float, float]) -> NDArray[np.bool_]:
    within: NDArray[np.bool_] = (areas >= limits[0]) & (areas <= limits[1])
    return within


def _burned_in_text_possible(header: Header) -> bool:
    """YES, or nothing said of an image that was made from others.

    PS3.3 C.7.6.1: without the attribute an image may or may not contain text. Slices that a scanner reconstructed do
    not; screens and what workstations made can.
    """
    said = _text(header, "BurnedInAnnotation").upper()
    if said:
        return said != "NO"
    types = {word.upper() for word in _texts(header, "ImageType")}
    return bool(types & {"DERIVED", "SECONDARY"}) or bool(_text(header, "ConversionType"))


def _has_contrast_agent(header: Header) -> bool:
    agent = _text(header, "ContrastBolusAgent").upper()
    return agent not in _NO_CONTRAST or bool(_value(header, "ContrastBolusAgentSequence"))


def _names_head(header: Header) -> bool:
    if _text(header, "RecognizableVisualFeatures").upper() == "YES":
        return True
    return any(vocabulary.names_head(text) for name in _DESCRIPTIONS for text in _texts(header, name))


def _value(header: Header, name: str) -> Any:
    try:
        return header.get(name)
    except Exception:
        # A value that pydicom cannot convert says nothing; its message would quote it.
        return None


def _texts(header: Header, name: str) -> list[str]:
    """The values of an attribute as texts; of a sequence of codes their meanings."""
    found = _value(header, name)
    if found is None:
        return []
    items = [found] if isinstance(found, str) or not hasattr(found, "__iter__") else list(found)
    return [_text(item, "CodeMeaning") if hasattr(item, "get") else str(item).strip("\0 ") for item in items]


def _text(header: Header, name: str) -> str:
    return " ".join(_texts(header, name)).strip()


def _number(header: Header, name: str) -> float:
    """An attribute as a finite number; 0 where it is none."""
    try:
        number = float(_value(header, name))
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return number if math.isfinite(number) else 0.0
