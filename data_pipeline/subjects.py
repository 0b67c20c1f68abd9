"""Who a volume is of, as a pseudonym: volumes of one person stay on one side of a split, and nobody is named."""

import csv
import hashlib
import os
import posixpath
from pathlib import Path

from mim_scale.errors import SourceError

TABLE = "subjects.csv"
"""Optional, at the root of a source folder: columns path (a file or folder below it) and subject."""


def pseudonym(kind: str, name: str) -> str:
    """16 hex digits that stand for a name; kind keeps names of different origin apart."""
    return hashlib.sha256(f"mim-scale subject\n{kind}\n{name}".encode("utf-8", "surrogateescape")).hexdigest()[:16]


def read_subjects(root: Path) -> dict[str, str]:
    """The pseudonym of every path that subjects.csv lists; empty where there is none.

    Raises:
        SourceError: the table is there and cannot be used.
    """
    table = root / TABLE
    if not table.is_file():
        return {}
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"{table}: not readable as CSV ({type(error).__name__})") from None
    subjects: dict[str, str] = {}
    for number, row in enumerate(rows, start=2):
        written, subject = (row.get("path") or "").strip(), (row.get("subject") or "").strip()
        if not written or not subject:
            raise SourceError(f"{table}: line {number} lacks a path or a subject; the columns are path,subject")
        path = _path_below(root, written)
        if path is None:
            # A slip of the pen here would put one person on both sides of a split.
            raise SourceError(f"{table}: line {number} names neither a file nor a folder below {root}; mend its path")
        if subjects.setdefault(path, pseudonym("table", subject)) != pseudonym("table", subject):
            raise SourceError(f"{table}: line {number} gives a second subject to one path")
    return subjects


def _path_below(root: Path, written: str) -> str | None:
    """A path as `find_files` writes it; None where nothing is there. Tables made on Windows have backslashes."""
    for spelling in (written, written.replace("\\", "/")):
        path = posixpath.normpath(spelling.strip("/") or ".")
        if not path.startswith("..") and os.path.exists(root / path):
            return path
    return None


def listed_subject(subjects: dict[str, str], files: tuple[str, ...]) -> str | None:
    """The pseudonym that the table gives to one of a source's files, or to the nearest folder above the first."""
    listed = next((subjects[file] for file in files if file in subjects), None)
    folder = files[0]
    while listed is None and folder:
        folder = folder.rpartition("/")[0]
        listed = subjects.get(folder or ".")
    return listed
