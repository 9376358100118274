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
    observed anew: in larger groups, at last with fewer masks than heads.

    let_go  frees the masks of these settings that are kept by less than a level
    """

    def __init__(self, settings: Settings, let_go: Callable[[Settings, int], None]):
        self.settings, self.level, self._let_go = settings, 0, let_go
        self._needs: WeakKeyDictionary[nn.Module, dict[tuple, list[int]]] = WeakKeyDictionary()

    def fits(self, call: Call, keeper: "Keeper", args: tuple) -> bool:
        """Take note of a call, and choose ``level``. False where even the last level needs too much."""
        if self.settings.state_bytes is None:
            return True
        needs, key = self._needs.setdefault(call.model, {}), (keeper.graph, call.branch)
        sizes, forms = keeper.sizes(args), keeper.forms[0]
        if (key, sizes) not in needs:
            for old in [known for known in needs if known[0] == key]:
                del needs[old]
            layers = _layers(call.model, [args[site.weight] for site in forms[0].sites])
            needs[key, sizes] = [
                sum(4 * math.prod(shape) * n for shape, n in zip(keeper.mask_shapes(args, form), layers, strict=True))
                for form in forms
            ]
            while self.level < len(forms) - 1 and self._total() > self.settings.state_bytes:
                self.level += 1
                self._let_go(self.settings, self.level)
                level = self.settings.levels[self.level]
                log.info(
                    "fgattn.state_bytes=%d: observed masks are kept by %s%s",
                    self.settings.state_bytes,
                    level.slice,
                    f", {level.heads_per_mask} heads a mask" if level.heads_per_mask > 1 else "",
                )
        return self._total() <= self.settings.state_bytes

    def _total(self) -> int:
        return sum(need[self.level] for needs in self._needs.values() for need in needs.values())


def _layers(model: nn.Module, weights: list[Tensor]) -> list[float]:
    """How many layers of a model share the graph that has ``weights``, shared out among sites of one kind."""
    names = {id(p): re.sub(r"\d+", "#", name) for name, p in model.named_parameters()}
    kinds = [names.get(id(weight)) for weight in weights]
    everywhere, here = collections.Counter(names.values()), collections.Counter(kinds)
    return [1.0 if kind is None else everywhere[kind] / here[kind] for kind in kinds]
