"""Copies of masks that lie in host memory, the next one begun ahead: what ``fgattn::fetch`` does on a GPU.

    fetch(a)   copy of a: made ahead, or now           copy of b begins, beside whatever follows
    fetch(b)   copy of b: made ahead                   copy of c begins

Which mask follows which is what it was the last time, whatever the graphs are: one for the whole model, or one for all
its blocks. It decides when a copy is made and never what is in it: a copy is used where its mask has not been written
since, else it is made anew, and a mask whose writes are not seen is never copied ahead. Imports torch only.
"""

import threading
import weakref
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fg_inductor.kernels import host_memory
from fg_inductor.kernels.host_memory import Block


class Transfers(Protocol):
    """How copies are made, for one stream."""

    def copy(self, block: Block) -> Tensor:
        """A copy, made in the stream."""

    def begin(self, block: Block) -> tuple[Tensor, Any]:
        """A copy, made beside the stream of all that is in it now, and what to wait for."""

    def wait(self, end: Any) -> None:
        """Have what comes next in the stream wait for the end of a copy."""


@dataclass
class _Ahead:
    """A copy that was begun ahead."""

    block: "weakref.ref[Block]"
    writes: int  # to the mask until then
    copy: Tensor
    end: Any


class Prefetcher:
    """Fetches masks in one stream, and at most one ahead. It holds no mask: one that is gone is not copied."""

    def __init__(self, transfers: Transfers):
        self._transfers = transfers
        self._next: weakref.WeakKeyDictionary[Block, weakref.ref[Block]] = weakref.WeakKeyDictionary()
        self._last: weakref.ref[Block] | None = None
        self._ahead: _Ahead | None = None
        self._lock = threading.Lock()

    def fetch(self, block: Block) -> Tensor:
        """A copy of the mask as the work in the stream so far leaves it. Whoever gets it may write it."""
        with self._lock:
            copy = self._take(block)
            _count("fetched when needed" if copy is None else "fetched ahead")
            if copy is None:
                copy = self._transfers.copy(block)
            block.out, follower = True, self._follower(block)
            if follower is not None and not (follower.out or follower.unseen):
                self._ahead = _Ahead(weakref.ref(follower), follower.writes, *self._transfers.begin(follower))
            return copy

    def forget(self) -> None:
        """Let go of the copy that was begun ahead, and of what follows what."""
        with self._lock:
            self._take(None)
            self._next.clear()
            self._last = None

    def _take(self, block: Block | None) -> Tensor | None:
        """The copy that was begun ahead, where it is of this mask as it is now; else it is let go."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return None
        self._transfers.wait(ahead.end)  # also where it is let go: its memory is free for the stream
        good = ahead.block() is block and block is not None and ahead.writes == block.writes and not block.unseen
        return ahead.copy if good else None

    def _follower(self, block: Block) -> Block | None:
        """What followed the mask the last time; and take note of what it follows."""
        last = None if self._last is None else self._last()
        if last is not None:
            self._next[last] = weakref.ref(block)
        self._last = weakref.ref(block)
        follower = self._next.get(block)
        return None if follower is None else follower()


class CudaTransfers:
    """Copies into fresh memory of ``stream``, those ahead by a stream of their own."""

    def __init__(self, stream: "torch.cuda.Stream"):
        self.stream, self.side = stream, torch.cuda.Stream(stream.device)

    def copy(self, block: Block) -> Tensor:
        return copy_now(block)

    def begin(self, block: Block) -> tuple[Tensor, Any]:
        copy = _new(block)
        # Behind what is in the stream: the last writes of the mask, and the last use of the memory of the copy.
        self.side.wait_stream(self.stream)
        with torch.cuda.stream(self.side):
            copy.copy_(block.pinned, non_blocking=True)
        return copy, self.side.record_event()

    def wait(self, end: Any) -> None:
        self.stream.wait_event(end)


_prefetchers: dict[tuple[int, int], Prefetcher] = {}  # (device, handle of the stream) -> its own
_lock = threading.Lock()


def launch(mask: Tensor, ahead: bool) -> Tensor:
    """A copy of the mask in the memory of its device. ``ahead``: begin with the one that follows."""
    block = host_memory.find(mask)
    if block is None:
        return mask.clone(memory_format=torch.contiguous_format)
    if torch.cuda.is_current_stream_capturing():
        block.unseen = True
        return copy_now(block)
    return _prefetcher(mask.device).fetch(block) if ahead else copy_now(block)


def wrote(mask: Tensor) -> None:
    """Take note that work in the current stream writes a mask: call it behind the launch."""
    block = host_memory.find(mask)
    if block is not None:
        block.wrote()
        block.unseen |= torch.cuda.is_current_stream_capturing()


def forget() -> None:
    """Let go of all copies that were begun ahead."""
    with _lock:
        known = list(_prefetchers.values())
        _prefetchers.clear()
    for prefetcher in known:
        prefetcher.forget()


def copy_now(block: Block) -> Tensor:
    """A copy, made in the current stream."""
    return _new(block).copy_(block.pinned, non_blocking=True)


def _new(block: Block) -> Tensor:
    with torch.inference_mode(False):  # what is begun in a call with it may be used in one without
        return torch.empty(block.pinned.shape, dtype=block.pinned.dtype, device=block.device)


def _prefetcher(device: torch.device) -> Prefetcher:
    stream = torch.cuda.current_stream(device)
    with _lock:
        key = (stream.device_index, stream.cuda_stream)
        if key not in _prefetchers:
            _prefetchers[key] = Prefetcher(CudaTransfers(stream))
        return _prefetchers[key]


def _count(what: str) -> None:
    from torch._dynamo.utils import counters

    counters["fgattn"][what] += 1
