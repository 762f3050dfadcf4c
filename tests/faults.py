"""Faults for the processes of `ranks.Ranks`: each is called there before the command begins.

A fault is a function of the `Place` it is put in and of options, given by `functools.partial`; the
process imports it by name. It replaces what is public: calls of the system, methods of the package.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from dis_ssm.sampling.pipeline import Pipeline
from dis_ssm.system.distributed import whole
from dis_ssm.training.batches import BatchLoader
from dis_ssm.training.trainer import Trainer


@dataclass(frozen=True)
class Place:
    """The rank of a process, and the file by which it tells the test how far it has come."""

    rank: int
    marker: Path

    def mark(self):
        self.marker.touch()

    def pause(self):
        """Stay here until the test kills the process."""
        self.mark()
        time.sleep(600)


def pause_at_call(place, *, names, call, victim=0):
    """`victim` stops for good before the given call, from 1, of the functions `names` of os."""
    if place.rank != victim:
        return
    calls = []

    def counted(function):
        def replacement(*arguments, **options):
            calls.append(function)
            if len(calls) == call:
                place.pause()
            return function(*arguments, **options)

        return replacement

    for name in names:
        setattr(os, name, counted(getattr(os, name)))


def full_disk(place, *, ranks, limit):
    """Files of these ranks cannot grow beyond `limit` bytes."""
    import resource  # POSIX has it

    if place.rank in ranks:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def poison(place, *, victim, steps):
    """Data of these steps is NaN on `victim`; each rank says the sum of its weights every step."""
    finish, update = BatchLoader.finish, Trainer.update

    def poisoned(self, host_batch):
        batch = finish(self, host_batch)
        if place.rank == victim and host_batch.step in steps:
            batch.x[0] = float("nan")
        return batch

    def updated(self, *arguments):
        found = update(self, *arguments)
        total = sum(p.detach().double().sum() for p in self.model.parameters())
        # one write each, or the ranks tear each other's lines
        os.write(1, b"\nweights %d %r\n" % (self.step, float(whole(total))))
        return found

    BatchLoader.finish, Trainer.update = poisoned, updated


def hang(place, *, victim, step):
    """`victim` stops for good at reading `step`."""
    read = BatchLoader.read

    def hanging(self, wanted):
        if place.rank == victim and wanted == step:
            place.pause()
        return read(self, wanted)

    BatchLoader.read = hanging


def slow_steps(place, *, seconds=0.1):
    """Every step takes so much longer."""
    update = Trainer.update

    def updated(self, *arguments):
        time.sleep(seconds)
        return update(self, *arguments)

    Trainer.update = updated


def slow_drawing(place):
    """Every step of sampling takes a twentieth of a second more; the first is marked."""
    draw = Pipeline.draw

    def drawn(*arguments, callback, **options):
        def slowly(*news):
            time.sleep(0.05)
            return callback(*news)

        place.mark()
        return draw(*arguments, callback=slowly, **options)

    Pipeline.draw = drawn
