"""Where the secret key of the pseudonyms lives: a file that its owner alone can read, made at first use."""

import os
import secrets
import shlex
import stat
from pathlib import Path

from data_pipeline.deidentify import PseudonymKey
from mim_scale.commit import sync_folder, temporary_beside
from mim_scale.errors import SourceError

VARIABLE = "MIM_SCALE_KEY_FILE"
_BYTES = 32
_MOST_CHARACTERS = 4096


def load_key(path: Path | None = None) -> PseudonymKey:
    """The key in a file: `path`, else the one that $MIM_SCALE_KEY_FILE names, else the user's own, made at first use.

    Args:
        path: a file with 64 hex digits; it must be there.

    Raises:
        SourceError: no such file, open to others, or no key in it.
    """
    named = path or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if named is not None:
        return PseudonymKey(_read(named))
    own = own_key_path()
    try:
        if not os.path.lexists(own):
            _make(own)
    except OSError as error:
        raise SourceError(
            f"{own}: the pseudonym key cannot be made ({error.strerror}); name a key file with --key or ${VARIABLE}"
        ) from None
    return PseudonymKey(_read(own))


def own_key_path() -> Path:
    """Where the user's own key is kept."""
    home = os.environ.get("XDG_CONFIG_HOME", "")
    # The convention says that a relative path there is to be ignored.
    folder = Path(home) if os.path.isabs(home) else Path("~/.config").expanduser()
    return folder / "mim-scale" / "pseudonym.key"


def _make(path: Path) -> None:
    """Write a new key, whole or not at all; where two processes do so at once, the first one's key stays."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(_BYTES) + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            written = file.read(_MOST_CHARACTERS)
    except OSError as error:
        raise SourceError(f"{path}: the pseudonym key cannot be read ({error.strerror}); name another --key") from None
    if mode & 0o077:
        command = f"chmod 600 {shlex.quote(str(path))}"
        raise SourceError(f"{path}: the pseudonym key is open to others (mode {mode:o}); run: {command}")
    try:
        secret = bytes.fromhex(written.decode("ascii"))
    except ValueError:
        secret = b""
    if len(secret) < _BYTES:
        # What is in the file is not shown: it may be a key all the same.
        raise SourceError(
            f"{path}: holds no pseudonym key, expected {2 * _BYTES} hex digits; restore it from its backup, "
            f"or make one: (umask 077; openssl rand -hex {_BYTES} > FILE)"
        )
    return secret
