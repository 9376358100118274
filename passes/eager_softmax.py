"""Attention written by hand, softmax(q k^T) v, in any spelling -> SDPA, which stands in for it until it is decided on.

Each softmax is a starting point. Upwards, through scales, masks and casts, must stand a product of two tensors with
the keys as columns; downwards, through casts and dropout, a product that sums over those keys. What lies between is
arithmetic that SDPA has too, or the site is refused by name. A softmax without both products is no attention (routers,
linear attention) and no site.

    scores   mul or div by constants on either side of the masks, baddbmm's alpha and beta, minus their maximum
    masks    added (of any shape: the rules for masks decide), masked_fill or where with a large negative number
    casts    float32 softmax, before or behind; q and k cast up for it are read as they were before
    heads    in a dimension of their own, or folded into the batch
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node

from fg_inductor.kernels.reference import MASKED_BELOW
from fg_inductor.passes.graph import CASTS, argument, name, names, permutation, same, value
from fg_inductor.passes.products import Product, product_of
from fg_inductor.passes.program import written
from fg_inductor.passes.stand_in import Form, Unknown

CALLS = names("softmax _softmax _safe_softmax")
COPIES = CASTS - names("bool detach")
MULTIPLIED = names("mul imul mul_ multiply")
DIVIDED = names("truediv div itruediv div_ divide true_divide")
ADDED = names("add iadd add_")
RESHAPES = names("view reshape flatten unflatten _unsafe_view")
CONSTANTS = {"tensor": 0, "scalar_tensor": 0, "full": 1, "full_like": 1}  # where their number stands
# Elementwise arithmetic that SDPA does not have, or not there: a site with it is attention, and refused.
UNKNOWN = MULTIPLIED | DIVIDED | ADDED | names(
    "sub isub sub_ rsub tanh clamp clip relu sigmoid exp pow neg abs where masked_fill masked_fill_ nan_to_num dropout "
    "minimum maximum"
)  # fmt: skip
REASON = "attention of an unknown form"


def find(calls: list[Node]) -> Iterator[Form | Unknown]:
    """Each attention that is written by hand, of the CALLS in a graph."""
    for node in calls:
        x = argument(node, 0, "input", "self")
        if isinstance(value(x), Tensor) and isinstance(value(node), Tensor) and value(x).dim() >= 3:
            up, down = _upwards(x), _downwards(node)
            if up and down:
                form = f"{name(up.product.node)}, softmax, {name(down.product.node)}"
                yield _match(node, up, down) or Unknown(node, REASON, form)


@dataclass
class _Way:
    """The way from a softmax to a product: up to that of q and k, or down to that with v.

    inside   the nodes on it, the softmax and the product of q and k included
    rows     which operand of the product are the probabilities
    refused  what was met that SDPA can't do
    """

    product: Product | None = None
    inside: list[Node] = field(default_factory=list)
    factor: float = 1.0
    masks: list[tuple[Node, float]] = field(default_factory=list)
    kept: list[Node] = field(default_factory=list)  # conditions: True where a key is kept
    dropped: list[Node] = field(default_factory=list)  # conditions: True where a key is masked
    dropout_p: object = 0.0
    rows: int = 0
    refused: tuple[str, str] | None = None

    def refuse(self, detail: str, reason: str = REASON) -> None:
        self.refused = self.refused or (reason, detail)


def _match(softmax: Node, up: _Way, down: _Way) -> Form | None:
    qk, pv, node = up.product, down.product, down.product.node
    scores, probabilities = value(qk.node), value(pv.operands[down.rows])
    rows = 1 if qk.letters[2][-1] in qk.letters[0] else 0  # the operand without the columns is q
    roles, sums = qk.roles(rows), pv.roles(down.rows)
    if not roles or not sums or scores.dim() != probabilities.dim():
        return None
    q, k, v = qk.operands[rows], qk.operands[1 - rows], pv.operands[1 - down.rows]
    of_q, of_k = qk.letters[rows], qk.letters[1 - rows]
    of_p, of_v = pv.letters[down.rows], pv.letters[1 - down.rows]
    batch, row, channel, column = roles
    p_batch, p_row, p_column, v_channel = sums
    p_batch = "".join(sorted(p_batch, key=of_p.index))  # as the scores have it
    orders = [of_q.index(c) for c in batch + row + channel], [of_k.index(c) for c in batch + column + channel]
    order_v = [of_v.index(c) for c in p_batch + p_column + v_channel]

    refused = up.refused or down.refused
    if argument(softmax, 1, "dim") not in (-1, value(softmax).dim() - 1):
        refused = refused or (REASON, "softmax over another dimension than the last")
    if qk.letters[2] != batch + row + column or of_p != p_batch + p_row + p_column:
        refused = refused or (REASON, "keys are not the last dimension of scores and probabilities")
    if not all(map(same, scores.shape, probabilities.shape)):
        refused = refused or (REASON, "scores and probabilities differ in shape")
    if up.factor <= 0:
        refused = refused or (REASON, f"scores multiplied by {up.factor:g}")

    inside, factor = [*reversed(up.inside), *down.inside], up.factor
    read = [_behind_upcast(x, order, value(v).dtype) for x, order in zip((q, k), orders, strict=True)]
    if all(read):
        operands, factors, passed = [x[:2] for x in read], [x[2] for x in read], [n for x in read for n in x[3]]
        factor *= factors[0] * factors[1]
    else:
        operands, passed = list(zip((q, k), orders, strict=True)), []
    refused = refused or _used_elsewhere(inside, down.inside, node) or _disturbed({*inside, *passed}, inside, node)
    dtype, problem = _compute_dtype(operands[0][0], operands[1][0], v, qk, node)
    return Form(
        f"{name(qk.node)}, softmax, {name(node)}", node, [*inside, node], refused or problem, q=operands[0],
        k=operands[1], v=(v, order_v), out=[(p_batch + p_row + v_channel).index(c) for c in pv.letters[2]],
        scale=factor, masks=up.masks, kept=up.kept, dropped=up.dropped, dropout_p=down.dropout_p, dtype=dtype,
    )  # fmt: skip


# Upwards: scores


def _upwards(node: Node) -> _Way | None:
    """From the input of a softmax to the product of q and k; None where none is reached."""
    way = _Way()
    while True:
        way.inside.append(node)
        way.product = product_of(node)
        if way.product:
            if way.product.added:
                mask, beta = way.product.added
                way.masks.append((mask, way.factor * beta))
            way.factor *= way.product.factor
            return way
        node = _step_up(node, way)
        if not isinstance(value(node), Tensor):
            return None


def _step_up(node: Node, way: _Way) -> Node | None:
    method, x = name(node), value(node)
    inputs = [y for y in node.args if isinstance(value(y), Tensor)]
    if not isinstance(x, Tensor) or not inputs or node.kwargs.get("out") is not None:
        return None
    first, second = (*node.args[:2], None)[:2]
    if method in COPIES:
        return first if x.is_floating_point() else None
    if method in RESHAPES:
        return first if _keeps_matrices(first, node) else None
    if method in MULTIPLIED or (method in DIVIDED and "rounding_mode" not in node.kwargs):
        numbers = [_number(y) for y in (first, second)]
        if numbers[1] is not None and (method in MULTIPLIED or numbers[1] != 0):
            way.factor *= numbers[1] if method in MULTIPLIED else 1 / numbers[1]
            return first
        if numbers[0] is not None and method in MULTIPLIED:
            way.factor *= numbers[0]
            return second
        way.refuse(f"scores times {_other(node, inputs)}", "scale is not a constant")
    elif method in ADDED and not {"alpha"} & node.kwargs.keys() and len(node.args) == 2:
        if _number(second) is not None or _number(first) is not None:
            return first if _number(first) is None else second  # softmax does not see it
        lead = [y for y in inputs if _upwards(y)]
        if len(lead) == 1:
            way.masks.append((second if lead[0] is first else first, way.factor))
            return lead[0]
        way.refuse(f"{len(lead)} products are added to the scores")
    elif method in ("sub", "isub", "sub_") and len(node.args) == 2:
        if _number(second) is not None:
            return first
        if chain := _maximum(second, first):
            way.inside += chain
            return first
        way.refuse("something other than their maximum is taken from the scores")
    elif method in ("masked_fill", "masked_fill_") and _is_low(_number(argument(node, 2, "value"))):
        way.dropped.append(argument(node, 1, "mask"))
        return first
    elif method == "where" and len(node.args) == 3:
        condition, a, b = node.args
        if _is_low(_number(b)):
            way.kept.append(condition)
            return a
        if _is_low(_number(a)):
            way.dropped.append(condition)
            return b
    if method not in UNKNOWN:
        return None
    way.refuse(f"{method} between q k^T and softmax")
    return next((y for y in inputs if all(map(same, value(y).shape, x.shape)) and value(y).dim() == x.dim()), None)


def _number(x) -> float | None:
    """A constant: a number, or a tensor made of one."""
    if isinstance(x, (int, float)) and not isinstance(x, bool):
        return float(x)
    if not isinstance(x, Node):
        return None
    if name(x) in COPIES and x.args:
        return _number(x.args[0])
    position = CONSTANTS.get(name(x))
    found = None if position is None else argument(x, position, "fill_value", "data")
    return float(found) if isinstance(found, (int, float)) and not isinstance(found, bool) else None


def _is_low(number: float | None) -> bool:
    return number is not None and number < MASKED_BELOW


def _other(node: Node, inputs: list[Node]) -> str:
    return " and ".join(name(x) or "an input" for x in inputs if value(x).dim() < value(node).dim()) or "a tensor"


def _maximum(node, of) -> list[Node] | None:
    """The nodes of ``of.amax(-1, keepdim=True)``, or of ``max``, detached or not; None for another tensor."""
    chain: list[Node] = []
    while isinstance(node, Node):
        chain.append(node)
        method, source = name(node), node.args[0] if node.args else None
        if method in ("amax", "max") and source is of:
            dim, last = argument(node, 1, "dim"), value(of).dim() - 1
            dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
            return chain if dim in (-1, last) and argument(node, 2, "keepdim") is True else None
        of_a_pair = method in ("getattr", "getitem") and node.args[1] in ("values", 0)
        if method != "detach" and not of_a_pair:
            return None
        node = source
    return None


def _keeps_matrices(a: Node, b: Node) -> bool:
    x, y = value(a), value(b)
    return x.dim() > 2 and y.dim() > 2 and all(map(same, x.shape[-2:], y.shape[-2:]))


# Downwards: probabilities


def _downwards(node: Node) -> _Way | None:
    """From a softmax to the product that sums over the keys; None where none is reached."""
    users = [user for user in node.users if isinstance(value(user), Tensor)]
    for user in users:
        product = product_of(user)
        if product and product.operands.count(node) == 1:
            return _Way(product, [node], rows=product.operands.index(node))
    for user in users:
        method = name(user)
        if not user.args or (user.args[0] is not node and method not in MULTIPLIED):
            continue
        follows = method in COPIES or method in UNKNOWN or (method in RESHAPES and _keeps_matrices(node, user))
        way = _downwards(user) if follows else None
        if way is None:
            continue
        way.inside.insert(0, node)
        if method == "dropout":
            training = argument(user, 2, "training", "train", default=True)
            p = argument(user, 1, "p", default=0.5)
            way.dropout_p = way.dropout_p if training is False or p == 0 else p
        elif method in UNKNOWN:
            way.refuse(f"{method} between softmax and the product with v")
        return way
    return None


# What must hold around it


def _used_elsewhere(inside: list[Node], probabilities: list[Node], last: Node) -> tuple[str, str] | None:
    own = {*inside, last}
    for node in inside:
        for user in node.users:
            if user not in own and (user.op == "output" or isinstance(value(user), (Tensor, tuple, list))):
                what = "probabilities" if node in probabilities else "scores"
                return f"attention {what} are used elsewhere", f"by {name(user) or 'the caller'}"
    return None


def _disturbed(span: set[Node], inside: list[Node], last: Node) -> tuple[str, str] | None:
    """SDPA reads q, k and masks where v is read: what is written in place before that would be seen."""
    node, left, own = last.prev, span - {last}, set(inside)
    while left:
        if written(node) and node not in own:
            return "tensors are written in place inside of it", f"by {name(node)}"
        left.discard(node)
        node = node.prev
    return None


def _behind_upcast(node: Node, order: list[int], dtype: torch.dtype):
    """(tensor of ``dtype``, its order, factor, nodes passed) behind a cast to a wider dtype, or None.

    q and k that are cast up for exact scores are multiplied exactly by attention too: it accumulates in float32.
    """
    factor, passed = 1.0, []
    while value(node).dtype != dtype:
        if not node.op.startswith("call") or not node.args or not isinstance(value(node.args[0]), Tensor):
            return None
        passed.append(node)
        source, method = node.args[0], name(node)
        if (step := permutation(node)) is not None:
            order = [step[d] for d in order]
        elif method in (MULTIPLIED | DIVIDED) and len(node.args) == 2 and (number := _number(node.args[1])):
            factor *= number if method in MULTIPLIED else 1 / number
        elif method not in COPIES or torch.promote_types(value(source).dtype, value(node).dtype) != value(node).dtype:
            return None
        node = source
    return node, order, factor, passed


def _compute_dtype(q: Node, k: Node, v: Node, qk: Product, last: Node):
    """(dtype to cast q, k and v to, None where they are as they must be; refusal)."""
    dtypes, result = [value(x).dtype for x in (q, k, v)], value(last).dtype
    if all(dtype == result for dtype in dtypes):
        return None, None
    widest = torch.promote_types(torch.promote_types(*dtypes[:2]), dtypes[2])
    if value(qk.node).dtype == result != widest:
        return None, None  # autocast is on, and casts SDPA's arguments as it does those of the products
    if torch.promote_types(widest, result) != widest or value(qk.node).dtype != torch.promote_types(*dtypes[:2]):
        return None, (REASON, "its dtype changes inside of it")
    return widest, None
