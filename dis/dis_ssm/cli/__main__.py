"""python -m dis_ssm.cli"""

import sys

from dis_ssm.cli import main

sys.exit(main())
