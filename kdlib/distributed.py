"""Several processes that train one student together: the ranks.

torchrun starts them. Each takes its share of every step's examples, and torch's engines
sum the gradients (sharding.py). Here is what the ranks tell each other besides: counts,
losses, the wish to stop, an error. It is little, and travels between CPUs, so that no
GPU waits for it.

    loss of a step = sum over ranks  of  sum over its tokens / count over all ranks

Knows neither models nor losses.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from kdlib.errors import ArgumentError
from kdlib.settings import differences
from kdlib.stopping import Stopped

T = TypeVar("T")
ERROR = "kdlib-error"  # in the ranks' store: the first one that failed


@dataclass(frozen=True)
class Ranks:
    """This process among the `world` processes of a run.

    device: what it computes on; None where the caller has placed the models
    shard:  weights, gradients and moments are split among the ranks (FSDP2), not copied
            to each (DDP)

    The methods that exchange something are called by all ranks, in the same order.
    """

    rank: int = 0
    world: int = 1
    device: torch.device | None = None
    shard: bool = False

    def share(self, items: list[T]) -> list[T]:
        """This rank's items of a step. Rank 0 has the most; the last may have none.

        Every world-th, because a step's rows are sorted by length: all wait for the
        rank with the most tokens.
        """
        return items[self.rank :: self.world]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks, on all of them."""
        if self.world == 1:
            return [value]
        values: list = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: T) -> T:
        """Rank 0's value, on all of them."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def check_same(self, facts: dict[str, dict]) -> None:
        """Raise ArgumentError, on every rank, where one has other facts than rank 0.

        facts: {"config": {...}, ...}
        """
        first, *others = self.gather(facts)
        for rank, theirs in enumerate(others, 1):
            differing = [
                f"{name} is {a!r} on rank 0, {b!r} on rank {rank}"
                for name, (a, b) in differences(first, theirs).items()
            ]
            if differing:
                raise ArgumentError(
                    f"the ranks differ: {'; '.join(differing)}",
                    "start all of them with the same file, data and options",
                )


ALONE = Ranks()


@contextmanager
def processes(*, shard: bool = False) -> Iterator[Ranks]:
    """The ranks that torchrun has started, or this process by itself.

    The first rank that fails leaves with its error; the others, which wait for it in
    vain, leave without a word. After a signal rank 0 speaks for all.

    Raises ArgumentError for more ranks on a machine than it has GPUs.
    """
    cuda, many = torch.cuda.is_available(), "RANK" in os.environ
    local = int(os.environ.get("LOCAL_RANK", 0))
    if cuda and local >= torch.cuda.device_count():
        raise ArgumentError(
            f"LOCAL_RANK={local} on a machine with {torch.cuda.device_count()} GPUs",
            "start no more processes on a machine than it has GPUs",
        )
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if not many and not shard:
        yield Ranks(device=device)
        return
    if cuda:
        torch.cuda.set_device(device)
    store, rank, world = _meet() if many else (dist.HashStore(), 0, 1)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=dist.PrefixStore("kdlib", store),
        rank=rank,
        world_size=world,
    )
    together = True
    try:
        yield Ranks(rank, world, device, shard)
    except Stopped as stop:
        if rank:
            raise SystemExit(128 + stop.signal) from stop
        raise
    except BaseException as error:
        together = world == 1
        if _first_to_fail(store, rank) != rank:
            raise SystemExit(2) from error
        raise
    finally:
        if together:  # after an error, a rank would wait for others that are gone
            dist.destroy_process_group()


def _meet():
    """The store that torchrun's agent keeps for the ranks, rank and world size."""
    from torch.distributed.rendezvous import rendezvous

    return next(rendezvous("env://"))


def _first_to_fail(store, rank: int) -> int:
    try:
        return int(store.compare_set(ERROR, "", str(rank)))
    except RuntimeError:  # whoever kept the store is gone
        return rank
