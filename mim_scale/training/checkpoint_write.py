"""Writing a checkpoint: each writer its share of the state, the first one the record, once all shares are there.

Writers exchange nothing but files, so that each can write in a thread while the ranks compute and exchange gradients.
"""

import contextlib
import errno
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import torch

from mim_scale import disk
from mim_scale.commit import make_folder, remove, write_file, write_part
from mim_scale.errors import CheckpointError
from mim_scale.training.checkpoint import KINDS, PIECES, CheckpointFolder, Files, Piece

_PIECE = 1 << 25
"""Bytes between two looks at whether the save is given up."""
_LOOK_S = 0.02


class GivenUp(Exception):
    """The save was called off: the run has ended."""


@dataclass(frozen=True)
class Share:
    """What one of `count` writers writes of the checkpoint of a step; writer 0 publishes it."""

    step: int
    token: str
    number: int
    count: int
    pieces: Sequence[Piece]
    """fp32, on the CPU."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What else the record tells; of writer 0."""
    sync_journal: Callable[[], None] = lambda: None
    """Called before the checkpoint is published, so that none is newer than the journal; of writer 0."""


def write_share(folder: CheckpointFolder, share: Share, stop: Event) -> int:
    """Write a share; as writer 0 also wait for the others', and publish the checkpoint.

    Args:
        stop: Set by another thread to give up.

    Returns:
        Bytes: of the whole checkpoint for writer 0, of the share for others.

    Raises:
        CheckpointError: the disk does not take it; the checkpoints before it are untouched.
        GivenUp: `stop` was set.
    """
    temporary = folder.unfinished(share.step, share.token)
    try:
        make_folder(folder.path)
        with contextlib.suppress(FileExistsError):
            disk.mkdir(temporary)
        files = _write_files(temporary, share, stop)
        if share.number:
            write_file(_note(temporary, share.number), json.dumps(files).encode())
        else:
            files |= _others(temporary, share.count, stop)
            share.sync_journal()
            folder.publish(share.step, temporary, files, share.facts)
    except OSError as error:
        do = "make room" if error.errno in {errno.ENOSPC, errno.EDQUOT} else "mend that"
        raise CheckpointError(
            f"{folder.path}: the checkpoint of step {share.step} was not saved: {error.strerror or error}; "
            f"{do}, then start the same command again"
        ) from None
    finally:
        if not share.number:
            # Published, or a half that fills the disk.
            remove(temporary)
    return sum(facts["bytes"] for facts in files.values())


def _write_files(temporary: Path, share: Share, stop: Event) -> Files:
    files: Files = {}
    for kind in KINDS:
        part = f"-{share.number:05d}-of-{share.count:05d}" if share.count > 1 else ""
        name = f"{kind}{part}.safetensors"
        digest, size = write_part(
            temporary / name, _safetensors([piece for piece in share.pieces if piece.kind == kind], stop)
        )
        files[name] = {"sha256": digest, "bytes": size}
    return files


def _safetensors(pieces: Sequence[Piece], stop: Event) -> Iterator[bytes | memoryview]:
    """A safetensors file: length of the header, header, then the tensors' bytes one after another."""
    header: dict[str, Any] = {}
    end = 0
    for piece in pieces:
        start, end = end, end + piece.numbers.numel() * 4
        shape = piece.shape if piece.is_whole else piece.numbers.shape
        header[piece.name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    places = {piece.name: [piece.start, *piece.shape] for piece in pieces if not piece.is_whole}
    if places:
        header["__metadata__"] = {PIECES: json.dumps(places, separators=(",", ":"))}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for piece in pieces:
        data = piece.numbers.reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(data), _PIECE):
            if stop.is_set():
                raise GivenUp
            yield data[start : start + _PIECE]


def _note(temporary: Path, number: int) -> Path:
    return temporary / f"share-{number:05d}.json"


def _others(temporary: Path, count: int, stop: Event) -> Files:
    """What the other writers say that they wrote, once all have; their notes are gone then."""
    files: Files = {}
    for number in range(1, count):
        note = _note(temporary, number)
        while not note.is_file():
            if stop.is_set():
                raise GivenUp
            time.sleep(_LOOK_S)
        files |= json.loads(disk.read(note))
        disk.unlink(note)
    return files
