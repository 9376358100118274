"""One attention call of one compiled graph, and what the pass did with it."""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple


class Forecast(NamedTuple):
    """What a rewrite of a site is expected to gain: whether it is worth it, and the numbers in words."""

    worth: bool
    text: str


@dataclass(frozen=True)
class Site:
    """A row of the report.

    path      module path of the call, such as ``blocks.0.attn1``; empty where the graph has none
    index     place among the attention calls of the graph, from 0, child graphs counted where they are called
    kind      "self" (q and k from one source), "joint" (from the same sources), "mixed" (q from a part of k's sources),
              "cross" (from different ones) or "unknown" (no projection in the graph)
    query     shape of q as text, ``1x12x32760x128``; symbolic sizes as expressions
    key       shape of k, likewise
    dtype     dtype of the result, ``bfloat16``
    decision  "rewritten" or "dense"
    reason    why it is dense: a short fixed phrase, fit for a counter. Of a rewritten site: empty, or
              "dense below N tokens" where its length is symbolic
    detail    the numbers behind the reason, in words; may be empty
    video     whether it looks like attention over a video that is long enough, so that leaving it dense is a limitation
              of this package; ``fgattn.strict`` raises for such a site
    slice     M x N of its mask, "128x16"; empty where it is dense
    details   what the pass found: "text" ([start, end) of the tokens that stay dense, as text), "token_grid", "order",
              "key_mask", "written as" (of attention that is not written as SDPA: how), "expected" (a forecast's
              numbers); absent keys were not found
    """

    path: str
    index: int
    kind: str
    query: str
    key: str
    dtype: str
    decision: str
    reason: str = ""
    detail: str = ""
    video: bool = False
    slice: str = ""
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def rewritten(self) -> bool:
        return self.decision == "rewritten"
