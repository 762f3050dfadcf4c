"""Optional packages: how to install them, and what they need before they can be imported."""

import importlib.util

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library = None  # the schemas live as long as this object


def how_to_install(extra: str) -> str:
    """The command that installs the packages of one of our extras."""
    return f"pip install '.[{extra}]' in a checkout, or 'dis-ssm[{extra}]' once that is published"


def declare_torchvision_operators() -> None:
    """Let torchvision's PyPI wheel be imported beside a CPU-only torch.

    That wheel links CUDA libraries, so its operators are missing there, and its import fails on
    the first one that it describes to torch. Declaring them is enough for all that evaluation
    uses. Call it before the first import of torchvision, timm or torch_fidelity.
    """
    global _library
    if torch.version.cuda is not None or _library or hasattr(torch.ops.torchvision, "nms"):
        return
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        _library.define(schema)


def require(*packages: str) -> None:
    """Make sure that packages of evaluation are installed and can be imported.

    Raises:
        ImportError: one of `packages` is not installed; the message says how to install it.
    """
    if lacking := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise ImportError(f"evaluation needs {', '.join(lacking)}: {how_to_install('eval')}")
    declare_torchvision_operators()
