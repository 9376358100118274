"""The bound on the bytes of observed masks, ``fgattn.state_bytes``: in which form they are kept within it."""

import collections
import logging
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from fg_inductor.denoising import Call
from fg_inductor.settings import Settings

if TYPE_CHECKING:
    from fg_inductor.state import Keeper

log = logging.getLogger(__name__)


class Budget:
    """Which of ``settings.levels`` keeps the masks of all models with the same settings within ``state_bytes``.

    What they need is known before it is allocated: the layers that share a graph are counted by the names of their
    weights. A branch of guidance counts from its first call on; masks that are then held too finely are let go, and
    observed anew: in larger groups, then with fewer masks than heads, at last in the memory of the host, which is not
    counted (and is where masks are anyhow for a model on a CPU).

    let_go  frees the masks of these settings that are kept by less than a level
    """

    def __init__(self, settings: Settings, let_go: Callable[[Settings, int], None]):
        self.settings, self.level, self._let_go = settings, 0, let_go
        self._needs: WeakKeyDictionary[nn.Module, dict[tuple, list[int]]] = WeakKeyDictionary()

    def fits(self, call: Call, keeper: "Keeper", args: tuple) -> bool:
        """Take note of a call, and choose ``level``. False where even the last level needs too much."""
        if self.settings.state_bytes is None or self.settings.state_memory == "host":
            return True
        needs, key = self._needs.setdefault(call.model, {}), (keeper.graph, call.branch)
        sizes, forms = keeper.sizes(args), keeper.forms[0]
        if (key, sizes) not in needs:
            for old in [known for known in needs if known[0] == key]:
                del needs[old]
            layers = _layers(call.model, [args[site.weight] for site in forms[0].sites])
            on_cpu = any(device.type == "cpu" for device in forms[0].devices)
            levels = [level for level in self.settings.levels if level.state_memory == "device" or not on_cpu]
            needs[key, sizes] = [
                self._bytes(keeper.mask_shapes(args, form), layers) if level.state_memory == "device" else 0
                for level, form in zip(levels, forms, strict=False)
            ]
            while self.level < len(levels) - 1 and self._total() > self.settings.state_bytes:
                self.level += 1
                self._let_go(self.settings, self.level)
                self._say(levels[self.level])
        return self._total() <= self.settings.state_bytes

    @staticmethod
    def _bytes(shapes: list[tuple[int, ...]], layers: list[float]) -> float:
        return sum(4 * math.prod(shape) * n for shape, n in zip(shapes, layers, strict=True))

    def _say(self, level: Settings) -> None:
        shared = f", {level.heads_per_mask} heads a mask" if level.heads_per_mask > 1 else ""
        where = ", in host memory" if level.state_memory == "host" else ""
        text = "fgattn.state_bytes=%d: observed masks are kept by %s%s%s"
        log.info(text, self.settings.state_bytes, level.slice, shared, where)

    def _total(self) -> int:
        return sum(need[self.level] for needs in self._needs.values() for need in needs.values())


def _layers(model: nn.Module, weights: list[Tensor]) -> list[float]:
    """How many layers of a model share the graph that has ``weights``, shared out among sites of one kind."""
    names = {id(p): re.sub(r"\d+", "#", name) for name, p in model.named_parameters()}
    kinds = [names.get(id(weight)) for weight in weights]
    everywhere, here = collections.Counter(names.values()), collections.Counter(kinds)
    return [1.0 if kind is None else everywhere[kind] / here[kind] for kind in kinds]
