"""dis-ssm check"""

import sys
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from dis_ssm.cli.messages import fail


def check(cache: Positional[Annotated[Path, arg(metavar="CACHE")]]) -> int:
    """Read a whole latent cache and name the shards that are damaged.

    To repair it, run `dis-ssm encode` again with the arguments that made it.

    Args:
        cache: a folder that `dis-ssm encode` wrote.
    """
    from dis_ssm.data.latents import AGAIN, check_cache

    wrong = check_cache(cache)
    for problem in wrong.values():
        print(problem, file=sys.stderr)
    if wrong:
        return fail(f"{len(wrong)} files of {cache} are damaged: {AGAIN}")
    print(f"{cache}: all shards are intact")
    return 0
