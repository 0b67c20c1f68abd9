"""Sources into a list that other programs or a later build start from: numbers for subjects, paths in clear."""

import csv
import io
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.sources.descriptions.listed import Listed, Role, Written
from data_pipeline.sources.source import Source
from mim_scale.commit import write_file
from mim_scale.errors import SourceError

COLUMNS = ("path", "subject", "role", "dataset", "split")


def written(root: Path, sources: Iterable[Source], said: Callable[[Source], Listed | None]) -> Iterator[Written]:
    """One entry for each file or folder of the sources that can be listed; refused ones are left out, but for labels.

    Args:
        root: the source folder.
        sources: as found, with subjects in clear.
        said: what the descriptions say about a source.
    """
    numbers: dict[str, str] = {}
    sessions: dict[str, dict[str, str]] = {}
    top = Path(os.path.abspath(root))
    for source in sources:
        listed = said(source) or Listed()
        role: Role = listed.role or "image"
        if source.problem is not None and role == "image":
            continue
        name = source.subject or listed.subject or ""
        subject = numbers.setdefault(name, f"sub-{len(numbers) + 1:05d}") if name else ""
        folders = sessions.setdefault(name or source.name, {})
        session = folders.setdefault(posixpath.dirname(source.name), f"ses-{len(folders) + 1:02d}")
        for path in _paths(root, source):
            yield Written(top / path, subject, session, listed.dataset, listed.split, role)


def write_table(path: Path, entries: Sequence[Written]) -> None:
    """Replace the file by a table of these entries, CSV or Parquet by its suffix.

    Raises:
        SourceError: a name is no valid text.
    """
    rows = [(str(entry.path), entry.subject, entry.role, entry.dataset, entry.split) for entry in entries]
    try:
        if path.suffix.lower() == ".parquet":
            columns = list(zip(*rows, strict=True)) or [()] * len(COLUMNS)
            sink = io.BytesIO()
            table = pa.table(dict(zip(COLUMNS, (pa.array(column, pa.string()) for column in columns), strict=True)))
            pq.write_table(table, sink, compression="zstd")
            write_file(path, sink.getvalue())
            return
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
        write_file(path, text.getvalue().encode())
    except UnicodeEncodeError:
        raise SourceError("a name in the source is no valid text, and a table cannot hold it; rename it") from None


def _paths(root: Path, source: Source) -> tuple[str, ...]:
    """A series that fills its folder is listed by it."""
    if source.format != "dicom" or len(source.files) == 1:
        return source.files[:1]
    folder = posixpath.dirname(source.files[0])
    inside = {posixpath.join(folder, name) for name in os.listdir(root / folder)}
    return (folder or ".",) if inside == set(source.files) else source.files
