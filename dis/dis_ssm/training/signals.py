"""The signals that end training early, after the step that they interrupt."""

import os
import signal
import threading
from typing import Any

from dis_ssm.system.distributed import World

SIGNALS = tuple(  # of schedulers (Slurm, submitit), terminals that close, and people
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)


class Stopped(Exception):
    """Training is to end early; raised on all ranks alike.

    Attributes:
        signal: the number of the signal that one of them has received.
    """

    def __init__(self, signal: int):
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal


class StopSignal:
    """`received` is the first of `SIGNALS` inside the `with`; a second SIGINT acts as usual.

    A SIGHUP that the process ignores, as under nohup, stays ignored. Outside the main thread, where
    signals cannot be caught, `received` stays None.
    """

    def __init__(self):
        self.received: int | None = None
        self._previous: dict[int, Any] = {}
        self._terminals: list[int] = []  # which of stdout and stderr are; a closed one does not say

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
            self._previous = {
                s: signal.signal(s, self._receive) for s in SIGNALS if not _ignored_hangup(s)
            }
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def of_any(self, world: World) -> int | None:
        """The number of the signal that any rank has received. Called by all ranks together."""
        return max(number or 0 for number in world.gather(self.received)) or None

    def _receive(self, number: int, frame) -> None:
        self.received = self.received or number
        if number == getattr(signal, "SIGHUP", None):
            self._leave_terminals()
        if number == signal.SIGINT:  # only people insist; schedulers say SIGTERM more than once
            signal.signal(number, self._previous[number])

    def _leave_terminals(self) -> None:
        """Write to nowhere instead of to a terminal that has closed, where writing is an error."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._terminals:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)


def _ignored_hangup(number: int) -> bool:
    hangup = number == getattr(signal, "SIGHUP", None)
    return hangup and signal.getsignal(number) == signal.SIG_IGN
