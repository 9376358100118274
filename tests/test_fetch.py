"""Masks fetched from host memory, the next one ahead: by fakes that show what is read too early or not waited for."""

import gc
import random
import threading
import weakref

import pytest
import torch
from torch._dynamo.utils import counters

from fg_inductor.kernels import fetch, host_memory, ops
from fg_inductor.kernels.fetch import Prefetcher
from fg_inductor.kernels.host_memory import Block


class Mask(Block):
    """A block that lies in the memory of the CPU."""

    def __init__(self, name: str = "", value: int = 0):
        super().__init__(torch.full((4,), value, dtype=torch.int32), torch.device("cpu"))
        self.name = name

    def write(self, value: int) -> None:
        self.pinned.fill_(value)
        self.wrote()


class Transfers:
    """Copies that are begun read at once, as early as a device may, and arrive when they are waited for."""

    def __init__(self):
        self.log: list[str] = []
        self.under_way: list[weakref.ref] = []

    def copy(self, block):
        self.log.append(f"copy {block.name}")
        return block.pinned.clone()

    def begin(self, block):
        self.log.append(f"begin {block.name}")
        copy = torch.full_like(block.pinned, -1)
        self.under_way = [x for x in self.under_way if x() is not None] + [weakref.ref(copy)]
        return copy, (block.name, copy, block.pinned.clone())

    def wait(self, end):
        name, copy, read = end
        self.log.append(f"wait {name}")
        copy.copy_(read)

    def since(self) -> list[str]:
        log, self.log = self.log, []
        return log


def fetch_all(prefetcher, transfers, *masks) -> list[str]:
    """What fetching them in this order does, each put back before the next; each is fetched as it is."""
    for mask in masks:
        assert torch.equal(prefetcher.fetch(mask), mask.pinned), mask.name
        mask.wrote()
    return transfers.since()


@pytest.fixture
def setup():
    """A prefetcher that has seen the order a, b, c twice: b is under way."""
    transfers = Transfers()
    prefetcher, masks = Prefetcher(transfers), [Mask(name, i) for i, name in enumerate("abc")]
    assert fetch_all(prefetcher, transfers, *masks) == ["copy a", "copy b", "copy c"]
    assert fetch_all(prefetcher, transfers, masks[0]) == ["copy a", "begin b"]
    counters.clear()
    return prefetcher, transfers, masks


def test_each_is_copied_while_the_one_before_is_used(setup):
    prefetcher, transfers, (a, b, c) = setup
    assert fetch_all(prefetcher, transfers, b, c, a) == ["wait b", "begin c", "wait c", "begin a", "wait a", "begin b"]
    assert counters["fgattn"] == {"fetched ahead": 3}


def test_what_was_written_since_is_copied_anew(setup):
    prefetcher, transfers, (_, b, c) = setup
    b.write(7)
    assert fetch_all(prefetcher, transfers, b) == ["wait b", "copy b", "begin c"]
    b.write(8)  # another than the one under way
    assert fetch_all(prefetcher, transfers, c) == ["wait c", "begin a"]
    assert counters["fgattn"] == {"fetched when needed": 1, "fetched ahead": 1}


def test_what_is_yet_to_be_put_back_is_not_copied_ahead(setup):
    """As where two sites run side by side, or where it is put back in a way that is not seen."""
    prefetcher, transfers, (a, b, c) = setup
    b.wrote()
    fetch_all(prefetcher, transfers, c, a, c, a)
    assert torch.equal(prefetcher.fetch(c), c.pinned) and torch.equal(prefetcher.fetch(a), a.pinned)
    assert transfers.since() == ["wait c", "begin a", "wait a"]  # and c is out
    c.write(5)
    assert fetch_all(prefetcher, transfers, c) == ["copy c"]  # a is out
    a.write(6)
    assert fetch_all(prefetcher, transfers, a, c) == ["copy a", "begin c", "wait c", "begin a"]


def test_another_order_is_learned(setup):
    prefetcher, transfers, (a, b, c) = setup
    assert fetch_all(prefetcher, transfers, c) == ["wait b", "copy c", "begin a"]  # one is under way at most
    assert fetch_all(prefetcher, transfers, a, c) == ["wait a", "begin c", "wait c", "begin a"]
    assert fetch_all(prefetcher, transfers, b) == ["wait a", "copy b", "begin c"]


def test_a_mask_that_follows_itself_is_not_copied_ahead():
    """It is written between."""
    transfers, a = Transfers(), Mask("a")
    assert fetch_all(Prefetcher(transfers), transfers, a, a, a) == ["copy a"] * 3


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_a_cuda_graph_writes_is_not_copied_ahead(setup, when):
    """Its writes are not seen, and neither is whether a copy that is under way came before them."""
    prefetcher, transfers, (a, b, c) = setup
    if when == "after":
        b.unseen = True
        b.pinned.fill_(9)
        assert fetch_all(prefetcher, transfers, b, c) == ["wait b", "copy b", "begin c", "wait c", "begin a"]
    else:
        c.unseen = True
        assert fetch_all(prefetcher, transfers, b, c, a) == ["wait b", "copy c", "begin a", "wait a", "begin b"]


def test_masks_that_are_gone(setup):
    """None is held; neither the copy under way nor the order is of use to another."""
    prefetcher, transfers, masks = setup
    a, b, c = masks
    gone = weakref.ref(b)
    del b, masks[1]
    gc.collect()
    assert gone() is None
    log = fetch_all(prefetcher, transfers, Mask("new", 5), c, a)
    assert log == ["wait b", "copy new", "copy c", "begin a", "wait a", "begin new"]


