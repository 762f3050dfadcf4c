"""dis-ssm train | sample | score | evaluate | encode | check | info | convert | flops"""

from dis_ssm.cli.entry import main

__all__ = ["main"]
