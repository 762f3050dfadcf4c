"""Sizes beyond which a number is a mistake and not a wish."""

LARGEST_SIDE = 2**16  # in pixels, cells or channels; also of the widths of a model
MOST_CLASSES = 10**7
