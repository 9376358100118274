"""Fine-grained sparse attention for video transformers: ``torch.compile(model, backend="fgattn")``."""

from fg_inductor.backend import explain, register, rewrite
from fg_inductor.kernels import ops  # noqa: F401  (registers torch.ops.fgattn)
from fg_inductor.report import report, reset
from fg_inductor.selectors import register_selector

__all__ = ["explain", "register", "register_selector", "report", "reset", "rewrite"]
