"""How far a video is from a reference: PSNR, SSIM, and two figures of its motion.

Videos are [frames, C, H, W] in [0, 1]. Sparse against dense attention of one model from one seed, they say what
sparsity changed, not which video is better.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def psnr(video: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB."""
    error = (video.float() - reference.float()).square().mean().item()
    return 10 * math.log10(1 / error) if error else math.inf


def ssim(video: Tensor, reference: Tensor, side: int = 11, sigma: float = 1.5) -> float:
    """Structural similarity (Wang et al., 2004) of each frame and colour, the mean: a Gaussian window of 11x11.

    Frames must be at least as large as the window.
    """
    at = torch.arange(side, dtype=torch.float64) - side // 2
    line = (-(at**2) / (2 * sigma**2)).exp()
    window = (line[:, None] * line / line.sum() ** 2)[None, None].to(video.device)

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(x.flatten(0, 1)[:, None], window)

    x, y = video.double(), reference.double()
    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2  # for a range of 1
    similar = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (similar / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean().item()


def motion_error(video: Tensor, reference: Tensor) -> float:
    """||d(video) - d(reference)|| / ||d(reference)||, d the change from frame to frame: 0 where all moves alike.

    Differences that stand still don't count; those that move or flicker do.
    """
    change, expected = video.float().diff(dim=0), reference.float().diff(dim=0)
    return ((change - expected).norm() / expected.norm()).item()


def flicker(video: Tensor, reference: Tensor) -> float:
    """||d(d(video))|| / ||d(d(reference))||: 1 where it is as steady as the reference, more where it flickers."""
    return (video.float().diff(n=2, dim=0).norm() / reference.float().diff(n=2, dim=0).norm()).item()


def compare(video: Tensor, reference: Tensor) -> dict[str, float]:
    """All four by name."""
    found = {"psnr_db": psnr(video, reference), "ssim": ssim(video, reference)}
    return found | {"motion_error": motion_error(video, reference), "flicker": flicker(video, reference)}
