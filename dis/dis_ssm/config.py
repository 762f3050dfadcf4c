"""What a run is made of: frozen, typed sections, read from TOML or JSON, overridden by flags.

    config = load_config("digits")                      # a file, or a name of `named_configs`
    config = resolve(config, channels=1, height=8, width=8, num_classes=10)
    model, diffusion = build_model(config), build_diffusion(config.diffusion)

A key that no section has, or a value of the wrong type, is a ValueError.
"""

import dataclasses
import json
import math
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dis_ssm.system.limits import LARGEST_SIDE, MOST_CLASSES
from dis_ssm.system.nearest import did_you_mean
from dis_ssm.system.reading import parsing, read_json, read_text

Schedule = Literal["linear", "cosine"]
Sampler = Literal["ddpm", "ddim"]  # by name; `dis_ssm.sampling.SAMPLERS` holds the functions
Prediction = Literal["epsilon", "x0", "v", "score"]
RUN_CONFIG = "config.json"  # what a run saves
CONVERTED = "unknown"  # data.source of a converted run
SIZES = ("hidden_size", "depth", "patch_size")
MOST_IMAGES = 10**9  # of a set, a batch or a preview
MOST_BLOCKS = 10**4
MOST_STEPS = 10**12  # of training
MOST_TIMESTEPS = 10**6  # of the diffusion
MOST_MINUTES = 10**6
LARGEST_SEED = 2**63 - 1
FREE = {"free_on_resume": True}  # metadata of a field, or of a whole section


def _free(default: Any) -> Any:
    """A field that may differ when a run is continued: it changes what is written, or how that is
    computed, not what is learned."""
    return field(default=default, metadata=FREE)


