"""The errors a user can meet, as one tree, and the exit code each one ends with.

    MimScaleError            2
    +-- ConfigError          2   a setting is unknown, of the wrong type, or impossible
    +-- SourceError          2   an input folder or file cannot be used
    +-- StoreError           2   a store is missing, uncommitted, or not the one expected
    |   +-- DamagedError     3   bytes that were committed no longer match their checksum
    +-- CheckpointError      2   no checkpoint can be used, or it belongs to another run
    |   +-- OtherVersionError 2  a whole one, of another version of the format
    +-- ClusterError         2   Ray or the ranks cannot be reached or started
    +-- DivergedError        1   the loss is not finite
    +-- BugError             1   our bug on one rank, told to the others

A message is one line: what is wrong, where, what to do.
"""

import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

EXIT_REQUEUE = 75
"""The run was asked to stop, saved itself, and goes on when started again."""


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


class OtherVersionError(CheckpointError):
    """A whole checkpoint, written by another version of the format."""


class ClusterError(MimScaleError):
    """Ray, or the other ranks, cannot be reached or started."""


class BugError(MimScaleError):
    """What one rank met is our bug; the other ranks end with it."""

    exit_code = 1


class DivergedError(MimScaleError):
    """The loss or the gradient is not finite."""

    exit_code = 1


def exit_with(main: Callable[[], int], skip_teardown: bool = False) -> NoReturn:
    """Run main and end the process with its code; a user's mistake is one line, our bug a traceback.

    `skip_teardown` leaves without taking the interpreter down: for programs whose libraries keep threads that may abort
    the process when they meet a dying interpreter, after all work is done and saved.
    """
    code = _code_of(main)
    if skip_teardown:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _code_of(main: Callable[[], int]) -> int:
    try:
        return main()
    except MimScaleError as error:
        line, code = f"error: {error}", error.exit_code
    except BrokenPipeError:
        # Whoever read our output has gone: nothing is left to say, and nobody to say it to.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # so that the interpreter's last flush finds a reader
        line, code = "", 141
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        line, code = f"error: {where}{error.strerror or error}; mend that and start again", 2
    except KeyboardInterrupt:
        line, code = "interrupted: start the same command again to go on", 130
    except SystemExit as leaving:
        line, code = "", leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except Exception:
        traceback.print_exc()
        line, code = "This is a bug of mim-scale: please report it with the lines above.", 1
    if line:
        print(line, file=sys.stderr, flush=True)
    return code
