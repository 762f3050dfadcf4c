"""What a command says, and the report that it writes."""

import sys
from pathlib import Path
from typing import Any

from dis_ssm.system.files import write_json


def fail(message: str) -> int:
    """Print one line to stderr.

    Returns:
        The exit status, 2.
    """
    print("dis-ssm: error:", " ".join(message.split()), file=sys.stderr)
    return 2


def print_warning(message: Warning | str, *where: Any, **options: Any) -> None:
    """In place of `warnings.showwarning`, one line without the place in the code."""
    print("dis-ssm: warning:", " ".join(str(message).split()), file=sys.stderr)


def check_report_name(out: Path | None) -> None:
    """Accept what `--out` of a report may be.

    Raises:
        ValueError: `out` does not end in .json.
    """
    if out and out.suffix != ".json":
        raise ValueError(f"the report is JSON: give --out a name that ends in .json, not {out}")


def write_report(path: Path, report: dict[str, Any], text: str) -> None:
    """Write `report` to `path`, then print `text` and the path.

    The text is printed also where the file cannot be written, and the file is there also where the
    terminal cannot show the text.
    """
    try:
        write_json(path, report)
    finally:
        print(text)
    print(path)
