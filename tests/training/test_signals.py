"""Every signal that asks a process to end lets training save first."""

import os
import signal
import subprocess
import sys

import pytest

from dis_ssm.training.signals import SIGNALS, StopSignal

pytestmark = pytest.mark.skipif(os.name == "nt", reason="these signals are POSIX's")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_the_signal_is_received_and_nothing_ends(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with StopSignal() as stop:
        signal.raise_signal(number)
        assert stop.received == number
    assert signal.getsignal(number) == before
    assert number in SIGNALS


def test_nohup_keeps_its_meaning():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.received is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


CLOSED = """
import os, pty, sys, time
from dis_ssm.training.signals import StopSignal
pid, terminal = pty.fork()
if pid == 0:
    with StopSignal() as stop:
        print("ready", flush=True)
        while stop.received is None:
            time.sleep(0.01)
        for _ in range(3):
            print("a line", flush=True)
        os._exit(7)
shown = b""
while b"\\n" not in shown:  # all of the line, or closing the terminal would cut it
    shown += os.read(terminal, 100)
os.close(terminal)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_a_closed_terminal_is_no_error():
    assert subprocess.run([sys.executable, "-c", CLOSED], timeout=120).returncode == 7
