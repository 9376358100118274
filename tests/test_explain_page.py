"""The page of ``explain``: the masks that it draws are those that attention used."""

import struct
import zlib
from html.parser import HTMLParser

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fg_inductor
from fg_inductor.explain_page import EVERYTHING, NOTHING, picture, png
from fg_inductor.kernels.mask import pack, word_count
from fg_inductor.toy_models import SHORT, SelfAttention, Stack, tokens


class Checker(HTMLParser):
    """Raises where tags are not closed in order; counts them."""

    EMPTY = ("meta", "img", "line", "rect")

    def __init__(self):
        super().__init__()
        self.open, self.counts, self.ids, self.links = [], {}, set(), set()

    def handle_starttag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        for name, text in attributes:
            if name == "id":
                self.ids.add(text)
            if name == "href":
                self.links.add(text.removeprefix("#"))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop() == tag


def decoded(data):
    """[rows, columns] of palette entries."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, at = {}, 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        chunks[kind], at = body, at + 12 + length
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    rows = zlib.decompress(chunks[b"IDAT"])
    palette = chunks[b"PLTE"]
    assert (tuple(palette[:3]), tuple(palette[-3:])) == (NOTHING, EVERYTHING)
    return torch.tensor([list(rows[i * (width + 1) + 1 : (i + 1) * (width + 1)]) for i in range(height)])


def test_png():
    keep = torch.rand(5, 9)
    assert torch.equal(decoded(png(keep)), (keep * 255).round().long())


def test_picture():
    """More groups than pixels, a last slice and group that are not full, masked keys, heads that differ."""
    queries, keys, m, n = 50, 3001, 16, 8
    keep = torch.zeros(2, 3, 4, 376, dtype=torch.bool)
    keep[0, 0, :, :188], keep[0, 1, 3, 375] = True, True
    mask = pack(keep, word_count(keys, n))
    q, k = torch.empty(2, 3, queries, 8), torch.empty(2, 3, keys, 8)
    shown = picture(q, k, mask, None, m, n)
    assert shown.densities == pytest.approx([188 * 8 / keys, 2 / queries / keys, 0])
    assert shown.mean.shape == (4, 360) and [x.shape for x in shown.heads] == [(4, 96)] * 3
    torch.testing.assert_close(shown.heads[0][:, :47], torch.ones(4, 47))
    assert shown.heads[0][:, 49:].sum() == 0 == shown.heads[2].sum()
    valid = torch.arange(keys) < 1504
    assert picture(q, k, mask, valid.expand(2, -1), m, n).densities[0] == 1


class Mixture(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.sparse, self.causal = Stack(2, heads=3), SelfAttention(heads=3, is_causal=True)

    def forward(self, x):
        return self.causal(self.sparse(x))


def test_page(tmp_path, capsys):
    path, model, x = tmp_path / "explain.html", Mixture(), tokens(width=192)
    with torch.no_grad():
        report = fg_inductor.explain(model, x, options={**SHORT, "fgattn.density": 0.25}, page=path)
    assert [row.density for row in report] == [0.25, 0.25, None]
    checker = Checker()
    checker.feed(path.read_text())
    assert checker.open == [] and checker.links <= checker.ids and len(checker.links) == 2
    # For each rewritten site: a picture of the mean and of each head, a bar for each head.
    assert (checker.counts["article"], checker.counts["img"], checker.counts["rect"]) == (2, 8, 6)
    assert "Mixture" in path.read_text() and "2 of 3 attention sites rewritten" in path.read_text()
    assert len(fg_inductor.report()) == 0


def test_page_runs_sparse(tmp_path):
    seen, model, x = [], SelfAttention(), tokens()
    for density in (1.0, 0.1):
        options = {**SHORT, "fgattn.density": density}
        fg_inductor.explain(lambda x: seen.append(model(x)), x, options=options, page=tmp_path / "x.html")
    torch.testing.assert_close(seen[0], model(x))
    assert not torch.allclose(seen[1], model(x))


def test_page_of_checkpointed_regions(tmp_path):
    model = Stack(1, call=lambda block, x: checkpoint(block, x, use_reentrant=False))
    report = fg_inductor.explain(model, tokens(), options=SHORT, page=tmp_path / "x.html")
    assert report[0].density is None and report.rewritten == 1
    assert "inside a checkpointed region" in (tmp_path / "x.html").read_text()
