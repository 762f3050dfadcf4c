"""One rank of a world that trains whatever it is told to: `train_worker.py FOLDER` under torchrun's
variables.

Each line of the main rank's standard input is a pickled (config, counted) in hexadecimal; the
answer, FOLDER/answer, is a pickled list of what each rank found: how often each operation ran where
they were counted, the traceback of an error, or None. An empty line, or the end, ends the ranks.
"""

import os
import pickle
import signal
import sys
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from dis_ssm.system.distributed import join_world
from dis_ssm.training import train


def trained(config, counted):
    """Train, and how often each operation ran if that is `counted`."""
    if not counted:
        train(config)
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(config)
    return {event.key: event.count for event in profile.key_averages()}


def main(folder):
    signal.alarm(600)  # should the tests be killed
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with join_world("cpu") as world:
        while True:
            job = [sys.stdin.buffer.readline().strip() if world.main else None]
            dist.broadcast_object_list(job)
            if not job[0]:
                break
            try:
                found = trained(*pickle.loads(bytes.fromhex(job[0].decode())))
            except Exception:
                found = traceback.format_exc()
            found = world.gather(found)
            if world.main:
                draft = folder / "answer.draft"
                draft.write_bytes(pickle.dumps(found))
                os.rename(draft, folder / "answer")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