def _check(section: object, condition: bool, name: str, remedy: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {getattr(section, name)!r}: {remedy}")


def _finite(section: object) -> None:
    for name, value in vars(section).items():
        finite = not isinstance(value, float) or math.isfinite(value)
        _check(section, finite, name, "must be finite")


def _positive(section: object, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        _check(section, value is None or value > 0, name, "must be positive")


def _at_most(section: object, **limits: int) -> None:
    for name, limit in limits.items():
        value = getattr(section, name)
        values = value if isinstance(value, tuple) else (value,)
        fits = all(v is None or v <= limit for v in values)
        _check(section, fits, name, f"must be at most {limit:,}")


def _fraction(section: object, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        _check(section, 0 <= value < 1, name, "must be at least 0 and below 1")


@dataclass(frozen=True)
class ModelConfig:
    """A preset by `name`, or `hidden_size`, `depth` and `patch_size`; see `dis_ssm.DiS`."""

    name: str | None = None  # preset, such as DiS-S/2
    hidden_size: int | None = None
    depth: int | None = None  # number of blocks, odd
    patch_size: int | None = None
    d_state: int = 16
    expand: int = 2
    d_conv: int = 4
    skip: Literal["concat", "add", "none"] = "concat"
    time_conditioning: Literal["token", "adaln"] = "token"
    class_dropout_prob: float = 0.1  # chance that training replaces a label by the null class
    drop_path: float = 0.0
    num_classes: int | None = None  # None: as many as the data has; 0: ignore the labels
    in_channels: int | None = None  # None: those of the data
    input_size: tuple[int, int] | None = None  # (height, width); None: that of the data

    def __post_init__(self):
        _finite(self)
        _positive(self, *SIZES, "d_state", "expand", "d_conv", "in_channels")
        _fraction(self, "class_dropout_prob", "drop_path")
        _check(self, (self.num_classes or 0) >= 0, "num_classes", "must be 0 or more")
        sides = self.input_size or (1, 1)
        _check(self, min(sides) >= 1, "input_size", "sides must be 1 or more")
        widths = ("hidden_size", "patch_size", "d_state", "expand", "d_conv", "in_channels")
        _at_most(self, **dict.fromkeys((*widths, "input_size"), LARGEST_SIDE))
        _at_most(self, depth=MOST_BLOCKS, num_classes=MOST_CLASSES)


@dataclass(frozen=True)
class DiffusionConfig:
    """See `dis_ssm.diffusion.gaussian.Diffusion`."""

    schedule: Schedule = "linear"
    num_steps: int = 1000
    prediction: Prediction = "epsilon"
    learn_sigma: bool = True
    variance: Literal["fixed_small", "fixed_large"] = "fixed_large"  # when sigma is not learned
    loss_weighting: Literal["none", "epsilon", "elbo"] = "none"

    def __post_init__(self):
        _positive(self, "num_steps")
        _at_most(self, num_steps=MOST_TIMESTEPS)


@dataclass(frozen=True)
class DataConfig:
    """See `dis_ssm.data.open.open_dataset`."""

    source: str = "digits"  # digits, fashion-mnist, a data set on disk, or a latent cache
    image_size: int | None = None  # side in pixels; folders of images need it
    flip: bool = False  # mirror half of the images left to right
    max_corrupt: int = _free(10)  # images that may be unreadable before that is an error
    workers: int | None = _free(None)  # threads that decode images; None: one a core, at most 8
    vae: str | None = _free(None)  # decodes latents to show and score them; None: the cache's
    background: Literal["white", "black", "drop"] = "white"  # of images with alpha; drop: ignore it
    relabel: bool = False  # map the labels that occur to 0, 1, ... where they have holes
    latents: bool | None = None  # whether source is a latent cache; None: as found

    def __post_init__(self):
        _positive(self, "image_size", "workers")
        _at_most(self, image_size=LARGEST_SIDE, workers=LARGEST_SIDE)
        _check(self, self.max_corrupt >= 0, "max_corrupt", "must be 0 or more")


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation: AdamW on the mean loss of a global batch, and what is written when."""

    steps: int = 500_000
    batch_size: int = 128  # images per step
    micro_batch_size: int | None = _free(None)  # images per backward pass; None: all of a process
    lr: float = 1e-4
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    warmup_steps: int = 0  # linear rise that multiplies the schedule
    min_lr: float = 1e-6  # where the cosine ends
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0  # on the weights of linear layers and convolutions only
    grad_clip: float = 1.0  # largest gradient norm; 0: no clipping
    ema_decay: float = 0.9999
    ema_warmup: int = 10  # decay of update n is min(ema_decay, (1 + n) / (ema_warmup + n)); 1: off
    precision: Literal["float32", "bf16"] = "float32"  # bf16: autocast, weights stay float32
    grad_checkpointing: bool = _free(False)  # recompute blocks in the backward pass to save memory
    compile: bool = _free(False)  # torch.compile
    parallel: Literal["ddp", "fsdp"] = _free("ddp")  # over processes: copies, or shards (FSDP2)
    init: str | None = None  # a run or checkpoint whose averaged weights to start from
    wandb: str | None = _free(None)  # a Weights & Biases project to log to as well
    seed: int = 0
    max_nonfinite: int = _free(10)  # stop after so many skipped steps in a row
    log_every: int = _free(10)
    save_every: int = _free(5000)
    keep: int = _free(3)  # newest checkpoints kept
    device: str | None = _free(None)  # None: cuda if there is one, else cpu
    timeout_minutes: float = _free(30.0)  # of a step in many processes, one of which may hang

    def __post_init__(self):
        _finite(self)
        _positive(self, "steps", "batch_size", "micro_batch_size", "lr", "ema_warmup")
        _positive(self, "max_nonfinite", "log_every", "save_every", "keep", "timeout_minutes")
        _at_most(self, steps=MOST_STEPS, warmup_steps=MOST_STEPS, seed=LARGEST_SEED)
        _at_most(self, timeout_minutes=MOST_MINUTES)
        _at_most(self, batch_size=MOST_IMAGES, micro_batch_size=MOST_IMAGES)
        _fraction(self, "ema_decay")
        for name in ("warmup_steps", "min_lr", "weight_decay", "grad_clip", "seed"):
            _check(self, getattr(self, name) >= 0, name, "must be 0 or more")
        _check(self, self.min_lr <= self.lr, "min_lr", f"must not exceed lr {self.lr}")
        _check(self, all(0 <= b < 1 for b in self.betas), "betas", "must be in [0, 1)")


@dataclass(frozen=True)
class SampleConfig:
    """How the EMA model draws: the previews while it trains, the defaults of `dis-ssm sample`."""

    every: int = 5000  # training steps between previews; 0: none
    num: int = 40  # images in a preview
    sampler: Sampler = "ddim"
    steps: int = 50
    eta: float = 0.0
    cfg_scale: float = 1.0  # 1: no guidance
    cfg_channels: int | None = None  # guide the first so many channels; None: all
    cfg_interval: tuple[float, float] | None = None  # guide in these timesteps only
    clip_denoised: bool = False  # clip the predicted image to [-1, 1] at every step
    seed: int = 0
    batch_size: int = 128

    def __post_init__(self):
        _finite(self)
        _positive(self, "num", "steps", "batch_size")
        _at_most(self, num=MOST_IMAGES, batch_size=MOST_IMAGES, steps=MOST_TIMESTEPS)
        _at_most(self, seed=LARGEST_SEED, cfg_channels=LARGEST_SIDE)
        _check(self, (self.cfg_channels or 0) >= 0, "cfg_channels", "must be 0 or more")
        for name in ("every", "eta", "seed"):
            _check(self, getattr(self, name) >= 0, name, "must be 0 or more")
        _check(self, not self.eta or self.sampler == "ddim", "eta", "only ddim has one, set 0")
        _check(self, self.eta <= 1, "eta", "must be at most 1")
        low, high = self.cfg_interval or (0, 0)
        _check(self, low <= high, "cfg_interval", "must be (low, high)")


@dataclass(frozen=True)
class ScoreConfig:
    """Fréchet distance of samples of the EMA model, drawn as [sample] says, while it trains."""

    every: int = 0  # training steps between scores; 0: none
    num: int = 10_000  # images drawn for a score
    extractor: Literal["pixels", "lite0", "inception", "dinov2"] = "inception"
    weights: str | None = None  # file of the extractor's weights
    reference: str | None = None  # statistics or images to compare with; None: data.source
    split: Literal["train", "heldout"] = "train"  # of a reference that is a data set

    def __post_init__(self):
        _check(self, self.every >= 0, "every", "must be 0 or more")
        _check(self, self.num >= 2, "num", "must be 2 or more")
        _at_most(self, num=MOST_IMAGES)


@dataclass(frozen=True)
class Config:
    """A whole run. `out` is the folder RUN that holds everything it writes."""

    out: Path = field(default=Path("runs/dis"), metadata=FREE)
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig, metadata=FREE)
    score: ScoreConfig = field(default_factory=ScoreConfig, metadata=FREE)

    def __post_init__(self):
        text = str(self.out)
        readable = text == text.encode(errors="replace").decode()
        _check(self, readable, "out", "TensorBoard writes to names in UTF-8 only")


def free_on_resume(section: type = Config, prefix: str = "", whole: bool = False) -> set[str]:
    """The keys "section.field" of the fields marked `FREE`, which may differ in a continued run."""
    found = set()
    for entry in dataclasses.fields(section):
        name, free = prefix + entry.name, whole or FREE.items() <= entry.metadata.items()
        if dataclasses.is_dataclass(entry.type):
            found |= free_on_resume(entry.type, f"{name}.", free)
        elif free:
            found.add(name)
    return found


def named_configs() -> dict[str, Path]:
    """The configurations that come with the package (experiments/configs), by name."""
    folder = Path(__file__).parent / "configs"
    return {file.stem: file for file in sorted(folder.glob("*.toml"))}


def load_config(source: str | Path) -> Config:
    """Read a TOML or JSON file, or a name of `named_configs`; what it leaves out is default, but
    for the config.json of a run (see `from_saved`).

    Raises:
        ValueError: there is no such file or name, or a key or value in it is wrong.
    """
    path = Path(source)
    if not path.suffix and not path.is_file():
        named = named_configs()
        if str(source) not in named:
            hint = did_you_mean(str(source), named)
            raise ValueError(f"no file or named configuration {str(source)!r}; {hint}")
        path = named[str(source)]
    if path.suffix == ".json":
        values = read_json(path)
    else:
        text = read_text(path)
        with parsing(f"{path} is not valid TOML"):
            values = tomllib.loads(text)
    try:
        return from_saved(values) if path.name == RUN_CONFIG else from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def from_dict(values: dict[str, Any]) -> Config:
    """Config from nested dictionaries of plain values; the inverse of `to_dict`.

    Raises:
        ValueError: a key is unknown, or a value wrong.
    """
    return _convert(values, Config, "")


def from_saved(values: dict[str, Any]) -> Config:
    """`from_dict` of what a run saved: before data.background there was only "drop".

    Raises:
        ValueError: as `from_dict`.
    """
    data = values.get("data") if isinstance(values, dict) else None
    if isinstance(data, dict):
        values = values | {"data": {"background": "drop"} | data}
    return from_dict(values)


def to_dict(config: Config) -> dict[str, Any]:
    """Nested dictionaries of what JSON can hold."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def to_toml(config: Config) -> str:
    """The config as a TOML file; an unset (None) value is a comment."""
    lines, sections = [], []
    for key, value in to_dict(config).items():
        if isinstance(value, dict):
            sections += ["", f"[{key}]", *(_toml_line(k, v) for k, v in value.items())]
        else:
            lines.append(_toml_line(key, value))
    return "\n".join([*lines, *sections]) + "\n"


def differences(old: Config, new: Config) -> list[str]:
    """Lines "section.field: old -> new" for what changes training (not `free_on_resume`).

    With a constant learning rate more steps change nothing before them, so `train.steps` may grow.
    """
    before, after = flat(to_dict(old)), flat(to_dict(new))
    free = free_on_resume()
    if old.data.latents is None:  # 0.1.0 did not say
        free.add("data.latents")
    if new.train.lr_schedule == "constant" and new.train.steps > old.train.steps:
        free.add("train.steps")
    return [
        f"{key}: {before[key]!r} -> {after[key]!r}"
        for key in before
        if key not in free and before[key] != after[key]
    ]


def resolve(
    config: Config,
    *,
    channels: int,
    height: int,
    width: int,
    num_classes: int,
    latents: bool = False,
) -> Config:
    """Fill what follows from the data.

    Args:
        config: as the user gave it.
        channels, height, width: of what the model is to learn.
        num_classes: of the data; 0 without labels.
        latents: whether the data is a latent cache.

    Raises:
        ValueError: the two contradict each other.
    """
    if config.data.latents not in (None, latents):
        what = "a latent cache" if latents else "not a latent cache"
        raise ValueError(
            f"data.latents is {config.data.latents} but {config.data.source} is {what}: leave it "
            f"unset to follow the data"
        )
    model, found = config.model, {"in_channels": channels, "input_size": (height, width)}
    for name, value in found.items():
        if getattr(model, name) not in (None, value):
            raise ValueError(
                f"model.{name} is {getattr(model, name)} but {config.data.source} has {value}: "
                f"leave it unset to follow the data"
            )
    wanted = num_classes if model.num_classes is None else model.num_classes
    if wanted and (not num_classes or wanted < num_classes):
        raise ValueError(
            f"model.num_classes is {wanted} but {config.data.source} has {num_classes}: leave it "
            f"unset to follow the data, or set 0 to ignore labels"
        )
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(model, num_classes=wanted, **found),
        data=dataclasses.replace(config.data, latents=latents),
    )
    check_guidance(config, config.sample.cfg_scale)
    check_guided_channels(config, config.sample)
    check_steps(config, config.sample)
    return config


def sample_settings(config: Config, **flags: Any) -> SampleConfig:
    """The [sample] section under those flags that are not None.

    Raises:
        ValueError: they do not fit the model, or one another.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    settings = dataclasses.replace(config.sample, **given)
    for name in ("cfg_channels", "cfg_interval"):
        if name in given and settings.cfg_scale == 1:
            raise ValueError(f"{name} has no effect while cfg_scale is 1: give that, too")
    check_guidance(config, settings.cfg_scale)
    check_guided_channels(config, settings)
    check_steps(config, settings)
    return settings


def check_guidance(config: Config, cfg_scale: float) -> None:
    """Check that guidance is not asked of a model that never saw the null class.

    Raises:
        ValueError: it is.
    """
    model = config.model
    if cfg_scale != 1 and not (model.num_classes and model.class_dropout_prob):
        raise ValueError(
            f"cfg_scale {cfg_scale} needs classes and class_dropout_prob > 0, this model has "
            f"{model.num_classes} and {model.class_dropout_prob}: use cfg_scale 1"
        )


def check_guided_channels(config: Config, settings: SampleConfig) -> None:
    """Check that no more channels are to be guided than the model has.

    Raises:
        ValueError: more are.
    """
    wanted, there = settings.cfg_channels, config.model.in_channels
    if wanted is not None and wanted > there:
        raise ValueError(f"cfg_channels {wanted} exceeds the {there} channels of the model")


def check_steps(config: Config, settings: SampleConfig) -> None:
    """Check that sampling takes no more steps than the diffusion has.

    Raises:
        ValueError: it takes more.
    """
    if settings.steps > (most := config.diffusion.num_steps):
        raise ValueError(f"sample.steps {settings.steps} exceeds diffusion.num_steps {most}")


def _convert(value: Any, hint: Any, name: str) -> Any:
    """`value` as the type `hint`, without guessing: a string is no number, 1 is no bool."""
    if dataclasses.is_dataclass(hint):
        return _convert_section(value, hint, name)
    if isinstance(hint, types.UnionType):
        options = [o for o in typing.get_args(hint) if o is not types.NoneType]
        return None if value is None else _convert(value, options[0], name)
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        if value in arguments:
            return value
        raise ValueError(f"{name} is {value!r}: choose one of {', '.join(arguments)}")
    if typing.get_origin(hint) is tuple:
        if isinstance(value, list | tuple) and len(value) == len(arguments):
            return tuple(_convert(v, a, name) for v, a in zip(value, arguments, strict=True))
        raise ValueError(f"{name} is {value!r}: give {len(arguments)} values")
    accepted = {float: (int, float), Path: (str, Path)}.get(hint, (hint,))
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{name} is {value!r}: give {'a path' if hint is Path else hint.__name__}")
    try:
        return hint(value)
    except OverflowError as error:
        raise ValueError(f"{name} is too large: {error}") from error


def _convert_section(values: Any, section: type, name: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{name} is {values!r}: it is a section, give [{name}] and its keys")
    hints = typing.get_type_hints(section)
    prefix = f"{name}." if name else ""
    for key in values:
        if key not in hints:
            raise ValueError(f"unknown key {prefix + key!r}; {_suggest(key, hints, prefix)}")
    return section(**{key: _convert(v, hints[key], prefix + key) for key, v in values.items()})


def _suggest(key: str, hints: dict[str, Any], prefix: str) -> str:
    known = flat(to_dict(Config()))
    elsewhere = [dotted for dotted in known if dotted.rpartition(".")[2] == key]
    if elsewhere:
        return did_you_mean(key, known, near=elsewhere[:1])
    return did_you_mean(key, hints, prefix=prefix)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"section.field": value} of nested dictionaries."""
    found = {}
    for key, value in values.items():
        inner = isinstance(value, dict)
        found |= flat(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return found


def _toml_line(key: str, value: Any) -> str:
    return f"# {key} is not set" if value is None else f"{key} = {json.dumps(value)}"
