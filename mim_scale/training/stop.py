"""A request to stop, made by a signal and heard by the training loop at the next step.

SIGTERM and SIGUSR1 come from schedulers and launchers, SIGINT from a keyboard. The first one is only remembered; a
second SIGINT ends the process at once. Installed before anything slow, so that a launcher that ends a group of ranks
does not cut off a message.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@contextmanager
def signals_end_the_process() -> Iterator[None]:
    """Inside, the signals do what they do by default, at once: for waits in which nothing can be lost."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)


class StopRequest:
    """Remembers the first signal that asked to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def install(self) -> "StopRequest":
        """Take the signals from now on; only the main thread of a process may."""
        for number in SIGNALS:
            signal.signal(number, self._remember)
        return self

    @property
    def is_set(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
