"""dis-ssm train | sample | evaluate | encode | info | convert | flops"""

from dis_ssm.cli.entry import main

__all__ = ["main"]
