"""What a command says on stderr."""

import sys


def fail(message: str) -> int:
    """One line; the exit status."""
    print("dis-ssm: error:", " ".join(message.split()), file=sys.stderr)
    return 2


def print_warning(message, *where, **options) -> None:
    """In place of `warnings.showwarning`, one line without the place in the code."""
    print("dis-ssm: warning:", " ".join(str(message).split()), file=sys.stderr)
