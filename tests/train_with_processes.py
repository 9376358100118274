"""One of several processes that train one model together: run by test_training_distributed.py, once for each rank.

    python train_with_processes.py RANK WORLD_SIZE STORE HOW...

Each rank has data of its own. The gradients, averaged over the ranks, must be as near to those of one float64 model
that sees all of the data as the gradients of one eager model are.
"""

import copy
import datetime
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fg_inductor
from fg_inductor.testing import assert_l2_as_accurate
from fg_inductor.toy_models import SHORT, Stack, tokens

HOW = {"backend": "fgattn", "options": {**SHORT, "fgattn.inner": "aot_eager", "fgattn.density": 1.0}}
WIDTH = 512  # a weight is 1 MiB, DDP's first bucket, so that DDP cuts the graph of two blocks, in the middle of them


def ddp(model):
    return torch.compile(DistributedDataParallel(model, bucket_cap_mb=2), **HOW)


def ddp_of_compiled(model):
    return DistributedDataParallel(torch.compile(model, **HOW), bucket_cap_mb=2)


def _shard(model):
    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp(model):
    return torch.compile(_shard(model), **HOW)


def fsdp_by_block(model):
    for block in model.blocks:
        block.compile(**HOW)
    return _shard(model)


WAYS = {f.__name__: f for f in (ddp, ddp_of_compiled, fsdp, fsdp_by_block)}


def loss(model, x):
    return model(x).square().mean()


def check(how: str, rank: int, device: torch.device) -> None:
    torch.manual_seed(0)  # the same model and data on each rank
    model = Stack(2, heads=WIDTH // 64).to(device)
    data = tokens(batch=dist.get_world_size(), width=WIDTH).to(device)
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    loss(plain, data).backward()
    loss(exact, data.double()).backward()

    run = WAYS[how](model)
    for _ in range(2):  # the second pass finds everything compiled
        model.zero_grad()
        loss(run, data[rank : rank + 1]).backward()
    for (name, one), other, third in zip(model.named_parameters(), plain.parameters(), exact.parameters(), strict=True):
        grad = one.grad.full_tensor() if how.startswith("fsdp") else one.grad
        assert_l2_as_accurate(grad, other.grad, third.grad, label=f"{how}: {name}")
    report = fg_inductor.report()
    assert report.rewritten == len(report) == 2, f"{how}: {report}"
    print(f"{how}: {torch._dynamo.utils.counters['stats']['unique_graphs']} graphs")
    torch._dynamo.reset()


def main(rank: int, world_size: int, store: str, ways: list[str]) -> None:
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    for how in ways:
        check(how, rank, device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
