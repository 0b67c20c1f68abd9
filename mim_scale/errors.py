"""The errors a user can meet, as one tree, and the exit code each one ends with.

    MimScaleError            2
    +-- ConfigError          2   a setting is unknown, of the wrong type, or impossible
    +-- SourceError          2   an input folder or file cannot be used
    +-- StoreError           2   a store is missing, uncommitted, or not the one expected
    |   +-- DamagedError     3   bytes that were committed no longer match their checksum
    +-- CheckpointError      2   no checkpoint can be used, or it belongs to another run
    |   +-- DamagedCheckpointError 3  there are some, and none is whole
    |   +-- OtherVersionError 2  a whole one, of another version of the format
    +-- ClusterError         2   Ray or the ranks cannot be reached or started
    |   +-- LostRankError   75   another rank went away, or did not come: start again
    +-- HostError            2   the file system refused
    +-- StorageError         2   an object storage refused or cannot be reached
    |   +-- LostObjectError  2   one object is gone, or is not the one that was listed
    +-- DivergedError        1   the loss is not finite
    +-- BugError             1   our bug on one rank, told to the others

A message is one line: what is wrong, where, what to do.
"""

import atexit
import contextlib
import errno
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn, TextIO

EXIT_REQUEUE = 75
"""The run was asked to stop, saved itself, and goes on when started again."""


_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS}
"""Refusals that come without a path."""


class MimScaleError(Exception):
    """The root of every error that is not our bug."""

    exit_code = 2


class ConfigError(MimScaleError):
    """A setting is unknown, of the wrong type, or impossible beside another."""


class SourceError(MimScaleError):
    """An input folder or file cannot be used."""


class StoreError(MimScaleError):
    """A store is missing, has no commit record, or is not the one expected."""


class DamagedError(StoreError):
    """Committed bytes are missing or no longer match their checksum."""

    exit_code = 3


class CheckpointError(MimScaleError):
    """No checkpoint can be used, or it belongs to another run."""


class DamagedCheckpointError(CheckpointError):
    """A run has checkpoints, and none is whole."""

    exit_code = 3


class OtherVersionError(CheckpointError):
    """A whole checkpoint, written by another version of the format."""


class ClusterError(MimScaleError):
    """Ray, or the other ranks, cannot be reached or started."""


class BugError(MimScaleError):
    """What one rank met is our bug; the other ranks end with it."""

    exit_code = 1


class LostRankError(ClusterError):
    """Another rank went away, or did not come: what was saved stands, and the same command goes on from it."""

    exit_code = EXIT_REQUEUE


class HostError(MimScaleError):
    """The system refused: a path cannot be read or written, the disk is full, or memory is short."""


class StorageError(MimScaleError):
    """An object storage refused, or cannot be reached: what is asked of it next will fare no better."""


class LostObjectError(StorageError):
    """One object is gone, or is not the one that was listed; the others may be as they were."""


class DivergedError(MimScaleError):
    """The loss or the gradient is not finite."""

    exit_code = 1


def host_error(error: OSError) -> HostError | None:
    """What a file system refused, as a line for the user; None where nothing tells a refusal from our bug."""
    if not error.filename and error.errno not in _DISK:
        return None
    where = f"{error.filename}: " if error.filename else ""
    return HostError(f"{where}{error.strerror or error}; mend that and start again")


def exit_with(
    main: Callable[[], int], skip_teardown: bool = False, tell: Callable[[int], None] | None = None
) -> NoReturn:
    """Run main and end the process with its code; a user's mistake is one line, our bug a traceback.

    `skip_teardown` leaves without taking the interpreter down: for programs whose libraries keep threads that may abort
    the process when they meet a dying interpreter, after all work is done and saved. `tell` is called with the code.
    """
    code = _code_of(main)
    if tell is not None:
        tell(code)
    if skip_teardown:
        # All is said and done: an impatient second Ctrl-C must not turn the code into another.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # What was to be done at the end (a token file removed, say) is done; only the taking down is left out.
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        _flush(stream)
    if skip_teardown:
        os._exit(code)
    sys.exit(code)


def _code_of(main: Callable[[], int]) -> int:
    try:
        return main()
    except MimScaleError as error:
        line, code = f"error: {error}", error.exit_code
    except KeyboardInterrupt:
        line, code = "interrupted: start the same command again to go on", 130
    except SystemExit as leaving:
        line, code = "", leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except Exception as error:
        known = host_error(error) if isinstance(error, OSError) else None
        if isinstance(error, MemoryError):
            known = HostError(f"this machine has too little memory ({error or 'it was refused'}); ask for less at once")
        if isinstance(error, BrokenPipeError) and _reader_has_gone(sys.stdout):
            # Whoever read our output has gone: nothing is left to say, and nobody to say it to.
            line, code = "", 141
        elif known:
            line, code = f"error: {known}", known.exit_code
        else:
            traceback.print_exc()
            line, code = "This is a bug of mim-scale: please report it with the lines above.", 1
    if line:
        print(line, file=sys.stderr, flush=True)
    return code


def _reader_has_gone(stream: TextIO) -> bool:
    """Whether a stream is a pipe that nobody reads any more."""
    with contextlib.suppress(OSError, ValueError):
        poller = select.poll()
        poller.register(stream.fileno(), select.POLLOUT)
        return any(event & select.POLLERR for _, event in poller.poll(0))
    return False


def _flush(stream: TextIO) -> None:
    """Write out what a stream holds; where nobody takes it, nothing is expected of it from then on."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
