"""Compressed streams that are cut off, damaged, continued, packed twice or endless."""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mim_scale.store.volume import Volume
from tests.pipeline.corpus.case import Case, accepted, refused
from tests.pipeline.corpus.files import mha, nifti, nrrd

FAMILY = "compression"


def _gz(change: Callable[[bytes], bytes]) -> Callable[[Path, Volume], None]:
    def write(root: Path, good: Volume) -> None:
        (root / "scan.nii.gz").write_bytes(change(gzip.compress(nifti(good), mtime=0)))

    return write


def _packed(pack: Callable[[bytes], bytes]) -> Callable[[Path, Volume], None]:
    def write(root: Path, good: Volume) -> None:
        (root / "scan.nii.gz").write_bytes(pack(nifti(good)))

    return write


def _cut(keep: float) -> Callable[[bytes], bytes]:
    """Keep a share of a stream, or (negative) drop bytes from its end, or (above 1) keep a count of bytes."""
    return lambda data: data[: int(keep) if abs(keep) >= 1 else int(len(data) * keep)]


def _turned(at: float) -> Callable[[bytes], bytes]:
    """One bit turned at a share of the stream, or (negative) a count of bytes before its end."""

    def change(data: bytes) -> bytes:
        raw = bytearray(data)
        raw[int(at) if at <= -1 else int(len(raw) * at)] ^= 4
        return bytes(raw)

    return change


def _split(data: bytes) -> bytes:
    return gzip.compress(data[:9000]) + gzip.compress(data[9000:])


def _second_damaged(data: bytes) -> bytes:
    return gzip.compress(data[:9000]) + _turned(0.5)(gzip.compress(data[9000:]))


def _endless(data: bytes) -> bytes:
    """Voxels, then 200 MB of zeros in 200 KB."""
    packer = zlib.compressobj(9, wbits=31)
    piece = bytes(1 << 20)
    return packer.compress(data) + b"".join(packer.compress(piece) for _ in range(200)) + packer.flush()


def _inner(kind: str, pack: Callable[[bytes], bytes]) -> Callable[[Path, Volume], None]:
    """A NRRD or MetaImage file whose data are packed."""

    def write(root: Path, good: Volume) -> None:
        data = pack(good.voxels.tobytes())
        if kind == "nrrd":
            (root / "scan.nrrd").write_bytes(nrrd(good, {"encoding": "gzip"}, data))
        else:
            changed = {"CompressedData": "True", "CompressedDataSize": str(len(data))}
            (root / "scan.mha").write_bytes(mha(good, changed, data))

    return write


def _nifti_streams() -> list[Case]:
    bad = refused("unreadable")
    cuts = {"to 5 bytes": 5, "to 15 bytes": 15, "to a tenth": 0.1, "to a quarter": 0.25, "to half": 0.5}
    cuts |= {"to nine tenths": 0.9, "of its last 8 bytes": -8, "of its last byte": -1}
    turns = {"in the gzip header": 0.00004, "at a tenth": 0.1, "at a half": 0.5, "at nine tenths": 0.9}
    turns |= {"in the checksum": -6, "in the length": -3}
    streams: list[tuple[str, Callable[[bytes], bytes], str]] = [
        ("trailing zeros", lambda data: data + bytes(1000), accepted()),
        ("trailing garbage", lambda data: data + b"garbage" * 9, accepted()),
        ("an empty second member", lambda data: data + gzip.compress(b""), accepted()),
        ("a second member of more voxels", lambda data: data + gzip.compress(bytes(9000)), bad),
        ("packed twice", gzip.compress, bad),
    ]
    packs: list[tuple[str, Callable[[bytes], bytes], str]] = [
        ("two members", _split, accepted()),
        ("two members, the second damaged", _second_damaged, bad),
        ("stored, not compressed", lambda data: gzip.compress(data, 0), accepted()),
        ("zlib named .gz", zlib.compress, bad),
        ("bzip2 named .gz", bz2.compress, bad),
        ("xz named .gz", lzma.compress, bad),
        ("200 MB of zeros behind the voxels", _endless, bad),
        ("nothing within", lambda data: gzip.compress(b""), bad),
    ]
    return [
        *(Case(FAMILY, f".nii.gz cut {name}", _gz(_cut(keep)), (bad,)) for name, keep in cuts.items()),
        *(Case(FAMILY, f".nii.gz, a bit turned {name}", _gz(_turned(at)), (bad,)) for name, at in turns.items()),
        *(Case(FAMILY, f".nii.gz, {name}", _gz(change), (outcome,)) for name, change, outcome in streams),
        *(Case(FAMILY, f".nii.gz, {name}", _packed(pack), (outcome,)) for name, pack, outcome in packs),
        Case(FAMILY, "a .nii that is gzip", _named_nii, (accepted(),)),
    ]


def _named_nii(root: Path, good: Volume) -> None:
    (root / "scan.nii").write_bytes(gzip.compress(nifti(good)))


def _inner_streams(kind: str, suffix: str, pack: Callable[[bytes], bytes]) -> list[Case]:
    bad = refused("unreadable")
    noise = np.random.default_rng(3).bytes(300)
    packs: list[tuple[str, Callable[[bytes], bytes], str]] = [
        ("whole", pack, accepted()),
        ("cut to half", lambda data: _cut(0.5)(pack(data)), bad),
        ("cut of its last 5 bytes", lambda data: _cut(-5)(pack(data)), bad),
        ("a bit turned at a half", lambda data: _turned(0.5)(pack(data)), bad),
        ("a bit turned in the checksum", lambda data: _turned(-3 if kind == "mha" else -6)(pack(data)), bad),
        ("fewer voxels than promised", lambda data: pack(data[:-2]), bad),
        ("more voxels than promised", lambda data: pack(data + bytes(2)), bad),
        ("no stream at all", lambda data: noise, bad),
        ("200 MB of zeros behind the voxels", lambda data: pack(data + bytes(200 << 20)), bad),
    ]
    return [Case(FAMILY, f"{suffix}, {name}", _inner(kind, change), (outcome,)) for name, change, outcome in packs]


CASES = [
    *_nifti_streams(),
    *_inner_streams("nrrd", ".nrrd", gzip.compress),
    *_inner_streams("mha", ".mha", zlib.compress),
]
