"""Write docs/pictures/beside-others.svg: speed and memory of one LoRA step, from the table in docs/performance.md.

python tools/pictures.py
"""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "pictures" / "beside-others.svg"
HEADING = "| on the EPYC |"


def measured() -> list[tuple[str, float, float]]:
    """Return (tool, tokens/s, peak memory in GiB) from the table."""
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    table = text[text.index(HEADING) :].split("\n\n")[0]
    results = []
    for row in table.splitlines()[2:]:
        tool, speed, _, memory, *_ = (cell.strip(" *") for cell in row.strip("|").split("|"))
        name = re.split(r" \(", tool)[0]
        if not name.startswith("strop,"):
            results.append((name, float(speed.replace("*", "").replace(",", "").split()[0]), float(memory.split()[0])))
    return results


def draw(rows: list[tuple[str, float, float]], out: Path) -> None:
    matplotlib.rcParams.update({"svg.hashsalt": "strop", "font.size": 9, "svg.fonttype": "none"})
    figure, panels = plt.subplots(1, 2, figsize=(8.4, 2.2), sharey=True)
    names = [name for name, *_ in rows][::-1]
    for panel, place, title in ((panels[0], 1, "tokens/s"), (panels[1], 2, "peak memory, GiB")):
        values = [row[place] for row in rows][::-1]
        colours = ["#2f6f4f" if name.startswith("strop") else "#b8b8b8" for name in names]
        panel.bar_label(panel.barh(names, values, color=colours), fmt="{:,.4g}", padding=3)
        panel.set_title(title, loc="left")
        panel.spines[["top", "right", "bottom"]].set_visible(False)
        panel.set_xticks([])
        panel.margins(x=0.15)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    draw(measured(), OUT)
