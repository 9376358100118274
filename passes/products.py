"""Products of two tensors as letters, however they are written: matmul, @, bmm, baddbmm, einsum."""

import string
from dataclasses import dataclass

from torch import Tensor
from torch.fx import Node

from fg_inductor.passes.graph import argument, name, names, same, value

MATMULS = names("matmul bmm __matmul__ mm")


@dataclass(frozen=True)
class Product:
    """``node`` = factor * einsum("letters of a, letters of b -> letters of the result", a, b) + added[1] * added[0]."""

    node: Node
    operands: tuple[Node, Node]
    letters: tuple[str, str, str]
    factor: float = 1.0
    added: tuple[Node, float] | None = None

    def roles(self, rows: int) -> tuple[str, str, str, str] | None:
        """(batch, row, contracted, column) letters, operand ``rows`` being the one with the rows.

        The batch letters are in the order of the result. None for a product that is no batch of matrix products.
        """
        x, y, out = self.letters[rows], self.letters[1 - rows], self.letters[2]
        batch = "".join(c for c in out if c in x and c in y)
        row, column = ("".join(c for c in a if c not in b and c in out) for a, b in ((x, y), (y, x)))
        contracted = "".join(c for c in x if c in y and c not in out)
        single = all(len(letters) == 1 for letters in (row, contracted, column))
        matrices = len(x) == len(y) == len(out) == len(batch) + 2
        return (batch, row, contracted, column) if single and matrices else None


def product_of(node: Node) -> Product | None:
    """The product that a node is; None for others, and for products that broadcast or sum over one operand."""
    if not node.op.startswith("call") or not isinstance(value(node), Tensor):
        return None
    method = name(node)
    if method in MATMULS:
        a, b = argument(node, 0, "input", "self"), argument(node, 1, "other", "mat2")
        return _matrix_product(node, a, b, 1.0, None)
    if method == "baddbmm":
        added, a, b = (argument(node, i, *keys) for i, keys in enumerate((("input",), ("batch1",), ("batch2",))))
        beta, alpha = argument(node, 3, "beta", default=1), argument(node, 4, "alpha", default=1)
        if not all(isinstance(x, (int, float)) for x in (alpha, beta)):
            return None
        return _matrix_product(node, a, b, float(alpha), None if beta == 0 else (added, float(beta)))
    return _einsum(node) if method == "einsum" else None


def _matrix_product(node: Node, a, b, factor: float, added) -> Product | None:
    x, y = value(a), value(b)
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or not x.dim() == y.dim() == value(node).dim() >= 2:
        return None
    batch = string.ascii_uppercase[: x.dim() - 2]
    return Product(node, (a, b), (batch + "id", batch + "dj", batch + "ij"), factor, added)


def _einsum(node: Node) -> Product | None:
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if not isinstance(equation, str) or "->" not in equation or len(operands) != 2:
        return None
    left, out = equation.replace(" ", "").split("->")
    terms = left.split(",")
    tensors = [value(x) for x in operands]
    if len(terms) != 2 or not all(isinstance(x, Tensor) for x in tensors):
        return None
    spare = [c for c in string.ascii_letters if c not in equation]
    widths = [x.dim() - len(term.replace("...", "")) for term, x in zip(terms, tensors, strict=True) if "..." in term]
    if len(set(widths)) > 1 or any(width < 0 for width in widths) or ("..." in out) != bool(widths):
        return None
    dots = "".join(spare[: widths[0]]) if widths else ""
    terms, out = [term.replace("...", dots) for term in terms], out.replace("...", dots)
    if any(len(set(term)) != len(term) for term in (*terms, out)) or len(out) != value(node).dim():
        return None
    if any(len(term) != x.dim() for term, x in zip(terms, tensors, strict=True)):
        return None
    sizes: dict[str, object] = {}
    for term, x in zip(terms, tensors, strict=True):
        for letter, size in zip(term, x.shape, strict=True):
            if not same(sizes.setdefault(letter, size), size):
                return None  # a letter of size 1 broadcasts
    return Product(node, tuple(operands), (*terms, out))
