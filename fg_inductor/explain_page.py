"""The page that ``fg_inductor.explain(..., page="explain.html")`` writes: each site with its block mask and densities.

One file without scripts or links, so that it can be mailed. Masks are recorded while the rewritten graph runs once.
"""

import base64
import html
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from fg_inductor.kernels import ops
from fg_inductor.kernels.mask import group_count, unpack
from fg_inductor.report import Report, Row, summary

COLUMNS = ("site", "kind", "query", "key", "decision", "density", "notes")
LARGE, SMALL = 360, 96  # pixels a side, at most
HEADS_SHOWN = 16
NOTHING, EVERYTHING = (238, 241, 244), (24, 78, 140)  # of the colours between which a pixel lies


@dataclass(frozen=True)
class Picture:
    """What is drawn of one site, of the first batch entry.

    densities  kept pairs / all pairs of each head
    mean       [rows, columns] in [0, 1]: the share of heads and blocks under a pixel that are kept
    heads      the same of single heads, the first HEADS_SHOWN
    queries    the numbers of queries and keys, and the mask's m x n
    """

    densities: list[float]
    mean: Tensor
    heads: list[Tensor]
    queries: int
    keys: int
    slice: str


class Recorder(Interpreter):
    """Runs a rewritten graph and keeps a picture of each mask: site index -> Picture."""

    def __init__(self, gm: GraphModule):
        super().__init__(gm)
        self.pictures: dict[int, Picture] = {}

    def run_node(self, n: Node) -> Any:
        if n.target is ops.attention and "fgattn_site" in n.meta:
            q, k, _, mask, key_bias, _, _, m, n_keys, *_ = self.fetch_args_kwargs_from_env(n)[0]
            self.pictures[n.meta["fgattn_site"]] = picture(q, k, mask, key_bias, m, n_keys)
        return super().run_node(n)


@torch.no_grad()
def picture(q: Tensor, k: Tensor, mask: Tensor, key_bias: Tensor | None, m: int, n: int) -> Picture:
    """The picture of one mask [B, H, T, W]."""
    queries, keys = q.shape[2], k.shape[2]
    first, bias = mask[:1], None if key_bias is None else key_bias[:1]
    heads = range(first.shape[1])
    densities = [ops.kept_density(first[:, h : h + 1], bias, queries, keys, m, n).item() for h in heads]
    total, small = 0, []
    for h in heads:  # one by one: unpacked, the masks of a long video take gigabytes
        keep = unpack(first[0, h], group_count(keys, n)).float()
        total = total + _shrunk(keep, LARGE)
        if h < HEADS_SHOWN:
            small.append(_shrunk(keep, SMALL).cpu())
    return Picture(densities, (total / len(heads)).cpu(), small, queries, keys, f"{m}x{n}")


def _shrunk(keep: Tensor, side: int) -> Tensor:
    size = tuple(min(side, length) for length in keep.shape)
    return F.adaptive_avg_pool2d(keep[None], size)[0]


def write(path: str | Path, report: Report, pictures: dict[tuple[str, int], Picture], title: str) -> None:
    """Write the page. ``pictures`` by (graph, site index); a rewritten site without one says why."""
    Path(path).write_text(page(report, pictures, title), encoding="utf-8")


def page(report: Report, pictures: dict[tuple[str, int], Picture], title: str) -> str:
    """The page as text."""
    cards = [_card(row, pictures.get((row.graph, row.site.index))) for row in report if row.site.rewritten]
    rows = "".join(map(_table_row, report))
    shown = [x for picture in pictures.values() for x in picture.densities]
    mean = f" · mean kept density {sum(shown) / len(shown):.3f}" if shown else ""
    shown = next((row for row in report if row.site.rewritten), None)
    settings = html.escape(summary(shown.settings, shown.site.slice)) if shown else ""
    head = f"{report.rewritten} of {len(report)} attention sites rewritten{mean}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)} - fg-inductor</title><style>{STYLE}</style></head><body>
<header><h1>{html.escape(title)}</h1><p class="lead">{head}</p><p class="muted">{settings}</p></header>
<main><section><h2>Sites</h2><div class="scroll"><table>
<thead><tr>{"".join(f"<th>{name}</th>" for name in COLUMNS)}</tr></thead>
<tbody>{rows}</tbody></table></div></section>
<section><h2>Block masks</h2><p class="muted legend"><span class="ramp"></span> none to all of the pairs under a pixel
are kept. Rows are query slices and columns key groups, both in query order (keys as they lie in memory where no token
grid is known and in groups of one key); the first batch entry.</p>
{"".join(cards) or '<p class="muted">No site was rewritten.</p>'}</section></main></body></html>
"""


def _table_row(row: Row) -> str:
    site = row.site
    reason = f"{site.reason} ({site.detail})" if site.detail else site.reason
    notes = " · ".join(filter(None, (reason, *(f"{name} {text}" for name, text in site.details.items()), row.note)))
    mark = "yes" if site.rewritten else ("limit" if site.video else "no")
    name = html.escape(site.path or f"site {site.index}")
    if site.rewritten:
        name = f'<a href="#{_anchor(row)}">{name}</a>'
    cells = (site.kind, site.query, site.key)
    rest = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
    decision = f'<td><span class="pill {mark}">{site.decision}</span></td>'
    density = "" if row.density is None else f"{row.density:.3f}"
    tail = f'{decision}<td>{density}</td><td class="notes">{html.escape(notes)}</td>'
    return f'<tr><td class="path">{name}</td>{rest}{tail}</tr>'


def _anchor(row: Row) -> str:
    return f"site-{row.graph}-{row.site.index}".replace("/", "-")


def _card(row: Row, shown: Picture | None) -> str:
    title = html.escape(row.site.path or f"site {row.site.index}")
    head = f'<article id="{_anchor(row)}"><h3>{title} <small>{html.escape(row.site.kind)}</small></h3>'
    if shown is None:
        where = "Its mask lies inside a checkpointed region, where it is not recorded."
        return f'{head}<p class="muted">{where}</p></article>'
    mean = sum(shown.densities) / len(shown.densities)
    facts = f"{shown.queries:,} queries, {shown.keys:,} keys, {shown.slice} · kept density {mean:.3f}"
    heads = "".join(
        f"<figure>{_image(keep, f'head {h}')}<figcaption>{h} · {shown.densities[h]:.2f}</figcaption></figure>"
        for h, keep in enumerate(shown.heads)
    )
    more = len(shown.densities) - len(shown.heads)
    rest = f'<p class="muted">and {more} more heads</p>' if more > 0 else ""
    return f"""{head}<p class="muted">{facts}</p><div class="site">
