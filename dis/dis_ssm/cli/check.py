"""dis-ssm check"""

import sys
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from dis_ssm.cli.messages import fail


def check(cache: Positional[Annotated[Path, arg(metavar="CACHE")]]) -> int:
    """Read a whole latent cache and name the shards that are damaged.

    `dis-ssm encode` with the arguments of the first time mends them.

    Args:
        cache: a folder that `dis-ssm encode` wrote.
    """
    from dis_ssm.data.latents import AGAIN, check_cache

    wrong = check_cache(cache)
    for problem in wrong.values():
        print(problem, file=sys.stderr)
    if wrong:
        return fail(f"{len(wrong)} of the files of {cache} are not sound: {AGAIN}")
    print(f"{cache}: all shards are intact")
    return 0
