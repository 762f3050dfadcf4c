"""The sizes and options of a DiS model, checked."""

from __future__ import annotations

from dataclasses import dataclass

from dis_ssm.models.checks import check_count
from dis_ssm.models.patches import PatchGrid
from dis_ssm.system.limits import MOST_CLASSES

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
        _ = self.grid  # refuses sizes that do not fit together
        for name in ("in_channels", "hidden_size", "d_state", "expand", "d_conv"):
            check_count(name, getattr(self, name))
        check_count("depth", self.depth, least=0)  # an even depth is told why
        check_count("num_classes", self.num_classes, least=0, most=MOST_CLASSES)
        if self.cond_dim is not None:
            check_count("cond_dim", self.cond_dim)
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

    @property
    def grid(self) -> PatchGrid:
        """The patches of the input."""
        return PatchGrid.of(self.input_size, self.patch_size)

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
