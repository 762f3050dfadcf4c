"""dis-ssm convert"""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


def convert(
    source: Positional[Annotated[Path, arg(metavar="FILE")]],
    run: Positional[Annotated[Path, arg(metavar="RUN")]],
    *,
    input_size: tuple[int, int] | None = None,
) -> int:
    """Turn a released checkpoint into a run that `dis-ssm sample` draws from.

    Released models draw latents: sample them with --vae, or get .npz arrays.

    Args:
        source: the released file, a pickle or safetensors; pickles are opened safely.
        run: the folder to write.
        input_size: height and width; a square is assumed.
    """
    from dis_ssm.interop.released import convert_file

    convert_file(source, run, input_size, report=lambda note: print(f"{source}: {note}"))
    print(run)
    return 0
