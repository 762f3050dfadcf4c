"""python -m dis_ssm: the dis-ssm command, as torchrun starts it."""

import os
import sys
import traceback

from dis_ssm.cli import main

try:
    status = main()
except Exception:
    traceback.print_exc()
    status = 1
if status and int(os.environ.get("WORLD_SIZE", 1)) > 1:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # an ordinary exit closes NCCL, which waits for ranks that wait for this one
sys.exit(status)
