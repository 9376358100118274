"""Fine-grained sparse attention for video transformers: ``torch.compile(model, backend="fgattn")``."""

from fg_inductor.kernels import ops  # noqa: F401  (registers torch.ops.fgattn)
