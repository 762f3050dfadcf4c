"""Tables of text: for a terminal, and as Markdown."""

from collections.abc import Sequence
from typing import Any


def format_table(
    rows: Sequence[Sequence[Any]], *, right: bool = False, markdown: bool = False
) -> str:
    """Rows as lines of text, without a line break at the end.

    Args:
        rows: equally many cells each, of anything that `str` shows; the first row is the header.
        right: align all columns but the first to the right instead of to the left.
        markdown: write a Markdown table, unpadded, instead of columns two spaces apart.

    Raises:
        ValueError: there are no rows, or they differ in their number of cells.
    """
    texts = [[str(cell) for cell in row] for row in rows]
    if len({len(row) for row in texts}) != 1:
        raise ValueError(f"rows have {[len(row) for row in texts]} cells: need as many in each")
    if markdown:
        lines = [f"| {' | '.join(row)} |" for row in texts]
        lines.insert(1, "|---" + ("|---:" if right else "|---") * (len(texts[0]) - 1) + "|")
        return "\n".join(lines)
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right and i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in texts
    )
