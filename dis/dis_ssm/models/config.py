"""The sizes and options of a DiS model, checked."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Number
from typing import Any

from dis_ssm.system.limits import LARGEST_SIDE, MOST_CLASSES

SKIPS = ("concat", "add", "none")
TIME_CONDITIONINGS = ("token", "adaln")


@dataclass(frozen=True)
class DiSConfig:
    """What a `DiS` is built from; the fields are its arguments, as they were given.

    Raises:
        ValueError: sizes that do not fit together, or an unknown option.
    """

    input_size: int | tuple[int, int] = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 368
    depth: int = 25
    num_classes: int = 0
    learn_sigma: bool = True
    d_state: int = 16
    expand: int = 2
    d_conv: int = 4
    skip: str = "concat"
    time_conditioning: str = "token"
    class_dropout_prob: float = 0.1
    drop_path: float = 0.0
    cond_dim: int | None = None

    def __post_init__(self):
        self._check_counts()
        height, width = self.sides
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"patch_size {self.patch_size} does not divide the input size {height}x{width}"
            )
        if self.depth % 2 == 0:
            raise ValueError(
                f"depth must be odd, got {self.depth}: shallow and deep blocks pair up around a "
                f"middle one"
            )
        if self.num_classes and self.cond_dim is not None:
            raise ValueError("give num_classes or cond_dim, not both")
        for name, known in (("skip", SKIPS), ("time_conditioning", TIME_CONDITIONINGS)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        for name in ("class_dropout_prob", "drop_path"):
            if not 0 <= (p := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {p}")

    def _check_counts(self) -> None:
        for name, side in zip(("height", "width"), self.sides, strict=True):
            _check_count(name, side)
        for name in ("patch_size", "in_channels", "hidden_size"):
            _check_count(name, getattr(self, name))
        _check_count("depth", self.depth, least=0)  # an even depth is told why
        _check_count("num_classes", self.num_classes, least=0, most=MOST_CLASSES)
        for name in ("d_state", "expand", "d_conv"):
            _check_count(name, getattr(self, name))
        if self.cond_dim is not None:
            _check_count("cond_dim", self.cond_dim)

    @property
    def sides(self) -> tuple[int, int]:
        """(height, width)."""
        size = self.input_size
        height, width = (size, size) if isinstance(size, Number) else size
        return height, width

    @property
    def out_channels(self) -> int:
        """C, or 2C with a learned variance."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def conditional(self) -> bool:
        """Whether the model needs y."""
        return self.num_classes > 0 or self.cond_dim is not None

    @property
    def has_null_class(self) -> bool:
        """Whether the table of classes has a row for "no class"."""
        return self.num_classes > 0 and self.class_dropout_prob > 0

    @property
    def adaln(self) -> bool:
        """Whether time and condition modulate each block's norm instead of being tokens."""
        return self.time_conditioning == "adaln"

    @property
    def num_condition_tokens(self) -> int:
        """Tokens before those of the patches: the condition's, if any, and the time's."""
        return 0 if self.adaln else 1 + self.conditional


def _check_count(name: str, value: Any, least: int = 1, most: int = LARGEST_SIDE) -> None:
    if not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be at least {least} and an integer, got {value!r}")
    if value > most:
        raise ValueError(f"{name} must be at most {most:,}, got {value}")
