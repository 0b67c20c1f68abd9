"""Addresses as a list writes them, made names: what tells a file apart stays, what only opens it (signatures) goes."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

from data_pipeline.sources.descriptions.listed import Line, Listed
from data_pipeline.sources.descriptions.place import Place

SCHEMES = ("s3", "gs", "http", "https")
IMAGES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".dcm", ".zarr")
"""Endings by which a bucket's address means one image, not all that lies below it."""

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_SIGNATURES = frozenset({"x-amz-signature", "x-goog-signature", "signature", "sig"})
_OF_SIGNATURES = frozenset(
    {"awsaccesskeyid", "googleaccessid", "expires", "policy", "key-pair-id", "sp", "st", "se", "spr", "sv", "sr", "sip"}
    | {"skoid", "sktid", "skt", "ske", "sks", "skv"}
)
_TOKENS = frozenset({"token", "access_token", "sas_token"})
_LONGEST_PART = 200
"""Bytes of a part of a name; file systems take 255."""


@dataclass(frozen=True)
class Addressed:
    """What a list of addresses names.

    urls: where each name is fetched from.
    said: what the list says about it.
    """

    urls: dict[str, str] = field(repr=False)
    said: dict[str, Listed] = field(repr=False)


def is_address(written: str) -> bool:
    """Whether an entry of a list is an address, not a path; one that can be read, or not."""
    return _ADDRESS.match(written) is not None


def name_of(url: str) -> str:
    """SCHEME/HOST/PATH, fit for a folder on a disk; parameters of a query come before the last part of it.

    Equal for two addresses of one file that differ in the signature.

    Raises:
        ValueError: it has no host, or no path; the message is part of a line.
    """
    scheme, _, rest = url.partition("://")
    scheme = scheme.lower()
    if scheme not in SCHEMES:
        raise ValueError("holds an address of a kind that is not read; use s3://, gs://, http:// or https://")
    if scheme in {"s3", "gs"}:
        # Keys are literal: nothing in them is escaped, and ? and # are letters.
        host, _, key = rest.partition("/")
        parts, query = key.rstrip("/").split("/"), ""
    else:
        split = _split(url)
        host = split.netloc.rpartition("@")[2].lower()
        parts, query = [unquote(part) for part in split.path.strip("/").split("/")], _lasting(split.query)
    if not host:
        raise ValueError("names no bucket or host")
    if not any(parts):
        raise ValueError("names a bucket or a host, and nothing in it")
    names = [_plain(part) for part in parts]
    if query:
        names.insert(-1, _plain(f"?{query}"))
    return "/".join([scheme, _plain(host), *names])


def shown(name: str) -> str:
    """A name as an address that people read: without what opens it."""
    return name.replace("/", "://", 1)


def read_addresses(place: Place, lines: Iterable[Line]) -> Addressed:
    """Names and addresses of a list that holds nothing else.

    Raises:
        SourceError: a line holds a path, or no address that can be used, or contradicts another.
    """
    found = Addressed({}, {})
    for line in lines:
        if not is_address(line.path):
            place.refuse(f"{line.where} holds a path and other lines hold addresses: give all as one or the other")
        try:
            name = name_of(line.path)
        except ValueError as error:
            place.refuse(f"{line.where} {error}")
        if found.urls.setdefault(name, line.path) != line.path:
            place.refuse(f"{line.where} gives a second address to one file")
        before = found.said.setdefault(name, line.listed)
        if before != line.listed:
            second = next(one for one in Listed.__slots__ if getattr(before, one) != getattr(line.listed, one))
            place.refuse(f"{line.where} gives a second {second} to one address")
    return found


def one_address(url: str) -> Addressed | None:
    """An address that is given as a source, where it means one file or image; None where it means all below it."""
    if not is_address(url):
        return None
    is_web = url.lower().startswith("http")
    try:
        name = name_of(url)
    except ValueError:
        return None
    if not is_web and not name.lower().endswith(IMAGES):
        return None
    return Addressed({name: url}, {})


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:
        raise ValueError("holds no valid address") from None


def _lasting(query: str) -> str:
    """The parameters of a query that say which file is meant, in one order."""
    pairs = parse_qsl(query, keep_blank_values=True)
    names = {name.lower() for name, _ in pairs}
    left_out = _TOKENS | _SIGNATURES | (_OF_SIGNATURES if names & _SIGNATURES else frozenset())
    return urlencode(
        sorted(
            (name, value)
            for name, value in pairs
            if name.lower() not in left_out and not name.lower().startswith(("x-amz-", "x-goog-"))
        )
    )


def _plain(part: str) -> str:
    """One part of a name that means nothing else to a file system, and is not too long for it."""
    if part in {"", ".", ".."}:
        part = "%" + part
    part = part.replace("/", "%2F").replace("\0", "%00")
    data = part.encode("utf-8", "surrogateescape")
    if len(data) <= _LONGEST_PART:
        return part
    # The end is kept: it says of which format a file is.
    end = data[-60:].decode("utf-8", "ignore")
    return f"{sha256(data).hexdigest()[:32]}-{end}"
