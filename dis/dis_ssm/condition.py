"""What a model is told besides x and t: y, a tensor, a `Condition` of several parts, or None.

Code that only hands y on (samplers, guidance, batches, sets, previews) uses `rows`, `take`, `cat`
and `to`, which serve all three alike. For a tensor they are PyTorch's own operations.

Letters: B rows, one per image; M context tokens; d features; (C, H, W) the shape of an image.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Index: TypeAlias = slice | Tensor | Sequence[int]


@dataclass(frozen=True, eq=False)
class Condition:
    """Parts of a condition, each with one row per image; at least one is given.

    It is a pytree whose leaves are the parts that are given, in the order below. What is made by
    mapping over the tree is not checked again, so its leaves may be anything.

    Args:
        label: (B,) integer, classes.
        vector: (B, d) floating point, such as the embedding of a whole sentence.
        context: tokens to attend to, (B, M, d) floating point, or (B, M) integer, the ids of words
            that the model embeds itself.
        context_mask: (B, M) bool, which tokens of `context` count; all when None. A row without any
            is the null context.
        image: (B, C, H, W) floating point: a map, a masked or a small image.

    Raises:
        ValueError: no part, a part of the wrong shape or dtype, parts whose numbers of rows differ,
            or a mask that does not fit the context.
    """

    label: Tensor | None = None
    vector: Tensor | None = None
    context: Tensor | None = None
    context_mask: Tensor | None = None
    image: Tensor | None = None

    def __post_init__(self):
        parts = self.parts()
        if not parts:
            raise ValueError(f"a Condition needs at least one part of {', '.join(PARTS)}")
        for name, part in parts.items():
            if not any(kind.holds(part) for kind in KINDS[name]):
                found = f"{tuple(part.shape)} {part.dtype}" if isinstance(part, Tensor) else part
                raise ValueError(
                    f"{name} must be {' or '.join(map(str, KINDS[name]))}, got {found!r}"
                )
        first = next(iter(parts))
        for name, part in parts.items():
            if len(part) != len(parts[first]):
                raise ValueError(
                    f"{name} has {len(part)} rows but {first} has {len(parts[first])}: give one "
                    f"row per image"
                )
        if self.context_mask is None:
            return
        if self.context is None:
            raise ValueError("context_mask is given without the context that it masks")
        if self.context_mask.shape != self.context.shape[:2]:
            raise ValueError(
                f"context_mask {tuple(self.context_mask.shape)} does not fit context "
                f"{tuple(self.context.shape)}: give a value for each token"
            )

    def parts(self) -> dict[str, Tensor]:
        """The parts that are given, by name."""
        values = {name: getattr(self, name) for name in PARTS}
        return {name: value for name, value in values.items() if value is not None}

    def __len__(self) -> int:
        """B, the number of rows."""
        return len(next(iter(self.parts().values())))

    def __getitem__(self, index: Index) -> "Condition":
        """These rows of every part, by a slice, a list or a tensor of indices or of bool.

        Raises:
            ValueError: a single integer, which would leave no rows.
        """
        if isinstance(index, int) or (isinstance(index, Tensor) and not index.ndim):
            raise ValueError(f"a Condition is indexed by rows: use [{index}:{index} + 1]")
        rows = index if isinstance(index, slice | Tensor) else list(index)
        return Condition(**{name: part[rows] for name, part in self.parts().items()})

    @staticmethod
    def cat(conditions: Sequence["Condition"]) -> "Condition":
        """All rows, one condition after the other. Where some have a context_mask, the contexts of
        the others count whole.

        Raises:
            ValueError: none is given, or they have different parts.
        """
        if not conditions:
            raise ValueError("there is no condition to concatenate")
        if any(condition.context_mask is not None for condition in conditions):
            conditions = [condition._masked() for condition in conditions]
        names = [tuple(condition.parts()) for condition in conditions]
        for other in names:
            if other != names[0]:
                differing = ", ".join(sorted({*other} ^ {*names[0]}, key=PARTS.index))
                raise ValueError(f"some of the conditions have {differing} and some have not")
        joined = {
            name: torch.cat([getattr(condition, name) for condition in conditions])
            for name in names[0]
        }
        return Condition(**joined)

    def _masked(self) -> "Condition":
        """The same with the context_mask that a context without one stands for."""
        if self.context is None or self.context_mask is not None:
            return self
        everything = torch.ones(
            self.context.shape[:2], dtype=torch.bool, device=self.context.device
        )
        return dataclasses.replace(self, context_mask=everything)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Condition":
        """Every part on `device`."""
        moved = {
            name: part.to(device, non_blocking=non_blocking) for name, part in self.parts().items()
        }
        return Condition(**moved)

    def null(self, *parts: str, null_class: int | Tensor | None = None) -> "Condition":
        """The same with `parts`, all when none is named, replaced by what stands for nothing.

        The label becomes `null_class`; vector, context and image become zeros; the context_mask
        becomes False, given or not, also where only "context" is named. Any other named part that
        is not given stays so.

        Raises:
            ValueError: an unknown part, or a label to be replaced without a `null_class`.
        """
        if unknown := [name for name in parts if name not in PARTS]:
            raise ValueError(f"a Condition has {', '.join(PARTS)} but no {unknown[0]!r}")
        named = {*parts} or {*PARTS}
        if "context" in named:
            named.add("context_mask")
        parts = self._masked().parts() if "context" in named else self.parts()
        nulls = {name: torch.zeros_like(part) for name, part in parts.items() if name in named}
        if "label" in nulls:
            if null_class is None:
                raise ValueError("the null of a label is a class: give null_class")
            label = nulls["label"]
            nulls["label"] = torch.as_tensor(null_class).to(label).expand_as(label)
        return dataclasses.replace(self, **nulls)


def _is_integer(part: Tensor) -> bool:
    return not (part.is_floating_point() or part.is_complex() or part.dtype == torch.bool)


class Kind(NamedTuple):
    """What a part may be: what to call it, the letters of its shape, and the test of its dtype."""

    name: str
    shape: str
    fits: Callable[[Tensor], bool]

    def holds(self, part: object) -> bool:
        """Whether `part` is of this kind."""
        return isinstance(part, Tensor) and part.ndim == len(self.shape) and self.fits(part)

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.shape)})"


KINDS = {
    "label": (Kind("integer", "B", _is_integer),),
    "vector": (Kind("floating point", "Bd", Tensor.is_floating_point),),
    "context": (
        Kind("floating point", "BMd", Tensor.is_floating_point),
        Kind("integer", "BM", _is_integer),
    ),
    "context_mask": (Kind("bool", "BM", lambda part: part.dtype == torch.bool),),
    "image": (Kind("floating point", "BCHW", Tensor.is_floating_point),),
}
PARTS = tuple(KINDS)


def _flatten(condition: Condition) -> tuple[list[Any], tuple[str, ...]]:
    parts = condition.parts()
    return list(parts.values()), tuple(parts)


def _unflatten(leaves: Any, names: tuple[str, ...]) -> Condition:
    condition = object.__new__(Condition)
    given = dict(zip(names, leaves, strict=True))
    for name in PARTS:
        object.__setattr__(condition, name, given.get(name))
    return condition


pytree.register_pytree_node(Condition, _flatten, _unflatten)


# -- y, whatever it is ---------------------------------------------------------------------------

Conditioning: TypeAlias = Tensor | Condition | None


def rows(y: Conditioning) -> int | None:
    """B, how many images y is of; None for None."""
    return None if y is None else len(y)


def take(y: Conditioning, index: Index) -> Conditioning:
    """These rows of y, as `y[index]`; None for None."""
    return None if y is None else y[index]


def cat(ys: Sequence[Conditioning]) -> Conditioning:
    """All rows, one y after the other; None where all are None.

    Raises:
        ValueError: they are not of one kind, or as `Condition.cat`.
    """
    if all(y is None for y in ys):
        return None
    tensors = [y for y in ys if isinstance(y, Tensor)]
    if len(tensors) == len(ys):
        return torch.cat(tensors)
    conditions = [y for y in ys if isinstance(y, Condition)]
    if len(conditions) == len(ys):
        return Condition.cat(conditions)
    kinds = ", ".join(type(y).__name__ for y in ys)
    raise ValueError(f"y must be tensors, Conditions or None throughout, got {kinds}")


def to(y: Conditioning, device: torch.device | str, non_blocking: bool = False) -> Conditioning:
    """y on `device`; None for None."""
    return None if y is None else y.to(device, non_blocking=non_blocking)
