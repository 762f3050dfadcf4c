"""What a model costs, counted from the model itself: floating-point operations and memory."""

from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from dis_ssm.build import build_model
from dis_ssm.config import Config
from dis_ssm.costs.formulas import register_formulas
from dis_ssm.models.mixer import BiMamba, FusedMixer
from dis_ssm.system.distributed import World

Size = tuple[int, int]  # height, width

SPECIAL = {"dis_ssm.conv": "convolutions", "dis_ssm.scan": "scan", "aten.bmm": "scores"}
PARTS = ("blocks", "skips", "scores", "convolutions", "scan", "rest")

TRAINING_PASSES = 3  # a backward pass costs two forward ones
STATE_BYTES = {"weights": 4, "gradients": 4, "average": 4, "AdamW": 8}  # per parameter

# Dense peaks in FLOP/s by precision, from NVIDIA's data sheets; float32 is TensorFloat-32's,
# which PyTorch leaves off by default, so that its utilisation there reads low.
PEAKS = {
    "H200": {"bf16": 989e12, "float32": 495e12},
    "H100 PCIe": {"bf16": 756e12, "float32": 378e12},
    "H100": {"bf16": 989e12, "float32": 495e12},
    "A100": {"bf16": 312e12, "float32": 156e12},
    "L40S": {"bf16": 362e12, "float32": 183e12},
    "RTX 4090": {"bf16": 165e12, "float32": 83e12},
}


def forward_flops(config: Config) -> dict[str, int]:
    """Operations of one image's forward pass, by kind; a multiply-add counts as two.

    Counted by PyTorch on tensors without storage, each operator by its formula: matrix products
    and convolutions as PyTorch counts them, our scans and depthwise convolutions as
    `dis_ssm.costs.formulas` states. Elementwise operations are left out, as everywhere.
    """
    with torch.device("meta"):
        model = count_kernels(build_model(config)).eval()
    with flop_counter() as counter, torch.no_grad():
        model(*_inputs(config, "meta", 1))
    counts = counter.get_flop_counts()["Global"]
    return {str(operator): count for operator, count in counts.items()}


def flop_counter() -> FlopCounterMode:
    """torch's counter, which knows the package's operators too; it prints nothing."""
    register_formulas()
    return FlopCounterMode(display=False)


def count_kernels(model: nn.Module) -> nn.Module:
    """The model, its mixers bound to the kernels' operators: on the meta device they need no
    compiler, so that the count is the same on every machine, whichever backend it would run."""
    for mixer in model.modules():
        if isinstance(mixer, BiMamba):
            mixer.forward = partial(_fused, mixer)
    return model


def _fused(mixer: BiMamba, h: Tensor) -> Tensor:
    return FusedMixer.apply(h, *mixer.tensors().flat(), False)


def training_flops(config: Config) -> int:
    """Operations of one image's training step, recomputation not counted."""
    return TRAINING_PASSES * sum(forward_flops(config).values())


def kept_bytes(model: nn.Module, *inputs: Tensor) -> int:
    """What autograd keeps between forward and backward pass, parameters and inputs not counted."""
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(*inputs)
    for tensor in (*model.parameters(), *model.buffers(), *inputs):
        if tensor is not None:
            kept.pop(tensor.untyped_storage()._cdata, None)
    del out
    return sum(size for size, _ in kept.values())


def training_memory(config: Config) -> tuple[int, int]:
    """Bytes of one process that trains alone: all that does not grow with the batch (the model's
    state, and casts of weights that autograd keeps), and what it keeps for each image."""
    with FakeTensorMode():
        model = build_model(config).train()
        model.set_grad_checkpointing(config.train.grad_checkpointing)
        half = config.train.precision == "bf16"
        with torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False):
            one, two = (kept_bytes(model, *_inputs(config, "cpu", n)) for n in (1, 2))
    state = sum(STATE_BYTES.values()) * sum(p.numel() for p in model.parameters())
    return state + 2 * one - two, two - one


def peak_flops(precision: str, world: World) -> float | None:
    """Peak FLOP/s of all devices together at `precision`, a key of `PEAKS`; None if not known."""
    if world.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(world.device)
    found = next((peak[precision] for key, peak in PEAKS.items() if key in name), None)
    return found and found * world.size


def _inputs(config: Config, device: str, n: int) -> tuple[Tensor, Tensor, Tensor | None]:
    model = config.model
    x = torch.empty(n, model.in_channels, *model.input_size, device=device)
    y = torch.zeros(n, dtype=torch.int64, device=device) if model.num_classes else None
    return x, torch.zeros(n, device=device), y


