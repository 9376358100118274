"""The one custom pass on the joint graph; its ``uuid`` salts Inductor's caches.

Their key holds the text of the graph: which ops are called, with what. It does not hold what the ops mean, so after a
change of a fake, of what backward saves or of a kernel's launcher they would serve code compiled for the old ones.
"""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from fg_inductor.passes import checkpoint


@functools.cache
def source_hash(*folders: Path) -> str:
    """Hex digest of every Python file below ``folders``, names included. Read once in a process."""
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


class JointPass(CustomGraphPass):
    """Keeps masks with their attention, after the hooks that the user has installed.

    Inductor in torch 2.11 takes one hook only, so that ours calls the user's. ``uuid`` is None, which turns the caches
    off, where one of theirs has none: the same as without us.
    """

    def __init__(self, salt: str, before: tuple[Callable[[fx.Graph], None], ...] = ()):
        self.salt = salt
        self.before = before

    def __call__(self, graph: fx.Graph) -> None:
        for hook in self.before:
            hook(graph)
        checkpoint.save_masks(graph)

    def uuid(self) -> tuple | None:
        theirs = [hook.uuid() if isinstance(hook, CustomGraphPass) else None for hook in self.before]
        return (self.salt, *theirs) if all(theirs) else None
