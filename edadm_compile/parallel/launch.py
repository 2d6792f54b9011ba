"""Processes started by ``torchrun``: how they find each other, and how they stop together."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from edadm_compile.errors import EdadmError, ParallelError
from edadm_compile.parallel.world import Share, World

#: A process that waits longer than this for another takes it for lost. The longest honest wait is for a slower disk or
#: machine: between two meetings all processes do equal work.
_PATIENCE = timedelta(minutes=30)
#: What moves tensors, by where the compilation runs.
_BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
#: Operations whose tensors are held; gloo has two threads.
_REMEMBERED = 4


class Distributed(World):
    """The processes of a ``torch.distributed`` group.

    Args:
        store: a `torch.distributed.Store`, shared by the processes and alive while any of them runs.
        device: where the group's tensors must be; others are copied there and back.
    """

    def __init__(self, store: Any, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size = rank, size
        self._store, self._device = store, device
        # Threads of gloo let go of an operation's tensors some time after it has returned. Were theirs the last reference, they
        # would need Python's lock to free what Python made, and a process that is ending aborts there.
        self._last: deque[list[Tensor]] = deque(maxlen=_REMEMBERED)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Sum over all processes, in place."""
        self._together(tensors, dist.all_reduce)

    def agree(self, tensors: Sequence[Tensor]) -> None:
        """Take the values of process 0, in place."""
        self._together(tensors, lambda flat: dist.broadcast(flat, src=0))

    def join(self, value: Tensor, share: Share) -> Tensor:
        """Rows of all processes in order."""
        each = value.shape[0] // max(1, share.count)
        counts = [each * len(part) for part in torch.arange(share.total).tensor_split(self.size)]
        padded = value.new_zeros((max(counts), *value.shape[1:]), device=self._device)
        padded[: counts[self.rank]] = value[: counts[self.rank]].to(self._device)
        parts = [torch.empty_like(padded) for _ in counts]
        self._meet(lambda: dist.all_gather(parts, padded), [padded, *parts])
        return torch.cat([p[:n] for p, n in zip(parts, counts, strict=True)]).to(value.device)

    def _together(self, tensors: Sequence[Tensor], operation: Callable[[Tensor], Any]) -> None:
        """One message for all tensors of a type: a message costs more than the bytes of a small tensor."""
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            group = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.detach().reshape(-1) for t in group]).to(self._device)
            self._meet(lambda flat=flat: operation(flat), [flat])  # type: ignore[misc]
            for tensor, part in zip(group, flat.split([t.numel() for t in group]), strict=True):
                tensor.detach().copy_(part.view(tensor.shape))

    def _meet(self, operation: Callable[[], Any], tensors: list[Tensor]) -> None:
        self._last.append(tensors)
        _meeting(operation)

    def first_to_fail(self) -> bool:
        """Whether no other process has said yet that it failed; asked once by each that does."""
        try:
            return bool(self._store.add("edadm_compile/failed", 1) == 1)
        except (RuntimeError, OSError):  # the store went down with the process that holds it, which has spoken
            return False


def _meeting(operation: Callable[[], Any]) -> None:
    """Run a collective operation; another process that has ended shows here.

    Raises:
        ParallelError: the operation did not complete.
    """
    try:
        operation()
    except RuntimeError as error:
        raise ParallelError(
            "another process of this run ended or did not answer (out of memory, killed, or a lost connection); its own "
            f"output says why: {str(error).splitlines()[0][:200]}"
        ) from None


@contextmanager
def processes(device: str = "cpu") -> Iterator[World]:
    """The processes that ``torchrun`` started; this one alone where it did not.

    An error is raised in the process that had it first. The others, which have the same error, or miss the first one at
    the next meeting, exit without a word, so that it is reported once.

    Args:
        device: "cpu" (gloo) or "cuda" (nccl): where the tensors of the compilation are.

    Raises:
        ParallelError: the processes do not find each other, or one of them was lost.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield World()
        return
    world = _connect(device)
    try:
        yield world
    except BaseException as error:
        if isinstance(error, SystemExit) or world.first_to_fail():
            raise
        raise SystemExit(error.exit_code if isinstance(error, EdadmError) else 1) from None
    finally:
        dist.destroy_process_group()


def _connect(device: str) -> Distributed:
    try:
        store, rank, size = next(rendezvous("env://", timeout=_PATIENCE))
        place = torch.device("cpu")
        if device == "cuda":
            place = torch.device("cuda", dist.get_node_local_rank(0))
            torch.cuda.set_device(place)
        dist.init_process_group(_BACKENDS[device], store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise ParallelError(
            f"the processes of torchrun do not find each other: {str(error).splitlines()[0]}; check --master-addr, "
            "--master-port and --nnodes, which must be the same on every machine"
        ) from None
    return Distributed(store, rank, size, place)
