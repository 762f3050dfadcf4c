"""Progress bars."""

import sys


def bar_interval() -> float:
    """Seconds between two drawings of a progress bar: fewer on a terminal than in a file."""
    return 0.2 if sys.stderr.isatty() else 30.0
