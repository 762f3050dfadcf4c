import sys

from dis_ssm.cli import main

sys.exit(main())
