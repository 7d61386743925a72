"""Signals as requests to stop cleanly."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Seconds in which further signals are the same request: `timeout` sends two, a closed terminal SIGHUP and SIGTERM.
TOGETHER = 1.0


class Unsaid(Exception):
    """This process ends without a message: another rank has given the reason."""


@contextmanager
def stop_requested(*, said: bool = True) -> Iterator[Callable[[], bool]]:
    """Handle SIGNALS in the block as requests to stop; one that arrives a second later acts as it did outside.

    A signal that is ignored stays so, as SIGHUP under nohup. Outside the main thread, where no handler can be set, the
    function stays false.

    Args:
        said: whether to print a line when a signal arrives; of several ranks, one prints it.

    Yields:
        A function that is true once one of SIGNALS has arrived.
    """
    first: float | None = None

    def stop() -> bool:
        return first is not None

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            # None: a handler that was not set from Python, and cannot be restored from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def request(number: int, frame: object) -> None:
        del frame
        nonlocal first
        if first is None:
            first = time.monotonic()
            name = signal.Signals(number).name
            if said:
                _say(
                    f"{name}: stopping after this iteration and saving; once more after {TOGETHER:.0f} s aborts at once"
                )
        elif time.monotonic() >= first + TOGETHER:
            restore()
            signal.raise_signal(number)

    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, request)
    try:
        yield stop
    finally:
        restore()


def of_several() -> bool:
    """Whether torchrun started this process with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


@contextmanager
def interrupt_ends() -> Iterator[None]:
    """Make Ctrl-C end the process in the block: raised in an import, it may be swallowed and leave half a module."""

    def end(number: int, frame: object) -> None:
        del number, frame
        _say("kfo: aborted")
        os._exit(130)

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _say(line: str) -> None:
    # Not through sys.stderr: the handler may have interrupted a write to it, which is not reentrant.
    with suppress(OSError):
        os.write(2, f"{line}\n".encode())
