"""What a description says about one file, and how two that speak of the same file are joined."""

import re
from dataclasses import dataclass, field
from typing import Literal

from data_pipeline.reasons import Reason

Role = Literal["", "image", "label", "mask", "other_modality"]
"""Empty where the description leaves it to the file itself."""
Problem = tuple[Reason, str]

SPLITS = ("", "train", "val", "test")

LABEL: Problem = (Reason.LABEL_MAP, "a label map by its dataset's description")
MASK: Problem = (Reason.LABEL_MAP, "a mask by its dataset's description")
NOT_CT: Problem = (Reason.NOT_CT, "another modality than CT by its dataset's description")
SEVERAL: Problem = (Reason.NOT_3D, "CT and other modalities in one file by its dataset's description")
_OF_ROLE: dict[str, Problem] = {"label": LABEL, "mask": MASK, "other_modality": NOT_CT}

_CT = frozenset({"ct", "cta", "ctpa", "ncct", "cect", "ldct", "hrct", "cbct"})
_OTHER = frozenset(
    {"pet", "pt", "suv", "spect", "nm", "mr", "mri", "us", "t1", "t1w", "t2", "t2w", "flair", "adc", "dwi", "xray"}
)


@dataclass(frozen=True, slots=True)
class Listed:
    """What is said about one file or folder.

    role: label, mask and other_modality are no inputs of a build.
    subject: names one person throughout the source, in clear: it must be made a pseudonym before it goes anywhere.
    dataset: name of the dataset, in clear.
    split: train, val, test, or empty.
    problem: why it is refused without a look at it.
    """

    role: Role = ""
    subject: str | None = field(default=None, repr=False)
    dataset: str = field(default="", repr=False)
    split: str = ""
    problem: Problem | None = None

    def over(self, other: "Listed | None") -> "Listed":
        """What this one says, and where it is silent what the other says."""
        if other is None:
            return self
        spoken = self if self.role else other
        return Listed(
            spoken.role,
            self.subject or other.subject,
            self.dataset or other.dataset,
            self.split or other.split,
            spoken.problem,
        )


@dataclass(frozen=True, slots=True)
class Line:
    """One entry of a description: its place, for messages; the path as written; what is said about it."""

    where: str
    path: str = field(repr=False)
    listed: Listed


@dataclass(frozen=True, slots=True)
class Written:
    """One image of a list that is written; only its path is in clear.

    path: absolute, or an address.
    subject, session: pseudonyms, fit for file names; a subject may be empty.
    """

    path: str = field(repr=False)
    subject: str
    session: str
    dataset: str = field(default="", repr=False)
    split: str = ""
    role: Role = "image"


def listed_as(role: Role, subject: str | None = None, dataset: str = "", split: str = "") -> Listed:
    """A Listed with the problem that its role brings."""
    return Listed(role, subject, dataset, split, _OF_ROLE.get(role))


def role_of_modality(name: str) -> Role:
    """image for CT, other_modality for any other word, nothing for none: PET/CT is not CT."""
    text = name.casefold().strip()
    words = set(re.split(r"[^a-z0-9]+", text)) - {""}
    if not words:
        return ""
    is_ct = bool(words & _CT) or "computed tomography" in text
    return "image" if is_ct and not words & _OTHER else "other_modality"


def person(dataset: str, name: str) -> str:
    """A subject's name that two datasets with equal numbers do not share."""
    return f"{dataset}\n{name}"
