"""Fine-grained sparse attention for video transformers: ``torch.compile(model, backend="fgattn")``."""

from fg_inductor.backend import explain, register, reset, rewrite
from fg_inductor.calibration import calibrate
from fg_inductor.denoising import denoising
from fg_inductor.kernels import ops  # noqa: F401  (registers torch.ops.fgattn)
from fg_inductor.report import report
from fg_inductor.selectors import register_selector

__all__ = ["calibrate", "denoising", "explain", "register", "register_selector", "report", "reset", "rewrite"]
