"""DiT and U-ViT, the attention backbones that DiS is measured against, in their papers' sizes.

Letters: J tokens, D hidden size, L blocks, p patch. Nothing that trains or samples DiS uses this.
"""

from torch import nn

from dis_ssm.models.dit import dit
from dis_ssm.models.presets import DiS_models, create_model
from dis_ssm.models.uvit import UViT
from dis_ssm.system.nearest import did_you_mean

PATCHES = (2, 4, 8)
DIT = {"S": (12, 6, 64), "B": (12, 12, 64), "L": (24, 16, 64), "XL": (28, 16, 72)}
UVIT = {"S": (13, 8, 64), "M": (17, 12, 64), "L": (21, 16, 64), "H": (29, 16, 72)}
PEERS = {
    f"{family}-{size}/{patch}": (family, patch, shape)
    for family, sizes in (("DiT", DIT), ("U-ViT", UVIT))
    for size, shape in sizes.items()  # depth, heads, width of a head
    for patch in PATCHES
}


def build(name: str, size: tuple[int, int], channels: int, classes: int) -> nn.Module:
    """DiS, DiT or U-ViT by name; ValueError for a name nobody has or a patch that does not fit."""
    if name in DiS_models:
        return create_model(name, input_size=size, in_channels=channels, num_classes=classes)
    if name not in PEERS:
        raise ValueError(f"unknown model {name!r}; {did_you_mean(name, (*DiS_models, *PEERS))}")
    family, patch, shape = PEERS[name]
    if any(side % patch for side in size):
        raise ValueError(f"patch_size {patch} does not divide the input size {size[0]}x{size[1]}")
    return (dit if family == "DiT" else UViT)(size, patch, channels, classes, *shape)
