"""Draws what a benchmark of this folder measured: one panel a comparison, one bar a contender.

    python experiments/benchmarks/plots.py FILE.json [...]

The PNG is written beside the JSON. Needs matplotlib (`pip install '.[plot]'`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

UNITS = ("images/s", "us", "ms")  # what a bar can show, the first that a row has


def panels(report: dict, title: str = "") -> Iterator[tuple[str, str, dict[str, dict]]]:
    """(title, unit, rows) of every table in the report, however deep."""
    rows = {name: row for name, row in report.items() if isinstance(row, dict)}
    for unit in UNITS:
        measured = {name: row for name, row in rows.items() if unit in row}
        if measured:
            yield title, unit, measured
            return
    for name, row in rows.items():
        yield from panels(row, f"{title}: {name}" if title else name)


def lines(report: dict) -> Iterator[str]:
    """The same as text: numbers, then what was left out."""
    for title, unit, rows in panels(report):
        yield title
        for name, row in rows.items():
            notes = [f"{value} x {key}" for key, value in _comparisons(row)]
            notes += [f"{row['peak GB']} GB"] if "peak GB" in row else []
            yield f"  {name:36s} {row[unit]:12.2f} {unit:8s} {', '.join(notes)}".rstrip()
    for name, reason in report.get("left out", {}).items():
        yield f"left out: {name}: {reason}"


def _comparisons(row: dict) -> Iterator[tuple[str, float]]:
    if "times the floor" in row:
        yield "the floor", row["times the floor"]
    if row.get("ratio", 1) != 1:
        yield "the first", row["ratio"]


def draw(report: dict, path: Path) -> Path:
    """Writes the figure to `path` and returns it; raises ValueError if nothing was measured."""
    import matplotlib.figure

    tables = list(panels(report))
    if not tables:
        raise ValueError(f"{path}: the report holds no times")
    heights = [1 + 0.35 * len(rows) for _, _, rows in tables]
    figure = matplotlib.figure.Figure(figsize=(9, 0.6 + sum(heights)), layout="constrained")
    figure.suptitle(f"{report['device']}, commit {report['commit']}, {report['date']}", fontsize=10)
    axes = figure.subplots(len(tables), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (title, unit, rows) in zip(axes, tables, strict=True):
        values = [row[unit] for row in rows.values()]
        bars = axis.barh(list(rows), values, color="tab:blue", height=0.7)
        axis.bar_label(bars, [f"{value:,.4g}" for value in values], padding=3, fontsize=8)
        marked = [
            (bar, row["floor"])
            for bar, row in zip(bars, rows.values(), strict=True)
            if "floor" in row
        ]
        for bar, floor in marked:
            low = bar.get_y()
            (line,) = axis.plot([floor] * 2, [low, low + bar.get_height()], "k--")
        if marked:
            axis.legend([line], ["floor"], fontsize=7, frameon=False)
        axis.set_title(f"{title} ({unit})", fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.margins(x=0.12)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    return path


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__.splitlines()[2].strip())
    for name in sys.argv[1:]:
        print(draw(json.loads(Path(name).read_text()), Path(name).with_suffix(".png")))


if __name__ == "__main__":
    main()
