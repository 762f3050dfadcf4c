"""dis-ssm flops"""

import importlib.util
from pathlib import Path

from dis_ssm.system.extras import how_to_install
from dis_ssm.system.files import check_writable, write_json


def flops(
    *,
    size: tuple[int, int] = (32, 32),
    channels: int = 4,
    classes: int = 1000,
    models: tuple[str, ...] = (),
    json: Path | None = None,
    plot: Path | None = None,
) -> int:
    """What DiS costs: the paper's Table 1, and multiply-adds by part, beside DiT's and U-ViT's.

    Args:
        size: height and width of the images or latents.
        channels: of the images or latents.
        classes: 0 for none.
        models: such as DiS-H/2 DiT-XL/2 U-ViT-H/2; all if none is given.
        json: write the counts to this file.
        plot: draw cost against the number of tokens to this file (.png, .pdf, .svg).
    """
    from dis_ssm.costs.complexity import draw, format_report, report

    for path in filter(None, (json, plot)):
        check_writable(path)
    if plot and importlib.util.find_spec("matplotlib") is None:
        raise ImportError(f"--plot needs matplotlib: {how_to_install('plot')}")
    found = report(size, channels, classes, models)
    if json:
        write_json(json, found)
    if plot:
        draw(found, plot)
    print(format_report(found))
    for path in filter(None, (json, plot)):
        print(path)
    return 0
