"""The names of a run's classes, RUN/classes.json: a list, whose order is that of the labels."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from dis_ssm.system.files import write_json
from dis_ssm.system.nearest import did_you_mean
from dis_ssm.system.reading import read_json

CLASSES = "classes.json"


def keep_class_names(run: Path, names: Sequence[str]) -> None:
    """Write the names of a new run; a warning where those of a continued one differ."""
    known = class_names(run)
    if known and list(known) != list(names):
        changed = next(
            (f"{a!r} is now {b!r}" for a, b in zip(known, names, strict=False) if a != b),
            f"{len(known)} are now {len(names)}",
        )
        warnings.warn(f"{run} was trained on other classes: {changed}", stacklevel=2)
    elif names and not known:
        write_json(run / CLASSES, list(names))


def class_names(run: Path) -> tuple[str, ...]:
    """The names that `run` keeps; none if it has none, as runs of version 0.1.0.

    Raises:
        ValueError: the file is damaged.
    """
    path = run / CLASSES
    if not os.path.lexists(path):
        return ()
    names = read_json(path)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} is not a list of names: restore it, or remove it")
    return tuple(names)


def class_labels(wanted: Sequence[str], names: Sequence[str], count: int) -> tuple[int, ...]:
    """The labels 0 to count - 1 that `wanted`, names or numbers, mean.

    What is both, the number of one class and the name of another, is taken as the number, with a
    warning.

    Raises:
        ValueError: one is neither; it says which names are near.
    """
    return tuple(_label(one, names, count) for one in wanted)


def grid_caption(labels: Tensor | None, columns: int, names: Sequence[str]) -> str:
    """The names of a grid's columns where each is one class, else of its images, row by row."""
    if labels is None or not names:
        return ""
    order = labels.tolist()
    first = order[:columns]
    if all(label == first[i % columns] for i, label in enumerate(order)):
        return f"columns: {', '.join(_name(label, names) for label in first)}"
    return f"images, row by row: {', '.join(_name(label, names) for label in order)}"


def _name(label: int, names: Sequence[str]) -> str:
    return names[label] if label < len(names) else str(label)


def _label(wanted: str, names: Sequence[str], count: int) -> int:
    named = names.index(wanted) if wanted in names else None
    number = int(wanted) if wanted.isascii() and wanted.isdecimal() else None
    if number is not None and number < count:
        if named not in (None, number):
            warnings.warn(
                f"class {number} is {names[number]!r}; the class named {wanted!r} is {named}",
                stacklevel=3,
            )
        return number
    if named is not None and named < count:
        return named
    if number is not None or not names:
        hint = "" if names else "; this run keeps no names of classes, give numbers"
        raise ValueError(f"class {wanted} is not one of the model's {count} classes{hint}")
    raise ValueError(f"no class is named {wanted!r}: {did_you_mean(wanted, names)}")
