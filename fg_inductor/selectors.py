"""Selectors of the user's own: operators that return the block mask, known by a name for ``fgattn.mask``."""

from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket

BUILT_IN = ("pooled", "observed", "dfs", "static", "dense")
ARGUMENTS = ("Tensor q", "Tensor k", "Tensor? key_bias", "Tensor? order", "float scale", "int m", "int n")
_TYPES = tuple(argument.partition(" ")[0] for argument in ARGUMENTS)

_registered: dict[str, OpOverload] = {}


def register_selector(name: str, op: Any) -> None:
    """Make ``op`` the selector of ``options={"fgattn.mask": name}``.

    op(q, k, key_bias, order, scale, m, n) -> mask int32 [B, Hq, T, W], as ``fg_inductor.kernels.mask.pack`` makes it of
    bool. An operator, as ``torch.library.custom_op`` makes it, with a fake that gives the mask's shape; see
    docs/selectors.md for one. It is called in place of ``fgattn::select_pooled``. What must stay dense (text) is added
    to its mask, and attention leaves out keys that ``key_bias`` masks.

    Raises ValueError where the name is taken, TypeError where ``op`` is no operator with these arguments.
    """
    overload = _overload(op)
    if overload is None:
        raise TypeError(
            f"fg_inductor.register_selector({name!r}): {op!r} is no operator; make it one with "
            "torch.library.custom_op, so that graphs that call it can be traced and cached."
        )
    schema = overload._schema
    types = tuple(str(argument.type) for argument in schema.arguments)
    wanted = tuple(_torchscript(x) for x in _TYPES)
    extra = schema.arguments[len(wanted) :]
    if types[: len(wanted)] != wanted or any(not x.has_default_value() for x in extra) or len(schema.returns) != 1:
        raise TypeError(
            f"fg_inductor.register_selector({name!r}): {schema} must take ({', '.join(ARGUMENTS)}), anything else with "
            "a default, and return one Tensor."
        )
    if name in BUILT_IN or _registered.get(name, overload) is not overload:
        raise ValueError(f"fg_inductor.register_selector: the name {name!r} is taken; choose another.")
    _registered[name] = overload


def _overload(op: Any) -> OpOverload | None:
    if isinstance(op, torch._library.custom_ops.CustomOpDef):
        op = op._opoverload
    if isinstance(op, OpOverloadPacket):
        op = op.default
    return op if isinstance(op, OpOverload) else None


def _torchscript(kind: str) -> str:
    return f"Optional[{kind[:-1]}]" if kind.endswith("?") else kind


def registered_selector(name: str) -> OpOverload | None:
    """The operator of a name; None for the built-in ones and for what nobody registered."""
    return _registered.get(name)


def selector_names() -> tuple[str, ...]:
    """All values of ``fgattn.mask``."""
    return (*BUILT_IN, *_registered)
