"""Train a small video diffusion transformer, with dense or with sparse attention. Only ``--backend`` differs.

    python examples/train_video_dit.py --data FOLDER --out runs/dense
    python examples/train_video_dit.py --data FOLDER --out runs/sparse --backend fgattn \\
        --options '{"fgattn.density": 0.3, "fgattn.tail": "pooled"}'
    python examples/train_video_dit.py --plot runs/dense/log.jsonl runs/sparse/log.jsonl --out losses.png

The model is diffusers' ``WanTransformer3DModel`` (Wan 2.1's architecture): 6 layers, 4 heads x 128, 21 M parameters.
It learns from scratch and in pixel space, by flow matching: see ``train``, which is an ordinary training loop and knows
nothing of fgattn. FOLDER holds mp4 files; without it the one clip in ``examples/assets`` is all there is to learn.

A run writes ``log.jsonl``, a line for each step, and ``step-N/``, the weights as diffusers stores them and the state of
the optimizer; ``--resume`` goes on from there. All that is random about a sample follows from the seed and its number:
two runs with the same seed see the same clips, noise and noise levels, and a resumed run those that it would have seen.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import cv2
import torch
import torch._inductor.config
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

PATCH = 8  # pixels, the side of a token
WEIGHTS = "diffusion_pytorch_model.safetensors"
TEXT = (8, 64)  # tokens and width of what stands for a text
SHIFT = 3.0  # of noise levels towards noise, as for large images (Esser et al. 2024, section 5.3.2)
WARM_UP = 100  # steps until the full learning rate
SMOOTH = 100  # steps in the running mean of a plot
SAME = ("data", "frames", "side", "batch", "seed", "lr", "layers", "heads")  # arguments that a resumed run keeps


# Training


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable, first: int, lr: float, device: str
) -> Iterator[dict]:
    """One optimizer step for each batch; yields {"step", "loss", "grad_norm", "seconds"}, steps counted from ``first``.

    A batch is what ``Clips`` describes. At noise level s the model sees ``(1 - s) * clip + s * noise`` at timestep
    1000 s, and learns to predict ``noise - clip``. Raises FloatingPointError where the loss is not finite.
    """
    model.train()
    for step, batch in enumerate(batches, first):
        start = time.perf_counter()
        clip, text, level, noise = (x.to(device, non_blocking=True) for x in batch)
        s = level.view(-1, 1, 1, 1, 1)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            velocity = model((1 - s) * clip + s * noise, 1000 * level, text, return_dict=False)[0]
        loss = F.mse_loss(velocity.float(), noise - clip)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / WARM_UP)
        optimizer.step()
        optimizer.zero_grad()
        record = {"step": step, "loss": loss.item(), "grad_norm": norm.item()}  # waits for all of the step
        if not torch.isfinite(loss):
            raise FloatingPointError(f"train: the loss of step {step} is {record['loss']}; try a lower --lr than {lr}.")
        yield {**record, "seconds": time.perf_counter() - start}


# Data


class Clips(Dataset):
    """Sample i: (clip [3, frames, side, side] in [-1, 1], text [8, 64], noise level [], noise like the clip), float32.

    A file, its first frame, the place of the square in the picture, level and noise are drawn from (seed, i).
    A fixed random text stands for each file. Raises ValueError where no file in the folder is long enough.
    """

    def __init__(self, folder: str | Path, frames: int, side: int, seed: int = 0):
        self.frames, self.side, self.seed = frames, side, seed
        lengths = {path: _frame_count(path) for path in sorted(Path(folder).glob("*.mp4"))}
        self.files = [(path, length) for path, length in lengths.items() if length >= frames]
        if not self.files:
            longest = max(lengths.values(), default=0)
            raise ValueError(
                f"Clips: of {len(lengths)} mp4 files in {folder} none has {frames} frames, the longest has {longest}; "
                "give another folder with --data, or fewer --frames."
            )

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # The generator takes 32 bits; samples of one run never share a seed.
        random = torch.Generator().manual_seed((self.seed * 1_000_003 + index) % 2**32)
        path, length = self.files[torch.randint(len(self.files), (), generator=random)]
        start = int(torch.randint(length - self.frames + 1, (), generator=random))
        place = torch.rand(2, generator=random).tolist()
        u = torch.rand((), generator=random)
        clip = _read(path, start, self.frames, self.side, place)
        return clip, _text(path.stem), SHIFT * u / (1 + (SHIFT - 1) * u), torch.randn(clip.shape, generator=random)


def _frame_count(path: Path) -> int:
    return int(cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT))


def _read(path: Path, start: int, frames: int, side: int, place: list[float]) -> Tensor:
    """A square at ``place``, from (0, 0) top left to (1, 1), of pictures whose short side is scaled to ``side``."""
    video = cv2.VideoCapture(str(path))
    video.set(cv2.CAP_PROP_POS_FRAMES, start)
    pictures = []
    for _ in range(frames):
        more, picture = video.read()
        if not more:
            raise ValueError(
                f"Clips: {path} ends at frame {start + len(pictures)}, before its length says; replace it."
            )
        scale = side / min(picture.shape[:2])
        size = [max(side, round(x * scale)) for x in picture.shape[1::-1]]
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        top, left = (int(p * (x - side)) for p, x in zip(place, picture.shape[:2], strict=True))
        pictures.append(torch.from_numpy(picture[top : top + side, left : left + side, ::-1].copy()))  # BGR to RGB
    return torch.stack(pictures).permute(3, 0, 1, 2).float() / 127.5 - 1


def _text(name: str) -> Tensor:
    seed = int(hashlib.md5(name.encode()).hexdigest()[:8], 16)
    return torch.randn(TEXT, generator=torch.Generator().manual_seed(seed))


# Checkpoints: a folder of safetensors, complete where it has its name


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write ``folder/step-N``, to go on with step N, and remove older ones."""
    new = folder / f"step-{step:08d}"
    partial = new.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    old = list(folder.glob("step-*"))
    model.save_pretrained(partial)
    state = optimizer.state_dict()["state"]
    tensors = {f"{i}.{name}": x.contiguous() for i, values in state.items() for name, x in values.items()}
    save_file(tensors, partial / "optimizer.safetensors")
    if new in old:
        shutil.rmtree(new)
    partial.rename(new)
    for path in old:
        if path != new:
            shutil.rmtree(path)


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore the newest checkpoint in ``folder``; returns the step to go on with, 0 where there is none."""
    complete = sorted(path for path in folder.glob("step-*") if not path.suffix)
    if not complete:
        return 0
    model.load_state_dict(load_file(complete[-1] / WEIGHTS))
    state: dict[int, dict[str, Tensor]] = {}
    for key, x in load_file(complete[-1] / "optimizer.safetensors").items():
        index, name = key.split(".")
        state.setdefault(int(index), {})[name] = x
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(complete[-1].name.removeprefix("step-"))


def _read_log(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _open_log(path: Path, first: int):
    """The log, to append to, without what a run that was cut off wrote after its last checkpoint."""
    kept = [record for record in _read_log(path) if record["step"] < first]
    path.write_text("".join(json.dumps(record) + "\n" for record in kept))
    return path.open("a", buffering=1)


def _check_same(path: Path, args: argparse.Namespace, resume: bool) -> None:
    """Note what the run is made of; where one is resumed, it must be the same."""
    now = {name: getattr(args, name) for name in SAME}
    before = json.loads(path.read_text()) if resume and path.exists() else now
    if differ := [f"--{name} was {before[name]}, is {now[name]}" for name in SAME if before[name] != now[name]]:
        raise SystemExit(f"train_video_dit: --resume goes on with the run in {args.out}, but {', '.join(differ)}.")
    path.write_text(json.dumps(now, indent=1) + "\n")


# Commands


def main() -> None:
    args = parse_args()
    if args.plot:
        plot([Path(path) for path in args.plot], args.out)
    else:
        run(args)


def run(args: argparse.Namespace) -> None:
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    _check_same(folder / "run.json", args, args.resume)

    if torch.__version__ < (2, 15):  # or Inductor loses gradients of scale_shift_table: pytorch/pytorch#193061
        torch._inductor.config.triton.mix_order_reduction = False

    torch.manual_seed(args.seed)
    model = WanTransformer3DModel(
        patch_size=(1, PATCH, PATCH), num_attention_heads=args.heads, attention_head_dim=128, num_layers=args.layers,
        ffn_dim=256 * args.heads, in_channels=3, out_channels=3, text_dim=TEXT[1], freq_dim=256, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=1024,
    ).to(args.device)  # fmt: skip
    if args.checkpointing:
        model.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)
    first = load(folder, model, optimizer) if args.resume else 0

    model.save_config(folder)  # adds an entry to the configuration: later, a compiled model would be compiled again
    if args.backend != "eager":
        model.compile(backend=args.backend, options=args.options)

    tokens = args.frames * (args.side // PATCH) ** 2
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {args.batch} x {tokens:,} tokens a step"
    )
    clips = Clips(args.data, args.frames, args.side, args.seed)
    numbers = range(first * args.batch, args.steps * args.batch)
    batches = DataLoader(clips, args.batch, sampler=numbers, num_workers=args.workers, pin_memory=args.device == "cuda")
    progress = tqdm(total=args.steps, initial=first, unit="step")
    with _open_log(folder / "log.jsonl", first) as log, progress:
        for record in train(model, optimizer, batches, first, args.lr, args.device):
            log.write(json.dumps(record) + "\n")
            progress.update()
            progress.set_postfix(loss=f"{record['loss']:.4f}")
            done = record["step"] + 1
            if done % args.save_every == 0 or done == args.steps:
                save(folder, done, model, optimizer)

    if args.backend == "fgattn":
        import fg_inductor

        print(fg_inductor.report())
    records = _read_log(folder / "log.jsonl")
    print(f"{folder}: {summary(records)}" if records else f"{folder}: nothing to do")


def summary(records: list[dict]) -> str:
    """The mean loss of the last steps, and the median time of a step."""
    last = records[-SMOOTH:]
    loss, seconds = statistics.mean(r["loss"] for r in last), statistics.median(r["seconds"] for r in records)
    return f"loss {loss:.4f} (mean of the last {len(last)} steps), {seconds * 1000:.4g} ms a step (median)"


def plot(paths: list[Path], out: str) -> None:
    """Draw the running mean of each log's loss, over the steps and over the time spent in them."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    over_steps, over_time = figure.subplots(1, 2, sharey=True)
    for path in paths:
        records = _read_log(path)
        if not records:
            raise SystemExit(f"train_video_dit: --plot {path}: there is no such log, or it is empty.")
        losses, steps = torch.tensor([r["loss"] for r in records]).double(), [r["step"] + 1 for r in records]
        # The first step compiles; what it takes is said nowhere, so that both curves start where training does.
        typical = statistics.median(r["seconds"] for r in records)
        minutes = torch.tensor([min(r["seconds"], 10 * typical) for r in records]).cumsum(0) / 60
        window = min(SMOOTH, 1 + len(records) // 10)
        mean = losses.unfold(0, window, 1).mean(-1)
        (line,) = over_steps.plot(steps[window - 1 :], mean, label=f"{path.parent.name}: {summary(records)}")
        over_steps.plot(steps, losses, color=line.get_color(), alpha=0.15, linewidth=0.5)
        over_time.plot(minutes[window - 1 :], mean, color=line.get_color())
    over_steps.set(xlabel="step", ylabel=f"loss, mean of up to {SMOOTH} steps", yscale="log")
    for set_formatter in (over_steps.yaxis.set_major_formatter, over_steps.yaxis.set_minor_formatter):
        set_formatter(LogFormatter(minor_thresholds=(1, 0.5)))
    over_time.set(xlabel="minutes of training, without compilation and reading of clips")
    figure.legend(loc="outside upper center", frameon=False)
    figure.savefig(out, dpi=110)
    print(out)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(Path(__file__).resolve().parent / "assets"), help="a folder of mp4 files")
    parser.add_argument("--out", help="a folder for the run (fgattn_training), or the file of a plot (losses.png)")
    parser.add_argument("--backend", default="inductor", help="of torch.compile: inductor, fgattn, ...; or eager")
    parser.add_argument("--options", type=json.loads, help="of torch.compile, as JSON")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--steps", type=int, default=2000, help="the step to stop at")
    parser.add_argument("--save-every", type=int, default=500, metavar="STEPS")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--side", type=int, default=256, help="pixels, a multiple of 8")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1.5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes that read clips")
    parser.add_argument("--checkpointing", action="store_true", help="recompute blocks in backward, to save memory")
    parser.add_argument("--deterministic", action="store_true", help="the same bits in every run on a GPU, and slower")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plot", nargs="+", metavar="LOG", help="draw these logs instead of training")
    args = parser.parse_args()
    if args.side % PATCH:
        parser.error(f"--side {args.side} is not a multiple of {PATCH}")
    args.out = args.out or ("losses.png" if args.plot else "fgattn_training")
    return args


if __name__ == "__main__":
    main()
