"""How an image of any size becomes a square one, by the recipes that published results assume."""

from PIL import Image

from dis_ssm.data.sources.decode import UnreadableImage, check_pixels

CELEBA_SIZE = (178, 218)
CELEBA_BOX = (89 - 64, 121 - 64, 89 + 64, 121 + 64)  # left, top, right, bottom


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The square of side `size` at the centre, after the shorter side is scaled to `size`.

    Halved with a box filter while the shorter side is at least 2 * size, then bicubic: the
    preprocessing of ADM (Dhariwal & Nichol 2021), which published ImageNet FIDs assume.

    Raises:
        UnreadableImage: the scaled image, before it is cut, would have more than `MAX_PIXELS`.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    scaled = (round(image.width * scale), round(image.height * scale))
    check_pixels(*scaled, f" after scaling the shorter side of {image.width} x {image.height}")
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def celeba_crop(image: Image.Image, size: int) -> Image.Image:
    """The face: 128 x 128 pixels about (x, y) = (89, 121), scaled to `size`.

    Bilinear, antialiased: the crop of DDIM (Song et al. 2021) and U-ViT (Bao et al. 2023).

    Raises:
        UnreadableImage: the image is not an aligned one, 178 x 218.
    """
    if image.size != CELEBA_SIZE:
        raise UnreadableImage(
            f"{image.width} x {image.height} is not the size of CelebA's aligned images"
        )
    return image.crop(CELEBA_BOX).resize((size, size), Image.Resampling.BILINEAR)


CROPS = {"center": center_crop, "celeba": celeba_crop}