<figure class="large">{_image(shown.mean, "mean over heads")}<figcaption>mean over heads · keys →, query slices ↓
</figcaption></figure><div class="side"><h4>Kept density of each head</h4>{_bars(shown.densities)}
<h4>Heads</h4><div class="heads">{heads}</div>{rest}</div></div></article>"""


def _bars(densities: list[float]) -> str:
    """A bar for each head, as SVG."""
    width, height = 460, 96
    step = width / max(len(densities), 12)  # few heads have slim bars too
    bars = "".join(
        f'<rect x="{i * step + step * 0.12:.1f}" y="{height * (1 - x):.1f}" width="{step * 0.76:.1f}" '
        f'height="{height * x:.1f}"><title>head {i}: {x:.3f}</title></rect>'
        for i, x in enumerate(densities)
    )
    lines = "".join(
        f'<line x1="0" x2="{width}" y1="{height * (1 - x)}" y2="{height * (1 - x)}"/>'
        f'<text x="{width + 6}" y="{height * (1 - x) + 4}">{x:g}</text>'
        for x in (0, 0.5, 1)
    )
    return f'<svg viewBox="0 -6 {width + 34} {height + 12}" role="img">{lines}{bars}</svg>'


def _image(keep: Tensor, text: str) -> str:
    data = base64.b64encode(png(keep)).decode()
    return f'<img src="data:image/png;base64,{data}" alt="block mask, {text}">'


def png(keep: Tensor) -> bytes:
    """[rows, columns] in [0, 1] as a PNG with a palette."""
    pixels = (keep * 255).round().to(torch.uint8)
    height, width = pixels.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    palette = bytes(round(a + (b - a) * i / 255) for i in range(256) for a, b in zip(NOTHING, EVERYTHING, strict=True))
    rows = b"".join(b"\0" + bytes(row) for row in pixels.tolist())
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    parts = (b"IHDR", header), (b"PLTE", palette), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


STYLE = """
:root { --ink: #1c232b; --muted: #66717d; --line: #dfe4ea; --page: #f5f7f9; --card: #fff; --blue: #184e8c;
  --green: #1d7a4a; --amber: #a15c07; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7ebf0; --muted: #9aa5b1; --line: #2d3742; --page: #12171d;
  --card: #1a2129; --blue: #7db3ee; --green: #6fce9c; --amber: #f0b35c; } }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: var(--page);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
header, main { max-width: 1200px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 40px; }
h1 { font-size: 28px; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 19px; margin: 40px 0 12px; }
h3 { font: 600 15px/1.4 ui-monospace, SFMono-Regular, Menlo, monospace; margin: 0; }
h3 small { font-weight: 400; color: var(--muted); margin-left: 6px; }
h4 { font-size: 12px; text-transform: uppercase; letter-spacing: 0.06em; color: var(--muted); margin: 0 0 8px; }
p { margin: 4px 0; }
.lead { font-size: 17px; }
.muted { color: var(--muted); }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 13.5px; }
th { text-align: left; font-weight: 600; color: var(--muted); }
th, td { padding: 8px 12px; border-bottom: 1px solid var(--line); white-space: nowrap; vertical-align: top; }
tr:last-child td { border-bottom: 0; }
td.path { font-family: ui-monospace, SFMono-Regular, Menlo, monospace; font-size: 12.5px; }
td.notes { white-space: normal; min-width: 240px; width: 40%; color: var(--muted); }
a { color: var(--blue); text-decoration: none; }
a:hover { text-decoration: underline; }
.pill { padding: 1px 9px; border-radius: 99px; border: 1px solid currentColor; font-size: 12.5px; }
.pill.yes { color: var(--green); } .pill.no { color: var(--muted); } .pill.limit { color: var(--amber); }
.legend { max-width: 760px; }
.ramp { display: inline-block; width: 84px; height: 10px; border-radius: 3px; vertical-align: baseline;
  background: linear-gradient(90deg, rgb(238, 241, 244), rgb(24, 78, 140)); border: 1px solid var(--line); }
article { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px;
  margin: 16px 0; }
.site { display: grid; grid-template-columns: 360px 1fr; gap: 28px; margin-top: 14px; }
figure { margin: 0; }
figcaption { color: var(--muted); font-size: 12px; margin-top: 4px; font-variant-numeric: tabular-nums; }
img { display: block; width: 100%; aspect-ratio: 1; image-rendering: pixelated; border-radius: 4px;
  border: 1px solid var(--line); }
svg { display: block; width: 100%; margin-bottom: 18px; overflow: visible; }
svg rect { fill: var(--blue); } svg line { stroke: var(--line); } svg text { fill: var(--muted); font-size: 11px; }
.heads { display: grid; grid-template-columns: repeat(auto-fill, minmax(78px, 1fr)); gap: 10px; }
@media (max-width: 820px) { .site { grid-template-columns: 1fr; } }
"""