# ---- by part, of DiS and of its peers ------------------------------------------------------


def multiply_adds(model: nn.Module, x: Tensor, t: Tensor, y: Tensor | None) -> dict[str, int]:
    """Multiply-adds of one forward pass on the meta device, by part; the model is used up.

    blocks: matrix products inside the blocks; skips: the long skips' linear layers; scores: QKᵀ
    and its product with V; convolutions: the depthwise ones of both directions; scan: both
    directions, 7/2 for each token, channel and state, the exponential counted as one operation;
    rest: patches, time, class, decoder. Elementwise operations and norms are left out.
    """
    known, spent = {}, Counter()
    peer = hasattr(model, "transformer_blocks")
    blocks = model.transformer_blocks if peer else count_kernels(model).blocks
    embedders = blocks[0].norm1.emb if peer else None
    for i, block in enumerate(blocks):
        blocks[i] = _Once(block, known, spent)
    with flop_counter() as counter, torch.no_grad():
        _run_dit(model, embedders, x, t, y) if peer else model(x, t, y)
    everything = _by_part(counter)
    spent["rest"] = everything["blocks"] - sum(
        cost["blocks"] + cost["skips"] for _, cost in known.values()
    )
    return {part: spent[part] // 2 for part in PARTS}


class _Once(nn.Module):
    """A block that runs only if none with parameters of the same shapes has run: it costs the same
    and, on the meta device, returns the same."""

    def __init__(self, block: nn.Module, known: dict, spent: Counter):
        super().__init__()
        self.block, self.known, self.spent = block, known, spent

    def forward(self, *arguments, **options):
        shapes = tuple(p.shape for p in self.block.parameters())
        if shapes not in self.known:
            with flop_counter() as counter:
                out = self.block(*arguments, **options)
            self.known[shapes] = out, _by_part(counter, f"{type(self.block).__name__}.skip_linear")
        out, cost = self.known[shapes]
        self.spent.update(cost)
        return out


def _by_part(counter: FlopCounterMode, skip: str = "") -> Counter:
    """FLOPs of the parts; all linear layers are "blocks", but for the module named `skip`."""
    counts, found = counter.get_flop_counts(), Counter()
    for operator, flops in counts.get("Global", {}).items():
        attention = "scaled_dot_product" in str(operator)
        found[SPECIAL.get(str(operator), "scores" if attention else "blocks")] += flops
    found["skips"] = sum(counts.get(skip, {}).values())
    found["blocks"] -= found["skips"]
    return found


def _run_dit(
    model: nn.Module, embedders: nn.Module, x: Tensor, t: Tensor, y: Tensor | None
) -> None:
    """The linear layers of diffusers' forward pass, at any size; time and class embedded once."""
    y = torch.zeros_like(t, dtype=torch.int64) if y is None else y
    condition = embedders(t, y)
    embedders.forward = lambda *arguments, **options: condition
    h = model.pos_embed.proj(x).flatten(2).mT
    for block in model.transformer_blocks:
        h = block(h, timestep=t, class_labels=y)
    model.proj_out_1(condition)
    model.proj_out_2(h)


class _Unset(TorchFunctionMode):
    """Models are made on the meta device, where drawing their parameters only takes time."""

    DRAWS = ("uniform_", "normal_", "zeros_", "ones_", "trunc_normal_", "constant_")

    def __torch_function__(self, function, types, arguments=(), options=None):
        name = getattr(function, "__name__", "")
        if name.endswith(self.DRAWS) and (arguments or options):
            return arguments[0] if arguments else options["tensor"]
        return function(*arguments, **(options or {}))


def sketch(make: Callable[..., nn.Module], *arguments) -> nn.Module:
    """`make(*arguments)`, on the meta device and without values."""
    with torch.device("meta"), _Unset():
        return make(*arguments).eval()


def count(model: nn.Module, size: Size, channels: int, classes: int) -> dict:
    """Parameters of a :func:`sketch`, and multiply-adds by part; the model is used up."""
    with torch.device("meta"):
        x, t = torch.empty(1, channels, *size), torch.zeros(1)
        y = torch.zeros(1, dtype=torch.int64) if classes else None
        parameters = sum(p.numel() for p in model.parameters())
        parts = multiply_adds(model, x, t, y)
    return {"parameters": parameters, "multiply_adds": sum(parts.values()), "parts": parts}
