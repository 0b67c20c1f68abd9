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
from data_pipeline.storage.storage import is_remote
from mim_scale.commit import write_file
from mim_scale.errors import SourceError

COLUMNS = ("path", "subject", "role", "dataset", "split")


def written(address: str, sources: Iterable[Source], said: Callable[[Source], Listed | None]) -> Iterator[Written]:
    """One entry for each file or folder of the sources that can be listed; refused ones are left out, but for labels.

    Args:
        address: what all files lie below: an absolute path, or an URL; of no weight where they have their own.
        sources: as found, with subjects in clear.
        said: what the descriptions say about a source.
    """
    numbers: dict[str, str] = {}
    sessions: dict[str, dict[str, str]] = {}
    for source in sources:
        listed = said(source) or Listed()
        role: Role = listed.role or "image"
        if source.problem is not None and role == "image":
            continue
        name = source.subject or listed.subject or ""
        subject = numbers.setdefault(name, f"sub-{len(numbers) + 1:05d}") if name else ""
        folders = sessions.setdefault(name or source.name, {})
        session = folders.setdefault(posixpath.dirname(source.name), f"ses-{len(folders) + 1:02d}")
        for path in _paths(address, source):
            yield Written(path, subject, session, listed.dataset, listed.split, role)


def write_table(path: Path, entries: Sequence[Written]) -> None:
    """Replace the file by a table of these entries, CSV or Parquet by its suffix.

    Raises:
        SourceError: a name is no valid text.
    """
    rows = [(entry.path, entry.subject, entry.role, entry.dataset, entry.split) for entry in entries]
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


def _paths(address: str, source: Source) -> list[str]:
    """Of all slices of a series, else of the file that stands for a source; what each lies at."""
    files = source.files if source.format == "dicom" else source.files[:1]
    if source.urls:
        return [url.rstrip("/") for url in source.urls[: len(files)]]
    top = address.rstrip("/")
    folder = posixpath.dirname(files[0])
    if len(files) > 1 and not is_remote(address):
        inside = {posixpath.join(folder, name) for name in os.listdir(f"{top}/{folder}")}
        if inside == set(files):
            # A series that fills its folder is listed by it.
            return [f"{top}/{folder}" if folder else address]
    return [f"{top}/{file}" for file in files]
