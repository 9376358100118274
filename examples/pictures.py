"""The quickstart's picture: frames, the block mask of one head, and the keys that one query slice reads."""

import matplotlib
import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from fg_inductor.kernels.mask import group_count, unpack
from fg_inductor.settings import Settings

INK, KEPT, DROPPED, QUERY = "#22262b", "#1f5fa8", "#eef1f4", "#ff8c1a"
AMPLIFY = 8  # of the difference between dense and sparse
PIXELS = 1300  # about the width of the block mask


def draw(
    clip: Tensor,
    noisy: Tensor,
    dense: Tensor,
    sparse: Tensor,
    mask: Tensor,
    order: Tensor,
    grid: tuple[int, int, int],
    settings: Settings,
    title: str,
    head: str,
) -> Figure:
    """Clips are [1, 3, frames, side, side]; mask int32 [T, W] is one head's, order int32 [S] that of queries and keys.

    The grid is in tokens.
    """
    keep = unpack(mask, group_count(len(order), settings.n))  # [slices, groups]
    with matplotlib.rc_context({"font.size": 9, "text.color": INK, "axes.edgecolor": "#9aa3ad"}):
        figure = Figure(figsize=(12, 10.4), layout="constrained", facecolor="white")
        top, middle, bottom = figure.subfigures(3, 1, height_ratios=(5.2, 2.4, 2.8))
        _draw_frames(top, clip, noisy, dense, sparse, title)
        _draw_mask(middle, keep, settings, head)
        _draw_slice(bottom, clip, keep, order, grid, settings)
    return figure


def _draw_frames(figure, clip, noisy, dense, sparse, title):
    figure.suptitle(title, fontsize=12, fontweight="bold")
    difference = (sparse - dense).abs().mean(1, keepdim=True).expand_as(sparse) * AMPLIFY - 1
    columns = {
        "clip": clip,
        "with noise": noisy,
        "denoised, dense": dense,
        "denoised, sparse": sparse,
        f"difference x {AMPLIFY}": difference,
    }
    shown = (0, clip.shape[2] - 1)
    axes = figure.subplots(len(shown), len(columns))
    for j, (name, video) in enumerate(columns.items()):
        axes[0, j].set_title(name)
        for i, frame in enumerate(shown):
            axes[i, j].imshow(_picture(video, frame).numpy())
            axes[i, j].set(xticks=[], yticks=[])
    for i, frame in enumerate(shown):
        axes[i, 0].set_ylabel(f"frame {frame}")


def _draw_mask(figure, keep, settings, head):
    axis = figure.subplots()
    colours = LinearSegmentedColormap.from_list("kept", [DROPPED, KEPT])
    smooth = "nearest" if keep.shape[1] < PIXELS else "antialiased"
    axis.imshow(keep.float().numpy(), aspect="auto", interpolation=smooth, cmap=colours, vmin=0, vmax=1)
    axis.set_title(f"block mask of {head}: blue is computed, {keep.float().mean():.0%} of all", loc="left")
    axis.tick_params(length=0)
    axis.set_xlabel(f"key groups of {settings.n}, in the order of the slices")
    axis.set_ylabel(f"query slices of {settings.m}")


def _draw_slice(figure, clip, keep, order, grid, settings):
    """The tokens of one slice, outlined, and in every frame the keys that they read; dropped keys are faded."""
    frames, height, width = grid
    center = (frames // 2 * height + height // 2) * width + width // 2
    row = int((order == center).nonzero()[0, 0]) // settings.m
    kept = torch.empty(len(order), dtype=torch.bool)
    kept[order.long()] = keep[row].repeat_interleave(settings.n)[: len(order)]
    kept = kept.view(grid)
    queries = torch.zeros(len(order), dtype=torch.bool)
    queries[order[row * settings.m : (row + 1) * settings.m].long()] = True
    queries = queries.view(grid)

    middle, last = frames // 2, frames - 1
    shown = sorted({0, middle // 2, middle, (middle + last + 1) // 2, last})
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    figure.suptitle(
        f"the keys that slice {row} reads, {kept.float().mean():.0%} of all; its {settings.m} queries are outlined",
        x=0.01,
        ha="left",
        fontsize="large",
    )
    patch = clip.shape[-1] // width
    for frame, axis in zip(shown, axes, strict=True):
        axis.set(xticks=[], yticks=[], xlabel=f"frame {frame}")
        shade = kept[frame].repeat_interleave(patch, 0).repeat_interleave(patch, 1)[..., None]
        picture = _picture(clip, frame)
        axis.imshow(torch.where(shade, picture, 0.82 + 0.12 * picture).numpy())
        if queries[frame].any():
            y, x = queries[frame].nonzero().T
            corner, size = (int(x.min()), int(y.min())), (int(x.max() - x.min()) + 1, int(y.max() - y.min()) + 1)
            box = Rectangle([c * patch - 0.5 for c in corner], *(s * patch for s in size), fill=False)
            box.set(edgecolor=QUERY, linewidth=2)
            axis.add_patch(box)


def _picture(video: Tensor, frame: int) -> Tensor:
    """[side, side, 3] in [0, 1], on the CPU."""
    return ((video[0, :, frame].permute(1, 2, 0).float().cpu() + 1) / 2).clamp(0, 1)