def test_forget(setup):
    prefetcher, transfers, (a, b, c) = setup
    prefetcher.forget()
    assert transfers.since() == ["wait b"]  # the memory of the copy may be used again behind it
    assert all(x() is None for x in transfers.under_way)
    assert fetch_all(prefetcher, transfers, b, c, a) == ["copy b", "copy c", "copy a"]


def test_a_copy_belongs_to_whoever_fetched_it(setup):
    prefetcher, _, masks = setup
    for mask in (masks[1], masks[2], masks[0]) * 2:
        prefetcher.fetch(mask).fill_(99)
        mask.wrote()
    for mask in masks:
        assert torch.equal(prefetcher.fetch(mask), mask.pinned)


@pytest.mark.parametrize("seed", range(20))
def test_a_fetch_is_right_whatever_came_before(seed):
    """Orders, writes, masks that go and come, CUDA graphs, and forgetting, at random."""
    rng, transfers = random.Random(seed), Transfers()
    prefetcher, masks = Prefetcher(transfers), [Mask(str(i), i) for i in range(4)]
    for i in range(300):
        what, mask = rng.random(), rng.choice(masks)
        if what < 0.2:
            mask.write(100 + i)
        elif what < 0.22:
            masks[masks.index(mask)] = Mask(mask.name, 1000 + i)
        elif what < 0.24:
            mask.unseen = True
        elif what < 0.26:
            prefetcher.forget()
        elif mask.unseen and what < 0.4:
            mask.pinned.fill_(i)  # as a replay does
        elif what < 0.8:
            mask = masks[i % 4]
        assert torch.equal(prefetcher.fetch(mask), mask.pinned)
        if rng.random() < 0.9:
            mask.write(i)
        del mask
        assert sum(x() is not None for x in transfers.under_way) <= 1
    assert counters["fgattn"]["fetched ahead"] > 10


def test_two_threads():
    """Which of them fetches when is any order; each gets its own masks."""
    transfers = Transfers()
    prefetcher, wrong = Prefetcher(transfers), []

    def run(first):
        masks = [Mask(str(i), i) for i in range(first, first + 5)]
        for i in range(200):
            for mask in masks:
                if not torch.equal(prefetcher.fetch(mask), mask.pinned):
                    wrong.append(mask.name)
                mask.write(first + i)

    threads = [threading.Thread(target=run, args=(first,)) for first in (0, 1000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# The operator


def test_fetch_is_a_copy():
    mask = torch.arange(24, dtype=torch.int32).reshape(1, 2, 3, 4).transpose(1, 2)
    copy = ops.fetch(mask)
    assert torch.equal(copy, mask) and copy.is_contiguous()
    copy.fill_(-1)
    assert (mask >= 0).all()


def test_what_is_captured_is_not_learned(monkeypatch):
    transfers, (a, b) = Transfers(), (Mask("a"), Mask("b"))
    prefetcher = Prefetcher(transfers)
    monkeypatch.setattr(fetch, "_prefetcher", lambda device: prefetcher)
    tensors = [torch.zeros(4, dtype=torch.int32) for _ in range(2)]
    for x, block in zip(tensors, (a, b), strict=True):
        monkeypatch.setitem(host_memory.blocks, x.data_ptr(), block)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for x in tensors:
        fetch.launch(x, ahead=False)  # as code does that CUDA graphs will replay
    assert not transfers.log and not b.unseen
    for x in tensors * 2:
        fetch.launch(x, ahead=True)
        fetch.wrote(x)
    assert transfers.since() == ["copy a", "copy b", "copy a", "begin b", "wait b", "begin a"]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    a.pinned.fill_(3)
    assert (fetch.launch(tensors[0], ahead=True) == 3).all()
    assert not transfers.log and a.unseen


def test_fetch_error():
    with pytest.raises(ValueError, match=r"fgattn::fetch: mask must be int32, got torch\.float32"):
        ops.fetch(torch.zeros(3))


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(4))
def test_fetches_on_a_gpu(seed):
    """Three steps over some masks, each written back at times, in a queue that the host runs ahead of."""
    rng, device = random.Random(seed), torch.device("cuda", torch.cuda.current_device())
    masks = [host_memory.zeros((1, 4, 100, 4096), device) for _ in range(5)]
    flags = [torch.tensor(x, device=device) for x in (False, True)]
    expected, found, wanted = [0] * 5, [], []
    torch.cuda._sleep(500_000_000)
    for step in range(6):
        for i, mask in enumerate(masks):
            staged = ops.fetch(mask)
            found.append(torch.stack([staged.amin(), staged.amax()]))
            wanted.append(expected[i])
            staged.fill_(10 * step + i + 1)
            due = rng.random() < 0.5
            ops.put_back_(mask, staged, flags[due])
            expected[i] = 10 * step + i + 1 if due else expected[i]
    assert torch.stack(found).tolist() == [[x, x] for x in wanted]
    assert counters["fgattn"] == {"fetched when needed": 6, "fetched ahead": 24}
    fetch.forget()


@pytest.mark.gpu
def test_an_address_that_comes_back():
    device = torch.device("cuda", torch.cuda.current_device())
    masks = [host_memory.zeros((1 << 16,), device) for _ in range(2)]
    for _ in range(2):
        for i, mask in enumerate(masks):
            ops.put_back_(mask, ops.fetch(mask) + i + 1, torch.tensor(True, device=device))
    address = masks[0].data_ptr()  # it is under way
    del masks[0], mask
    torch.cuda.synchronize()
    held = [host_memory.zeros((1 << 16,), device)]
    while held[-1].data_ptr() != address and len(held) < 50:
        held.append(host_memory.zeros((1 << 16,), device))
    again = held[-1]
    assert again.data_ptr() == address
    assert not ops.fetch(again).any()
    fetch.forget()
