"""The video models of diffusers, tiny and random. ``python tests/models.py`` writes their table into README.md.

A row of ``MODELS`` is one test in ``test_models.py``.
"""

from pathlib import Path

import models_cross
import models_dense
import models_hunyuan
import models_one_stream
import models_wan
from model_cases import CAUSAL, CONVOLUTIONAL, CROSS, FACES, FACTORISED, FLEX, MASKED, SHORT, UNKNOWN, Model, class_name

PARTS = (models_wan, models_hunyuan, models_one_stream, models_cross, models_dense)
MODELS: dict[str, Model] = {name: case for part in PARTS for name, case in part.MODELS.items()}


def sites_text(case: Model) -> str:
    """``self, cross (2 layers)``: the sites in words, repeats folded."""
    counts: dict[tuple[str, str], int] = {}
    for site in case.sites:
        counts[site] = counts.get(site, 0) + 1
    kinds = {CONVOLUTIONAL: "convolutional", FACTORISED: "factorised", FLEX: "flex", CAUSAL: "causal", FACES: "faces"}
    kinds |= {SHORT: "short self", MASKED: "masked self", CROSS: "cross", UNKNOWN: "self by its lengths"}
    names = {site: kinds.get(site, site[0]) for site in counts}
    return ", ".join(f"**{names[site]}**" if not site[1] else names[site] for site in counts)


def table() -> str:
    """The models as a Markdown table; kinds of attention that are rewritten in bold."""
    lines = ["| model | class in diffusers | attention | notes |", "| --- | --- | --- | --- |"]
    for name, case in MODELS.items():
        if "batch of" not in name:
            lines.append(f"| {name} | `{class_name(case)}` | {sites_text(case)} | {case.note} |")
    return "\n".join(lines)


BEGIN, END = "<!-- models: begin -->", "<!-- models: end -->"


def updated(readme: str) -> str:
    """README with the table of models made anew. Raises ValueError where a marker is missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md needs both {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    path = Path(__file__).resolve().parent.parent / "README.md"
    path.write_text(updated(path.read_text()))
