"""Paths as a description writes them, made paths below the source; whatever leads out of it, or nowhere, is refused."""

import json
import os
import posixpath
import re
from collections.abc import Iterable, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from data_pipeline.sources.descriptions.listed import Line, Listed
from mim_scale.errors import SourceError

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))(?:/(.*))?", re.DOTALL)
"""`$nnssl_raw/...`, `${nnUNet_raw}/...`: the folder that holds the folders of all datasets."""
_REMEDY = "mend it, or give a CSV list of the files as the source"


def below(written: str, folder: str = "", roots: Iterable[str] = ()) -> str | None:
    """A written path as a path below the root, with / and without . and ..; None where it leads out of it.

    Args:
        written: as a description spells it.
        folder: what relative paths start at, relative to the root; "" is the root.
        roots: absolute spellings of the root: absolute paths below one of them are cut there. Other absolute paths are
            taken as relative, as tables made by hand have them.
    """
    if not written.strip() or "\0" in written:
        return None
    if written.startswith("/"):
        plain = posixpath.normpath(written).replace("//", "/", 1)
        for root in roots:
            inside = root.rstrip("/")
            if plain == (inside or "/"):
                return "."
            if plain.startswith(inside + "/"):
                return plain[len(inside) + 1 :]
        written = written.strip("/") or "."
    path = posixpath.normpath(posixpath.join(folder, written))
    return None if path == ".." or path.startswith(("../", "/")) else path


@dataclass(frozen=True)
class Place:
    """Where a description stands, and what is there.

    root: the source folder.
    name: of the description, as messages show it: its path relative to the root.
    folder: the one that its relative paths start at, relative to the root; "" is the root.
    known: files that were found below the root; others are looked for on the disk.
    remedy: what to do, at the end of messages.
    """

    root: Path
    name: str
    folder: str
    known: Set[str] = frozenset()
    remedy: str = _REMEDY

    @cached_property
    def dataset(self) -> str:
        """The name of the folder that the description stands in."""
        return posixpath.basename(self.folder) or os.path.basename(os.path.abspath(self.root))

    def refuse(self, what: str) -> NoReturn:
        """Raise the one line that names the description."""
        raise SourceError(f"{self.name}: {what}; {self.remedy}")

    def is_there(self, path: str) -> bool:
        """Whether a file or folder of this relative path is below the root."""
        return path in self.known or os.path.exists(self.root / path)

    def find(self, written: str, where: str) -> str:
        """The relative path of a file or folder that a description names.

        Raises:
            SourceError: it leads out of the source, or nothing is there.
        """
        found = [path for spelling in _spellings(written) for path in self._candidates(spelling)]
        path = next((path for path in found if self.is_there(path)), None)
        if path is None:
            self.refuse(
                f"{where} names neither a file nor a folder below the source"
                + ("" if found else ": its path leads out of it")
            )
        return path

    def enter(self, lines: Iterable[Line]) -> dict[str, Listed]:
        """What is said about each path.

        Raises:
            SourceError: a path is not there, or two lines contradict each other.
        """
        entries: dict[str, Listed] = {}
        for line in lines:
            path = self.find(line.path, line.where)
            before = entries.setdefault(path, line.listed)
            if before != line.listed:
                second = next(name for name in Listed.__slots__ if getattr(before, name) != getattr(line.listed, name))
                self.refuse(f"{line.where} gives a second {second} to one path")
        return entries

    @cached_property
    def _roots(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((os.path.abspath(self.root), os.path.realpath(self.root))))

    def _candidates(self, written: str) -> list[str]:
        roots = self._roots
        variable = _VARIABLE.fullmatch(written)
        if variable is None:
            found = [below(written, self.folder, roots)]
        else:
            own = posixpath.normpath(posixpath.join(roots[0], self.folder))
            given = os.environ.get(variable[1] or variable[2])
            bases = [base for base in (given, posixpath.dirname(own), own) if base]
            # Joined before it is cut: a source that is one dataset lies below its own parent.
            found = [_cut(posixpath.join(base, variable[3] or ""), roots) for base in bases]
        return [path for path in found if path is not None]

    def read(self, file: Path | None = None) -> bytes:
        """The bytes of the description, or of another file that belongs to it."""
        path = file or self.root / self.name
        if path.exists() and not path.is_file():
            # A pipe would keep its reader waiting for ever.
            self.refuse("is no regular file")
        try:
            return path.read_bytes()
        except OSError as error:
            self.refuse(f"cannot be read ({error.strerror})")


def _cut(absolute: str, roots: Iterable[str]) -> str | None:
    path = posixpath.normpath(absolute)
    inside = any(path == root or path.startswith(root.rstrip("/") + "/") for root in roots)
    return below(path, "", roots) if inside else None


def _spellings(written: str) -> tuple[str, ...]:
    """As written, and as Windows means it."""
    return (written, written.replace("\\", "/")) if "\\" in written else (written,)


def parse_json(data: bytes) -> Any:
    """The values of a JSON file.

    Raises:
        ValueError: no UTF-8, no JSON, or a name given twice in one object; the message is part of a line.
    """
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=_once)
    except UnicodeDecodeError:
        raise ValueError("is no UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is no JSON (line {error.lineno})") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        # The last one would win, and the images below the others would be lost.
        raise ValueError("gives one name twice in one object")
    return values
