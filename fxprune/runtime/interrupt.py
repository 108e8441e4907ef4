"""Ctrl-C before anything has started: while packages are imported there is nothing to tidy up."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130  # exit code, as shells have it for SIGINT


def leave(signum: int, frame: FrameType | None) -> None:
    """End the process with a word. A KeyboardInterrupt would surface inside torch's or numpy's own start-up code."""
    clear = "\r\033[K" if sys.stderr.isatty() else ""
    sys.stderr.write(f"{clear}interrupted\n")
    sys.stderr.flush()
    os._exit(INTERRUPTED)


def leave_at_once() -> None:
    """From here on Ctrl-C ends the process."""
    signal.signal(signal.SIGINT, leave)


def raise_again() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt again, where `leave_at_once` had changed that."""
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
