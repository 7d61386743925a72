"""Ctrl-C as a wish, not an accident."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Yield a function that is true once SIGINT or SIGTERM has come; a second one acts as it did before.

    Outside the main thread, where no handler can be set, it stays false.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop.is_set
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            # None: a handler that was not set from Python, and cannot be set back from it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def request(number: int, frame: object) -> None:
        del frame
        stop.set()
        restore()
        name = signal.Signals(number).name
        logger.warning("%s: stopping after this iteration and saving; once more aborts at once", name)

    for number in SIGNALS:
        signal.signal(number, request)
    try:
        yield stop.is_set
    finally:
        restore()
