"""Images and latents with labels, and the order in which training reads them."""

from dis_ssm.data.datasets import ImageDataset
from dis_ssm.data.latents import LatentDataset, open_cache
from dis_ssm.data.open import open_dataset

__all__ = [
    "ImageDataset",
    "LatentDataset",
    "open_cache",
    "open_dataset",
]
