"""What an object storage says when it refuses, as one line with what to do; and whether trying again may help.

Lines name the storage, never an object: keys can hold the names of people.
"""

import re

from mim_scale.errors import LostObjectError, StorageError

_AWS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_GOOGLE = "GOOGLE_APPLICATION_CREDENTIALS"
_BAD_CREDENTIALS = frozenset(
    {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken", "TokenRefreshRequired"}
)
_OTHER_REGION = frozenset({"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"})
_METADATA = ("169.254.169.254", "metadata.google.internal", "/computeMetadata/", "/latest/api/token")
_UNSIZED = "Content-Length Header missing"
_TLS = ("InvalidCertificate", "InvalidContentType", "InvalidMessage", "HandshakeFailure", "AlertReceived", "tls")


class RefusedObjectError(StorageError):
    """One object cannot be had; others beside it may be.

    Args:
        detail: why, and what to do, without the address.
    """

    def __init__(self, url: str, detail: str) -> None:
        super().__init__(f"{url}: {detail}")
        self.detail = detail


class BrokenObjectError(LostObjectError):
    """One object breaks off at the same byte whenever it is fetched."""


def no_credentials(url: str) -> StorageError:
    """Nothing in the environment says who asks."""
    if url.startswith("gs://"):
        return StorageError(f"{url}: no credentials; set {_GOOGLE} to a service account's file")
    return StorageError(f"{url}: no credentials; set {_AWS}, or AWS_SKIP_SIGNATURE=true for a public bucket")


def refusal(error: Exception, url: str) -> StorageError:
    """The line for an error of the storage library."""
    text = str(error)
    status, code = _status(text), _code(text)
    names = _GOOGLE if url.startswith("gs://") else _AWS
    is_web = url.lower().startswith(("http://", "https://"))
    answers = (
        ("Missing" in text and "Key" in text, no_credentials(url)),
        (any(word in text for word in _METADATA), no_credentials(url)),
        (
            is_web and status in {401, 403},
            RefusedObjectError(url, f"permission denied ({status}): sign the address anew, or ask for access"),
        ),
        (
            is_web and status is not None and 400 <= status < 500 and status not in {404, 408, 410, 412, 429},
            RefusedObjectError(url, f"the web server does not give it ({status}): mend the address, or download it"),
        ),
        (
            _UNSIZED in text,
            RefusedObjectError(url, "the web server does not say how large the file is: download it yourself"),
        ),
        (
            code in _BAD_CREDENTIALS or type(error).__name__ == "UnauthenticatedError" or status == 401,
            StorageError(f"{url}: the credentials are refused ({code or status or 401}); check {names}"),
        ),
        (
            code == "RequestTimeTooSkewed",
            StorageError(f"{url}: this machine's clock and the storage's are too far apart; set the clock"),
        ),
        (code == "NoSuchBucket", StorageError(f"{url}: there is no such bucket; make it, or mend the address")),
        (
            code in _OTHER_REGION or "incorrectly configured region" in text,
            StorageError(f"{url}: the bucket lies in another region; set AWS_REGION"),
        ),
        (
            status == 403 or type(error).__name__ == "PermissionDeniedError",
            RefusedObjectError(url, f"permission denied ({code or 403}): the credentials must allow it, or use others"),
        ),
        (
            isinstance(error, FileNotFoundError) or status in {404, 410},
            LostObjectError(f"{url}: an object that was listed is gone; look again"),
        ),
        (
            type(error).__name__ == "PreconditionError" or status == 412,
            LostObjectError(f"{url}: an object changed since it was listed; look again"),
        ),
        (
            type(error).__name__ == "InvalidPathError",
            StorageError(f"{url}: a key in it is no path (an empty or dotted part, a control character); rename it"),
        ),
    )
    found = next((line for applies, line in answers if applies), None)
    return found or StorageError(f"{url}: {_network(text) or _status_words(status, code)}")


def may_pass(error: Exception) -> bool:
    """Whether the same request can fare better a moment later."""
    text = str(error)
    status = _status(text)
    if status is not None:
        return status >= 500 or status in {408, 429}
    words = ("kind: Connect", "kind: Timeout", "TimedOut", "kind: Request", "kind: Interrupted", "kind: Decode")
    return not any(word in text for word in _TLS) and any(word in text for word in words)


def is_cut(error: Exception) -> bool:
    """Whether a connection ended in the middle of an answer, not in silence."""
    text = str(error)
    return not any(word in text for word in ("kind: Timeout", "TimedOut"))


def _network(text: str) -> str:
    """What happened on the way to the storage; empty where it did answer."""
    answers = (
        ("dns error", "the host name is not known; mend the address, or AWS_ENDPOINT_URL of a bucket"),
        *(
            (word, "TLS is refused: no certificate that is trusted here; set AWS_CA_BUNDLE, or use http://")
            for word in _TLS
        ),
        ("ConnectionRefused", "nobody answers there; mend the address, or start the service"),
        ("kind: Connect", "there is no route to it; check the network and the address"),
        ("kind: Timeout", "no answer in time; check the network, then start again"),
        ("TimedOut", "no answer in time; check the network, then start again"),
        ("BadScheme", "the endpoint is no http:// or https:// address; mend AWS_ENDPOINT_URL"),
        ("kind: Request", "the connection breaks again and again; check the network, then start again"),
        ("kind: Interrupted", "the connection breaks again and again; check the network, then start again"),
    )
    return next((line for word, line in answers if word in text), "")


def _status_words(status: int | None, code: str) -> str:
    if status is not None and status >= 500:
        return f"the storage fails ({code or status}) again and again; start again later"
    return f"an answer that is not understood ({code or status or 'no status'}); is it an object storage?"


def _status(text: str) -> int | None:
    found = re.search(r"status code: (\d{3})|status: (\d{3}),", text)
    return int(found[1] or found[2]) if found else None


def _code(text: str) -> str:
    found = re.search(r"<Code>(\w{1,60})</Code>", text)
    return found[1] if found else ""
