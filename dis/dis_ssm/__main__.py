"""python -m dis_ssm: the dis-ssm command, as torchrun starts it."""

import sys

from dis_ssm.cli import main

sys.exit(main())
