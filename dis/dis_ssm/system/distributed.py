"""Several processes as one: who we are, what we agree on, and how a model is spread.

Started by torchrun (or by anything that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT), each process is a rank of one `World`; started alone, it is a world of one, in which
nothing here communicates.
"""

import gc
import os
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from dis_ssm.system.machine import pick_device

TIMEOUT = timedelta(minutes=30)  # of one collective: a lost rank ends the others then
BEGUN = "dis_ssm/begun"  # in the store: the last step that each rank has begun


class RankError(RuntimeError):
    """Another rank failed at what all must do."""


@dataclass(frozen=True)
class World:
    """This process (`rank` of `size`) and its device. All ranks call its methods together, but for
    `call` and `heard`."""

    device: torch.device
    rank: int = 0
    size: int = 1
    store: dist.Store | None = None

    @property
    def main(self) -> bool:
        """Whether this is the rank that logs and writes what is written once."""
        return self.rank == 0

    def share(self, n: int) -> slice:
        """This rank's part of n items: consecutive parts, of sizes that differ by 1 at most."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def call(self, word: str) -> None:
        """Say `word` to all ranks, whatever they are doing. For one rank alone to call."""
        if self.store:
            self.store.set(word, "")

    def heard(self, word: str) -> bool:
        """Whether any rank has called `word`. For one rank alone to call."""
        return self.store is not None and self.store.check([word])

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, on all of them."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """The picklable values of all ranks, in their order, on all of them."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def step(self, number: int, limit: timedelta) -> Iterator[None]:
        """Step `number` of all ranks in the `with`. Should it not end within `limit`, this process
        does, with status 1 and one line that names the ranks which have not begun the step."""
        if self.store is None:
            yield
            return
        self.store.set(f"{BEGUN}/{self.rank}", str(number))
        timer = threading.Timer(limit.total_seconds(), self._give_up, (number, limit))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _give_up(self, number: int, limit: timedelta) -> None:
        keys = [f"{BEGUN}/{rank}" for rank in range(self.size)]
        try:
            late = [
                rank
                for rank, key in enumerate(keys)
                if not self.store.check([key]) or int(self.store.get(key)) < number
            ]
            who = f"rank {', '.join(map(str, late))} has not begun it" if late else "all began it"
        except RuntimeError as error:  # the store was rank 0's or torchrun's
            who = f"the store does not answer: {error}"
        print(
            f"dis-ssm: error: rank {self.rank} has waited {limit} for step {number}: {who}. Run "
            f"the same command again to continue from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What one rank fails to do in the `with`, all ranks fail to do.

        There must be no communication inside.

        Raises:
            Exception: on the rank that failed, its own error.
            RankError: on the other ranks, with its message.
        """
        error = None
        try:
            yield
        except Exception as raised:
            error = raised
        messages = self.gather(error and f"{type(error).__name__}: {error}")
        if error:
            raise error
        for rank, message in enumerate(messages):
            if message:
                raise RankError(f"rank {rank} failed: {message}")


ALONE = World(torch.device("cpu"))


@contextmanager
def join_world(device: str | None = None, timeout: timedelta = TIMEOUT) -> Iterator[World]:
    """The world that the environment describes; its process group lives as long as the `with`.

    Args:
        device: "cuda", "cpu", or None for the best there is; each process takes the GPU of its
            LOCAL_RANK.
        timeout: of what all ranks do together, which fails then.

    Raises:
        ValueError: the device cannot be used.
        TimeoutError: rank 0 did not start in time.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1 or dist.is_initialized():
        rank = dist.get_rank() if dist.is_initialized() else 0
        yield World(pick_device(device), rank, size)
        return
    if (device or "cuda").startswith("cuda") and torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    found = pick_device(device)
    backend = "cpu:gloo,cuda:nccl" if found.type == "cuda" else "gloo"
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    store = _unwritten(store, rank, size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    yield World(found, rank, size, store)
    gc.collect()  # DDP must let go of the group first: ending it there can dead-lock with gloo
    dist.destroy_process_group()  # not after an error: NCCL would wait for ranks that wait for us


def _unwritten(store: dist.Store, rank: int, size: int) -> dist.Store:
    """A part of the store that no process before us has written to.

    torchrun keeps one store over its restarts, in which gloo would find the addresses of processes
    that are gone. Rank 0 opens a new turn; the others follow until they are named in it.
    """
    name, deadline = uuid.uuid4().hex, time.monotonic() + TIMEOUT.total_seconds()
    joined = None
    if rank == 0:
        turn = store.add("dis_ssm/turn", 1)
        keys = [f"dis_ssm/{turn}/{other}" for other in range(1, size)]
        store.wait(keys, TIMEOUT)
        store.set(f"dis_ssm/{turn}/all", b" ".join(map(store.get, keys)))
        return dist.PrefixStore(f"dis_ssm/{turn}", store)
    while time.monotonic() < deadline:
        turn = store.add("dis_ssm/turn", 0)
        if turn != joined:
            store.set(f"dis_ssm/{turn}/{rank}", name)
            joined = turn
        everyone = f"dis_ssm/{turn}/all"
        if store.check([everyone]) and name in store.get(everyone).decode().split():
            return dist.PrefixStore(f"dis_ssm/{turn}", store)
        time.sleep(0.02)
    raise TimeoutError(f"rank 0 was not found in {TIMEOUT}")


def spread(model: nn.Module, world: World, parallel: str) -> Callable:
    """What computes the model's forward pass so that its gradients are means over the ranks.

    "ddp" keeps a copy of everything on each rank; "fsdp" cuts parameters, gradients and optimizer
    into shards, in place, and gathers each of `model.blocks` when it runs (FSDP2).
    """
    if world.size == 1:
        return model
    if parallel == "ddp":
        devices = [world.device] if world.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    # the first block hands its input on as the residual stream, which nothing changes in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def reducing(forward: Callable, wanted: bool) -> AbstractContextManager:
    """Inside, a backward pass averages gradients over ranks if `wanted`, else adds them up here."""
    if isinstance(forward, FSDPModule):
        forward.set_requires_gradient_sync(wanted)
    elif isinstance(forward, DistributedDataParallel) and not wanted:
        return forward.no_sync()
    return nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of a sharded one. Called by all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(target: Tensor, value: Tensor) -> None:
    """Copy `value`, a whole tensor, into `target`, or this rank's part of it into a sharded one."""
    if isinstance(target, DTensor):
        value = value.to(target.device)
        mesh, placements = target.device_mesh, target.placements
        value = distribute_tensor(value, mesh, placements, src_data_rank=None)
    target.copy_(value)
