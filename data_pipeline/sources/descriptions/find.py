"""All descriptions below a source, joined: what they say about any file; and lists that are a source themselves.

What a table says counts before what a dataset's own description says; of two of a kind the nearer one counts, and the
entry of a file before that of a folder above it.
"""

import os
import posixpath
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.sources.descriptions.addresses import is_address, one_address, read_addresses
from data_pipeline.sources.descriptions.bids import read_bids, subject_folder_of_sources
from data_pipeline.sources.descriptions.listed import Line, Listed
from data_pipeline.sources.descriptions.msd import is_msd, read_msd
from data_pipeline.sources.descriptions.nnssl import NAME as NNSSL
from data_pipeline.sources.descriptions.nnssl import nnssl_lines, read_nnssl
from data_pipeline.sources.descriptions.nnunet import IMAGES, LABELS, is_nnunet, read_nnunet
from data_pipeline.sources.descriptions.place import Place, parse_json
from data_pipeline.sources.descriptions.store import is_store, read_store
from data_pipeline.sources.descriptions.table import SUFFIXES, TABLES, has_paths, table_lines
from mim_scale.errors import SourceError
from mim_scale.store.dataset import MANIFEST

_DATASET = "dataset.json"
DESCRIPTIONS = frozenset({_DATASET, NNSSL, *TABLES})
"""Names of files that describe others."""
READ = DESCRIPTIONS | {MANIFEST}
"""Names of all files that are read for it."""
_VOLUMES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".zarr")
_Entries = dict[str, Listed]


@dataclass(frozen=True)
class Described:
    """What the descriptions of a source say."""

    tables: Mapping[str, Listed] = field(default_factory=dict, repr=False)
    datasets: Mapping[str, Listed] = field(default_factory=dict, repr=False)
    found: tuple[tuple[str, str], ...] = ()
    """Form (table, nnssl, nnunet, msd, bids, store) and relative path of every description, sorted."""

    def of(self, *files: str) -> Listed | None:
        """What is said about a source with these files; None where nothing is.

        Any of its files may be listed, or a folder above the first.
        """
        if not self.tables and not self.datasets:
            return None
        table, dataset = (_look_up(entries, files) for entries in (self.tables, self.datasets))
        return dataset if table is None else table.over(dataset)


@dataclass(frozen=True)
class Listing:
    """A list that is a source itself: only what it names counts."""

    root: Path
    """The folder that everything listed lies below: the list's own where it can be."""
    paths: tuple[str, ...]
    """Files and folders relative to the root, sorted; none lies below another."""
    described: Described
    urls: Mapping[str, str] = field(default_factory=dict, repr=False)
    """The addresses of a list that holds such, by the names that stand for them."""


def find_descriptions(root: Path, files: Iterable[str]) -> Described:
    """Read every description below a source folder.

    Args:
        root: the source folder.
        files: relative paths of what was found below it, with / on every system; a folder that is one source counts
            as a file. Gone through once; only names of volume files and of descriptions are kept.

    Raises:
        SourceError: a description cannot be used as it is; names it, and what to do.
    """
    candidates: list[str] = []
    volumes: set[str] = set()
    members: dict[str, list[str]] = defaultdict(list)
    subject_folders: dict[str, str] = {}
    for file in files:
        folder, _, name = file.rpartition("/")
        if name.startswith("."):
            continue  # what other systems leave beside files, under the same names
        if name in DESCRIPTIONS:
            candidates.append(file)
        elif name.lower().endswith(_VOLUMES):
            volumes.add(file)
            if posixpath.basename(folder) in IMAGES or posixpath.basename(folder) in LABELS:
                members[folder].append(file)
        elif "sub-" in folder and folder not in subject_folders:
            subject_folders[folder] = file
    tables, datasets, found = _read_all(root, candidates, volumes, members)
    bids = read_bids(sorted(volumes))
    for file in sorted(subject_folders.values()):
        if place := subject_folder_of_sources(bids, file):
            bids[place[0]].setdefault(place[1], place[2])
    for home in sorted(bids, key=_depth):
        found.append(("bids", home))
        datasets.append(bids[home])
    return Described(_joined(tables), _joined(datasets), tuple(sorted(found)))


def listing_of(given: Path | str) -> Listing | None:
    """What is given as a source, where it is a list, or the address of one file; None where all below it counts.

    Raises:
        SourceError: the list cannot be used as it is.
    """
    if is_address(str(given)):
        if is_listing(Path(str(given).partition("?")[0])):
            raise SourceError(f"{given}: a list is read from a local file; download it, then give its path")
        single = one_address(str(given))
        return None if single is None else Listing(Path(), (), Described(), single.urls)
    path = Path(given)
    return read_listing(path) if is_listing(path) and not path.is_dir() else None


