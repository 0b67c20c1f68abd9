"""BIDS: folders `sub-X`, and below them files `sub-X_..._suffix.nii.gz`; participants.tsv is never opened.

The names alone tell enough, so that trees without dataset_description.json (VerSe is one) are understood, too.
"""

import posixpath
import re
from collections.abc import Iterable

from data_pipeline.sources.descriptions.listed import Listed, Role, listed_as, person
from mim_scale.errors import SourceError

_SUBJECT = re.compile(r"sub-[A-Za-z0-9]+")
_NAMED = re.compile(r"(sub-[A-Za-z0-9]+)(?:_.*)?_([A-Za-z0-9]+)\.(?:nii|nii\.gz|nrrd|nhdr|mha|mhd)", re.IGNORECASE)
_CONTAINERS = frozenset({"rawdata", "sourcedata", "derivatives"})
"""Folders of one dataset that hold the same people again."""
_OTHER = tuple(
    # Anatomy, function, diffusion, field maps, perfusion, angiography, parametric maps, nuclear medicine.
    word
    for words in (
        ("t1w", "t2w", "flair", "pd", "pdw", "t2starw", "t2star", "inplanet1", "inplanet2", "angio", "unit1", "swi"),
        ("bold", "cbv", "sbref", "phase", "dwi", "adc", "fa", "md", "epi", "fieldmap", "phasediff", "phase1", "phase2"),
        ("magnitude", "magnitude1", "magnitude2", "asl", "m0scan", "megre", "mese", "mp2rage", "mpm", "mtr", "mra"),
        ("t1map", "t2map", "r1map", "r2map", "pdmap", "tb1map", "tb1epi", "pet", "spect", "nm", "us", "xray"),
    )
    for word in words
)
_ROLES: dict[str, Role] = {
    # BIDS has no suffix for CT; these are the ones in use.
    **dict.fromkeys(("ct", "cta", "ctpa", "ncct", "cect", "ldct", "hrct"), "image"),
    **dict.fromkeys(("dseg", "probseg", "seg", "mask", "msk", "label", "roi", "lesion"), "label"),
    **dict.fromkeys(_OTHER, "other_modality"),
}


def read_bids(files: Iterable[str]) -> dict[str, dict[str, Listed]]:
    """What the names say, by dataset (its folder; "" is the root), then by file or subject's folder.

    Raises:
        SourceError: a file and its folder name two subjects.
    """
    datasets: dict[str, dict[str, Listed]] = {}
    for file in files:
        folder = _subject_folder(file)
        named = _NAMED.fullmatch(posixpath.basename(file))
        if folder is None or named is None:
            continue
        home, subject = _home(folder), posixpath.basename(folder)
        if named[1] != subject:
            raise SourceError(
                f"{home or '.'}: a file that BIDS names as one subject's lies in another subject's folder; "
                "move it, or give a CSV list of the files as the source"
            )
        dataset = posixpath.basename(home)
        who = person(dataset, subject)
        entries = datasets.setdefault(home, {})
        # The folder speaks for what has other names, such as the DICOM files that the images were made from.
        entries.setdefault(folder, Listed("", who, dataset))
        entries[file] = listed_as(_ROLES.get(named[2].lower(), ""), who, dataset)
    return datasets


def subject_folder_of_sources(datasets: dict[str, dict[str, Listed]], file: str) -> tuple[str, str, Listed] | None:
    """For a file below a dataset's subject folder that holds no named file: dataset, folder, and whose it is."""
    folder = _subject_folder(file)
    if folder is None or (home := _home(folder)) not in datasets:
        return None
    dataset = posixpath.basename(home)
    return home, folder, Listed("", person(dataset, posixpath.basename(folder)), dataset)


def _subject_folder(file: str) -> str | None:
    parts = file.split("/")[:-1]
    index = next((index for index, part in enumerate(parts) if _SUBJECT.fullmatch(part)), None)
    return None if index is None else "/".join(parts[: index + 1])


def _home(subject_folder: str) -> str:
    """The dataset's folder, the same for its raw data, its sources and what was derived from them."""
    parts = subject_folder.split("/")[:-1]
    index = next((index for index, part in enumerate(parts) if part in _CONTAINERS), len(parts))
    return "/".join(parts[:index])
