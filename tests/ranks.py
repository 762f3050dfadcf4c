"""Processes that train one small run together, with faults put into them, and what they leave."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from functools import cache

import torch

from dis_ssm import cli
from dis_ssm.storage.checkpoint import complete_checkpoints, read_part, read_state
from dis_ssm.training.trainer import PARTS
from faults import Place

STEPS, SAVES = 10, 5
GRACE = 30  # seconds that a scheduler leaves between SIGTERM and SIGKILL
TIMES = ("images_per_second", "seconds", "tflops", "mfu", "memory_gb", "data_wait", "eta_hours")
CONFIG = f"""
[model]
hidden_size = 16
depth = 3
patch_size = 4
d_state = 4
drop_path = 0.3
[data]
flip = true
workers = 1
[train]
steps = {STEPS}
batch_size = 8
micro_batch_size = 2
lr = 2e-3
warmup_steps = 2
log_every = 1
save_every = {SAVES}
[sample]
every = {SAVES}
num = 10
steps = 3
"""


@cache
def server():
    """What forks the processes, having imported what they need; POSIX has it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dis_ssm.training", "dis_ssm.cli", "sklearn.datasets"])
    return context


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_main(arguments, environment, output, marker, fault):
    """What each process does: `dis-ssm` with these arguments, after `fault` has been put in."""
    signal.alarm(150)  # should the test be killed
    out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1), os.dup2(out, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    if fault:
        fault(Place(int(environment.get("RANK", 0)), marker))
    sys.exit(cli.main(arguments))


class Ranks:
    """`size` processes that train in `run`, each with `fault`, one of the module `faults`."""

    def __init__(self, run, size=2, parallel="ddp", *flags, fault=None, config=CONFIG):
        file = run.with_suffix(".toml")
        file.write_text(config)
        self.run, self.size, self.parallel = run, size, parallel
        self.output = run.with_suffix(f".{time.monotonic_ns()}.txt")
        self.marker = run.with_suffix(".marker")
        self.marker.unlink(missing_ok=True)
        arguments = ["train", str(file), "--out", str(run), "--train.parallel", parallel, *flags]
        world = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        self.processes = []
        for rank in range(size):
            environment = {**world, "RANK": rank, "LOCAL_RANK": rank} if size > 1 else {}
            environment = {name: str(value) for name, value in environment.items()}
            given = (arguments, environment, str(self.output), self.marker, fault)
            self.processes.append(server().Process(target=rank_main, args=given, daemon=True))
        for process in self.processes:
            process.start()

    def send(self, number, ranks=None):
        for rank in range(self.size) if ranks is None else ranks:
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid, number)

    def ended(self, within=60):
        """The exit codes, all ranks having ended by themselves in so many seconds."""
        deadline = time.monotonic() + within
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.join()
        assert not late, f"ranks {late} still run after {within} s:\n{self.said}"
        return [process.exitcode for process in self.processes]

    @property
    def said(self):
        return self.output.read_text() if self.output.exists() else ""

    def wait_for(self, condition, seconds=60):
        wait_for(condition, seconds, lambda: self.said)


def wait_for(condition, seconds=60, said=lambda: ""):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"nothing in {seconds} s:\n{said()}"
        time.sleep(0.005)


def finish(run, size=2, parallel="ddp", *flags):
    """Run the command (again) to its end; what it said."""
    ranks = Ranks(run, size, parallel, *flags)
    assert ranks.ended() == [0] * size, ranks.said
    return ranks.said


def lines_so_far(run):
    path = run / "log.jsonl"
    return path.read_text().split("\n")[:-1] if path.exists() else []


def lines(run):
    found = map(json.loads, lines_so_far(run))
    return [{k: v for k, v in line.items() if k not in TIMES} for line in found]


def steps(run):
    return [int(folder.name) for folder in complete_checkpoints(run)]


def drafts(run):
    return [path for path in run.rglob(".draft-*")]


def state_of(folder):
    state = read_state(folder)
    counters = {k: v for k, v in state["trainer"].items() if k not in ("meter", "machine")}
    return state, {"step": state["step"], **counters}


def assert_same(run, expected):
    """The last checkpoint, the log and the pictures of two runs, bit for bit."""
    one, other = complete_checkpoints(run)[-1], complete_checkpoints(expected)[-1]
    (state, counters), (wanted, wanted_counters) = state_of(one), state_of(other)
    assert counters == wanted_counters
    for part in PARTS:
        tensors, originals = read_part(one, state, part), read_part(other, wanted, part)
        assert tensors.keys() == originals.keys()
        different = [name for name in tensors if not torch.equal(tensors[name], originals[name])]
        assert not different, f"{part}: {different[:3]} of {len(different)}"
    assert lines(run) == lines(expected)
    for folder in ("samples", "scores"):
        files, originals = ({p.name: p for p in (r / folder).glob("*")} for r in (run, expected))
        assert files.keys() == originals.keys()
        for name, path in files.items():
            assert path.read_bytes() == originals[name].read_bytes(), name
    assert not drafts(run)