def read_listing(path: Path) -> Listing:
    """A CSV, TSV or Parquet list, or a pretrain_data.json, as a source.

    Raises:
        SourceError: it cannot be used as it is, or a line names nothing that is there.
    """
    if not path.is_file():
        raise SourceError(f"{path}: does not exist; give a folder, or a list of files")
    own = Path(os.path.abspath(path)).parent
    form = "nnssl" if path.suffix.lower() == ".json" else "table"
    # Paths may lead anywhere here: the root is found after they are known.
    anywhere = Place(Path("/"), str(path), str(own).strip("/"), remedy="mend the list")
    lines = list(_lines(anywhere, path, form))
    if not lines:
        anywhere.refuse("lists nothing")
    if any(is_address(line.path) for line in lines):
        found = read_addresses(anywhere, lines)
        described = Described(found.said, {}, ((form, path.name),))
        return Listing(own, (), described, found.urls)
    entries = anywhere.enter(lines)
    below_own = f"{str(own).strip('/')}/" if own != own.parent else ""
    if all(name.startswith(below_own) for name in entries):
        root = own
    else:
        root = Path("/" + posixpath.commonpath([posixpath.dirname(name) for name in entries]))
    cut = len(str(root).strip("/")) + 1 if root != root.parent else 0
    relative = {name[cut:] or ".": listed for name, listed in entries.items()}
    return Listing(root, _outermost(relative), Described(relative, {}, ((form, path.name),)))


def is_listing(path: Path) -> bool:
    """Whether a path that is given as a source is a list of files, by its name."""
    return path.name == NNSSL or path.suffix.lower() in SUFFIXES


def _lines(place: Place, path: Path, form: str) -> Iterable[Line]:
    if form == "table":
        return table_lines(place, path, needs_subject=False)
    try:
        return nnssl_lines(place, parse_json(place.read(path)))
    except ValueError as error:
        place.refuse(str(error))


def _outermost(paths: Iterable[str]) -> tuple[str, ...]:
    kept: set[str] = set()
    for path in sorted(paths, key=_depth):
        if "." not in kept and not any(folder in kept for folder in _folders_above(path)):
            kept.add(path)
    return tuple(sorted(kept))


def _read_all(
    root: Path, candidates: list[str], volumes: set[str], members: Mapping[str, list[str]]
) -> tuple[list[_Entries], list[_Entries], list[tuple[str, str]]]:
    """Entries of tables and of datasets, nearest to the files first."""
    tables: list[_Entries] = []
    datasets: list[_Entries] = []
    found = []
    order = {**dict.fromkeys(TABLES, 0), NNSSL: 1, _DATASET: 2}
    for file in sorted(candidates, key=lambda name: (-_depth(name), order[posixpath.basename(name)], name)):
        place = Place(root, file, posixpath.dirname(file), volumes)
        if posixpath.basename(file) in TABLES:
            if not place.folder or has_paths(place, root / file):
                tables.append(place.enter(table_lines(place, root / file, needs_subject=True)))
                found.append(("table", file))
        elif described := _read_json(place, members):
            datasets.append(described[1])
            found.append((described[0], file))
    return tables, datasets, found


def _read_json(place: Place, members: Mapping[str, list[str]]) -> tuple[str, _Entries] | None:
    """The form of a JSON description and its entries; None where it is a text of something else."""
    is_nnssl = posixpath.basename(place.name) == NNSSL
    try:
        values = parse_json(place.read())
    except ValueError as error:
        beside = (posixpath.join(place.folder, folder) for folder in (*IMAGES, *LABELS))
        if is_nnssl or any(folder in members for folder in beside):
            place.refuse(str(error))
        return None
    if is_nnssl:
        return "nnssl", read_nnssl(place, values)
    if is_store(values):
        return "store", read_store(place)
    if is_nnunet(values):
        return "nnunet", read_nnunet(place, values, members)
    if is_msd(values):
        return "msd", read_msd(place, values)
    return None


def _joined(parts: Iterable[_Entries]) -> _Entries:
    """One table of entries; what comes first is said first."""
    joined: _Entries = {}
    for entries in parts:
        for path, listed in entries.items():
            before = joined.get(path)
            joined[path] = listed if before is None else before.over(listed)
    return joined


def _look_up(entries: Mapping[str, Listed], files: tuple[str, ...]) -> Listed | None:
    if not entries:
        return None
    said = next((entries[file] for file in files if file in entries), None)
    for folder in _folders_above(files[0]):
        if folder in entries:
            said = entries[folder] if said is None else said.over(entries[folder])
    return said


def _folders_above(path: str) -> list[str]:
    """Nearest first; "." is the root."""
    parts = path.split("/")[:-1]
    return ["/".join(parts[:count]) for count in range(len(parts), 0, -1)] + ["."]


def _depth(path: str) -> int:
    return path.count("/") + 1 if path else 0
