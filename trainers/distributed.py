"""The ranks that train one trial together: who is who, and what they tell one another; one process alone is one rank.

A rank holds the same share of every micro-batch as the others. Random numbers are drawn for the whole micro-batch by
every rank, which uses its own rows, so that the streams of all ranks stand at the same place and a number of ranks
changes no draw.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_TIMEOUT = datetime.timedelta(hours=1)  # the others wait for the first rank's evaluations

T = TypeVar("T")


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins the group that torchrun describes in the environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    Nothing happens where there is one process, or where the caller has initialised a group already.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Number of this rank, 0 … world_size() - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many ranks train this trial."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own_rows(total: int) -> slice:
    """This rank's rows of `total` rows in the order of the ranks; `total` must divide evenly."""
    share = total // world_size()
    return slice(rank() * share, (rank() + 1) * share)


def sum_(tensor: Tensor) -> Tensor:
    """`tensor` summed over all ranks, in place; no gradient flows."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def mean_(tensor: Tensor) -> Tensor:
    """`tensor` averaged over all ranks, in place; no gradient flows."""
    return sum_(tensor).div_(world_size()) if world_size() > 1 else tensor


def max_(tensor: Tensor) -> Tensor:
    """The largest of all ranks, element by element, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def gathered(tensor: Tensor) -> Tensor:
    """`tensor` [B, …] of all ranks as [world_size · B, …] in the order of the ranks; no gradient flows."""
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def from_first(value: T) -> T:
    """What the first rank has; any picklable value."""
    if world_size() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


@contextmanager
def together() -> Iterator[bool]:
    """Work that the first rank does for all: true there, and what it raises all raise, so that nobody waits for ever.

    The others raise it as FloatingPointError where it is one, else as RuntimeError.
    """
    failure: Exception | None = None
    try:
        yield rank() == 0
    except Exception as error:  # noqa: BLE001 - raised again below, on every rank
        failure = error
    is_number, text = from_first((isinstance(failure, FloatingPointError), failure and str(failure)))
    if failure is not None:
        raise failure
    if text is not None:
        raise (FloatingPointError if is_number else RuntimeError)(text)


def barrier() -> None:
    """Wait until all ranks are here."""
    if world_size() > 1:
        dist.barrier()
