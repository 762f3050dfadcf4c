"""Faults, with real processes and real signals: killed ranks, full disks, damaged files, NaNs.

After each of them the same command again must end as if nothing had happened, bit for bit. Ranks
are forked from a server that has imported everything, which spares seconds each; torchrun itself
is used where its own part is tested.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

import faults
from dis_ssm.build import load_model
from dis_ssm.storage.checkpoint import complete_checkpoints
from ranks import (
    CONFIG,
    GRACE,
    SAVES,
    STEPS,
    Ranks,
    assert_same,
    drafts,
    finish,
    lines,
    lines_so_far,
    state_of,
    steps,
    wait_for,
)

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        not hasattr(signal, "SIGKILL") or sys.platform == "darwin", reason="needs Linux"
    ),
]


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """(size, parallel, *flags) -> a run to its end, made once."""
    made = {}

    def make(size, parallel="ddp", *flags):
        key = size, parallel, *flags
        if key not in made:
            run = tmp_path_factory.mktemp("whole") / "run"
            finish(run, size, parallel, *flags)
            made[key] = run
        return made[key]

    return make


@pytest.fixture
def halfway(uninterrupted, tmp_path):
    """(size, parallel) -> a copy of the run as a kill after its first checkpoint leaves it."""

    def make(size, parallel="ddp"):
        run = tmp_path / "run"
        shutil.copytree(uninterrupted(size, parallel), run)
        shutil.rmtree(run / "checkpoints" / f"{STEPS:08d}")
        (run / "samples" / f"step-{STEPS:06d}.png").unlink()
        return run

    return make


# ---- kill -9 -------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_kills_at_random_moments(uninterrupted, tmp_path, parallel):
    """Each round one rank or all are killed, the others must end by themselves."""
    expected, run, chance = uninterrupted(2, parallel), tmp_path / "run", random.Random(parallel)
    committed = []
    for victims in ([0], [1], [0, 1], [1], [0, 1], [0]):
        ranks = Ranks(run, 2, parallel)
        if len(victims) == 1:  # one that dies before all have met is torchrun's to notice
            ranks.wait_for(lambda r=ranks: "parameters" in r.said or "is done" in r.said)
        time.sleep(chance.uniform(0, 1.5))
        ranks.send(signal.SIGKILL, victims)
        codes = ranks.ended(within=GRACE)
        assert all(codes[rank] in (0, -signal.SIGKILL) for rank in victims), ranks.said
        if any(codes):
            assert all(codes) or steps(run)[-1:] == [STEPS]  # nobody thinks that all went well
        assert steps(run)[: len(committed)] == committed  # nothing committed is lost
        committed = steps(run)
        if committed:
            load_model(run)
    finish(run, 2, parallel)
    assert_same(run, expected)


@pytest.mark.parametrize(
    "size, parallel, victim, points", [(1, "ddp", 0, 9), (2, "fsdp", 0, 9), (2, "fsdp", 1, 2)]
)
def test_kills_at_every_point_of_a_save(uninterrupted, halfway, size, parallel, victim, points):
    """A save is a sequence of flushes and renames: a kill before each leaves the older checkpoint,
    or, after the rename, the new one, and in the end nothing differs."""
    run, point, killed = halfway(size, parallel), 0, 0
    while True:
        point += 1
        pause = partial(faults.pause_at_call, names=("fsync", "rename"), call=point, victim=victim)
        ranks = Ranks(run, size, parallel, fault=pause)
        over = ranks.processes[victim]
        ranks.wait_for(lambda o=over, r=ranks: r.marker.exists() or not o.is_alive())
        if not ranks.marker.exists():
            assert ranks.ended() == [0] * size, ranks.said
            break
        killed += 1
        ranks.send(signal.SIGKILL, None if point % 2 else [victim])
        assert all(ranks.ended(within=GRACE)), ranks.said
        assert steps(run) in ([SAVES], [SAVES, STEPS])
        load_model(run)
    assert killed >= points
    finish(run, size, parallel)
    assert_same(run, uninterrupted(size, parallel))


def test_a_kill_between_the_renames_that_replace_a_damaged_checkpoint(uninterrupted, tmp_path):
    run, expected = tmp_path / "run", uninterrupted(1)
    shutil.copytree(expected, run)
    path = run / "checkpoints" / f"{STEPS:08d}" / "model.safetensors"
    for rename in (1, 2):
        os.truncate(path, 100) if path.exists() else None
        pause = partial(faults.pause_at_call, names=("rename",), call=rename)
        ranks = Ranks(run, 1, fault=pause)
        ranks.wait_for(ranks.marker.exists)
        ranks.send(signal.SIGKILL)
        assert ranks.ended() == [-signal.SIGKILL]
        assert SAVES in steps(run)
    finish(run, 1)
    assert_same(run, expected)


# ---- disks ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, parallel, full",
    [(1, "ddp", [0]), (2, "ddp", [0]), (2, "fsdp", [0, 1]), (2, "fsdp", [1])],
)
def test_full_disk(uninterrupted, halfway, size, parallel, full):
    """Files cannot grow beyond 12 kB on some ranks: the log fits, the weights do not."""
    run = halfway(size, parallel)
    ranks = Ranks(run, size, parallel, fault=partial(faults.full_disk, ranks=full, limit=12_000))
    codes = ranks.ended(within=GRACE)
    assert all(code > 0 for code in codes), (codes, ranks.said)
    assert "cannot write" in ranks.said or "too large" in ranks.said, ranks.said
    assert steps(run) == [SAVES] and not drafts(run)
    load_model(run)
    finish(run, size, parallel)
    assert_same(run, uninterrupted(size, parallel))


def test_full_disk_under_the_log(uninterrupted, halfway):
    """Not even the log can be written, which only one rank does: nobody waits for it."""
    run = halfway(2)
    ranks = Ranks(run, 2, fault=partial(faults.full_disk, ranks=[0], limit=1_500))
    codes = ranks.ended(within=GRACE)
    assert all(code > 0 for code in codes), (codes, ranks.said)
    assert "File too large" in ranks.said
    finish(run, 2)
    assert_same(run, uninterrupted(2))


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[-3] ^= 4
        path.write_bytes(data)


@pytest.mark.parametrize(
    "parallel, part, how",
    [
        ("fsdp", "optimizer", "truncated"),
        ("fsdp", "model", "altered"),
        ("fsdp", "model", "missing"),
        ("ddp", "optimizer", "altered"),
    ],
)
def test_damaged_shards_give_way_to_the_checkpoint_before(
    uninterrupted, tmp_path, parallel, part, how
):
    run, expected = tmp_path / "run", uninterrupted(2, parallel)
    shutil.copytree(expected, run)
    last = run / "checkpoints" / f"{STEPS:08d}"
    shards = sorted((last / part).glob("*")) or [last / f"{part}.safetensors"]
    assert len(shards) == (2 if parallel == "fsdp" else 1)
    damage(shards[-1], how)
    said = finish(run, 2, parallel)
    (warning,) = [line for line in said.splitlines() if "trying the checkpoint before" in line]
    assert shards[-1].name in warning
    assert f"steps {SAVES} to {STEPS}" in said
    assert_same(run, expected)


def test_no_intact_checkpoint_is_an_error_on_all_ranks(uninterrupted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted(2, "fsdp"), run)
    for folder in complete_checkpoints(run):
        damage(sorted((folder / "model").glob("*"))[1], "truncated")
    ranks = Ranks(run, 2, "fsdp")
    assert ranks.ended(within=GRACE) == [2, 2], ranks.said
    assert "no checkpoint of" in ranks.said and steps(run) == [SAVES, STEPS]


# ---- NaN -----------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_nan_on_one_rank_is_skipped_by_all(tmp_path, parallel):
    """Whichever rank it comes from, the same steps are skipped and the same weights result."""
    runs = [tmp_path / f"poisoned{victim}" for victim in range(2)]
    for victim, run in enumerate(runs):
        poison = partial(faults.poison, victim=victim, steps=[3, 4, 7])
        ranks = Ranks(run, 2, parallel, fault=poison)
        assert ranks.ended() == [0, 0], ranks.said
        said = sorted(re.findall(r"weights \d+ \S+", ranks.said))
        assert len(said) == 2 * STEPS and said[::2] == said[1::2]  # the ranks agree
        log = lines(run)
        assert [line["nonfinite"] for line in log] == [0, 0, 0, 1, 2, 2, 2, 3, 3, 3]
        assert [line["loss"] is None for line in log] == [n in (3, 4, 7) for n in range(STEPS)]
        _, counters = state_of(complete_checkpoints(run)[-1])
        assert counters["nonfinite"] == 3 and counters["ema_updates"] == STEPS - 3
    assert_same(*runs)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_too_many_nans_stop_all_with_the_state_saved(uninterrupted, tmp_path, parallel):
    run, flags = tmp_path / "run", ("--train.max-nonfinite", "3")
    poison = partial(faults.poison, victim=1, steps=range(6, 99))
    ranks = Ranks(run, 2, parallel, *flags, fault=poison)
    assert ranks.ended() == [2, 2], ranks.said
    assert "3 steps in a row" in ranks.said and steps(run) == [SAVES, 9]
    _, counters = state_of(complete_checkpoints(run)[-1])
    assert counters["nonfinite"] == counters["nonfinite_in_a_row"] == 3
    shutil.rmtree(run / "checkpoints" / "00000009")
    finish(run, 2, parallel)
    assert_same(run, uninterrupted(2, parallel))


# ---- a rank that hangs ----------------------------------------------------------------------


def test_a_rank_that_hangs_is_named_and_ends_the_others(uninterrupted, tmp_path):
    run = tmp_path / "run"
    hang = partial(faults.hang, victim=1, step=6)
    ranks = Ranks(run, 2, "ddp", "--train.timeout-minutes", "0.05", fault=hang)
    ranks.processes[0].join(60)
    ranks.send(signal.SIGKILL)
    assert ranks.processes[0].exitcode == 1, ranks.said
    assert re.search("rank 0 has waited 0:00:03 for step 7: rank 1 has not begun it", ranks.said)
    assert steps(run) == [SAVES]
    finish(run, 2)
    assert_same(run, uninterrupted(2))


# ---- SIGTERM -------------------------------------------------------------------------------


@pytest.mark.parametrize("size, told", [(1, [0]), (2, [0]), (2, [1]), (2, [0, 1])])
def test_sigterm_leaves_a_complete_checkpoint(uninterrupted, tmp_path, size, told):
    """Whoever hears it, all stop at the same step, save it and exit with 0."""
    run = tmp_path / "run"
    ranks = Ranks(run, size, fault=faults.slow_steps)
    ranks.wait_for(lambda: len(lines(run)) >= 2)
    ranks.send(signal.SIGTERM, told)
    assert ranks.ended(within=GRACE) == [0] * size, ranks.said
    assert f"stopped: {run} at step {lines(run)[-1]['step']}" in ranks.said
    assert steps(run) == [lines(run)[-1]["step"]] and steps(run)[0] < SAVES
    finish(run, size)
    assert_same(run, uninterrupted(size))


@pytest.mark.parametrize("size", [1, 2])
def test_sigterm_twice_still_leaves_a_complete_checkpoint(uninterrupted, tmp_path, size):
    """A scheduler signals every process of a job, and torchrun passes on what it got itself."""
    run = tmp_path / "run"
    ranks = Ranks(run, size, fault=faults.slow_steps)
    ranks.wait_for(lambda: len(lines(run)) >= 2)
    ranks.send(signal.SIGTERM)
    time.sleep(0.05)
    ranks.send(signal.SIGTERM)
    assert ranks.ended(within=GRACE) == [0] * size, ranks.said
    assert steps(run) == [lines(run)[-1]["step"]] and steps(run)[0] < SAVES
    finish(run, size)
    assert_same(run, uninterrupted(size))


DRAWING = ("--sample.steps", "500", "--train.save-every", "10")  # 25 s each when drawn slowly
PREVIEW = (*DRAWING, "--sample.every", "5", "--sample.num", "2")
SCORE = (*DRAWING, "--sample.every", "0", "--score.every", "5", "--score.num", "4")


@pytest.mark.parametrize(
    "told, flags",
    [
        ([0, 1], PREVIEW),
        ([1], PREVIEW),
        ([0, 1], (*SCORE, "--score.extractor", "pixels")),
    ],
    ids=["preview", "preview-one", "score"],
)
def test_sigterm_while_drawing(uninterrupted, tmp_path, told, flags):
    """It ends promptly, the step saved; what was being drawn is drawn when the run goes on."""
    run = tmp_path / "run"
    ranks = Ranks(run, 2, "ddp", *flags, fault=faults.slow_drawing)
    ranks.wait_for(ranks.marker.exists)
    time.sleep(0.2)
    ranks.send(signal.SIGTERM, told)
    assert ranks.ended(within=12) == [0, 0], ranks.said
    assert steps(run) == [SAVES]
    assert not list(run.glob("s*/*-000005*"))
    finish(run, 2, "ddp", *flags)
    assert list(run.glob("s*/*-000005*"))
    assert_same(run, uninterrupted(2, "ddp", *flags))


# ---- torchrun ------------------------------------------------------------------------------


class Torchrun:
    def __init__(self, run, *flags, parallel="ddp"):
        config = run.with_suffix(".toml")
        config.write_text(CONFIG)
        self.output = run.with_suffix(".torchrun.txt")
        self.command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        self.command += ["--nproc-per-node", "2", *flags, "-m", "dis_ssm", "train", str(config)]
        self.command += ["--out", str(run), "--train.parallel", parallel]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                self.command, stdout=file, stderr=subprocess.STDOUT, env=environment
            )

    @property
    def said(self):
        return self.output.read_text()

    def workers(self):
        """rank -> pid"""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.process.pid:
                    pairs = (folder / "environ").read_text().split("\0")
                    values = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
                    found[int(values["RANK"])] = int(folder.name)
            except (OSError, KeyError, ValueError):
                continue
        return found

    def ended(self, within=90):
        try:
            return self.process.wait(within)
        except subprocess.TimeoutExpired:
            for pid in self.workers().values():
                os.kill(pid, signal.SIGKILL)
            self.process.kill()
            pytest.fail(f"torchrun still runs after {within} s:\n{self.said}")


def test_torchrun_restarts_what_was_lost(uninterrupted, tmp_path):
    run = tmp_path / "run"
    torchrun = Torchrun(run, "--max-restarts", "1", parallel="fsdp")
    wait_for(lambda: len(lines_so_far(run)) > SAVES, 90, lambda: torchrun.said)
    os.kill(torchrun.workers()[1], signal.SIGKILL)
    assert torchrun.ended(within=150) == 0, torchrun.said
    assert_same(run, uninterrupted(2, "fsdp"))


def test_sigterm_to_torchrun(uninterrupted, tmp_path):
    """torchrun passes it on, and ends with an error of its own: the checkpoint is what counts."""
    run = tmp_path / "run"
    torchrun = Torchrun(run)
    wait_for(lambda: lines_so_far(run), 90, lambda: torchrun.said)
    torchrun.process.send_signal(signal.SIGTERM)
    torchrun.ended(within=GRACE)
    assert steps(run)[-1] == lines(run)[-1]["step"] and not drafts(run)
    assert steps(run)[-1] < STEPS
    finish(run, 2)
    assert_same(run, uninterrupted(2))
