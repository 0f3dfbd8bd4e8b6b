"""The results as a table to read (Markdown) and as a picture (SVG)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape

from results import Middle, Table, Target, Verdict

COLUMNS = (
    "tool",
    "wall s (least–most)",
    "CPU s machine",
    "CPU s vault",
    "peak MB machine",
    "peak MB vault",
    "wire MB",
    "store MB",
    "on disk MB",
    "added MB",
    "zbackup ÷ tool",
    "no-latest ÷ tool",
)
MB = 1e6


def show(value: float) -> str:
    """Return a figure with three digits that count, never in powers of ten."""
    if value == 0:
        return "0"
    for bound, digits in ((0.1, 3), (1, 2), (10, 2), (100, 1)):
        if abs(value) < bound:
            return f"{value:.{digits}f}"
    return f"{value:.0f}"


def show_span(middle: Middle) -> str:
    if middle.least == middle.most:
        return show(middle.median)
    return f"{show(middle.median)} ({show(middle.least)}–{show(middle.most)})"


def show_ratio(peers: dict[str, dict[str, Middle]], own: str, peer: str) -> str:
    """Return how long zbackup took in the time of the tool: below 1 it was faster."""
    if own not in peers or own == peer:
        return ""
    return show(peers[own]["wall"].median / peers[peer]["wall"].median)


def cells_of(peers: dict[str, dict[str, Middle]], peer: str) -> list[str]:
    """Return one line of the table."""
    cells = peers[peer]
    sizes = ("peak_machine", "peak_vault", "wire", "store", "disk", "added")
    return [
        peer,
        show_span(cells["wall"]),
        *(show(cells[name].median) for name in ("cpu_machine", "cpu_vault")),
        *(show(cells[name].median / MB) for name in sizes),
        show_ratio(peers, "zbackup", peer),
        show_ratio(peers, "zbackup-no-latest", peer),
    ]


def lay_out(lines: Sequence[Sequence[str]]) -> list[str]:
    """Return lines of a Markdown table whose columns stand below each other."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines]
    rows.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return rows


def write_table(table: Table) -> str:
    """Return a table for each row of the benchmark."""
    lines = []
    for row, peers in table.items():
        size = next(iter(peers.values()))["data"].median / MB
        lines += ["", f"**{row}** ({show(size)} MB of data)", ""]
        lines += lay_out([COLUMNS, *(cells_of(peers, peer) for peer in peers)])
    return "\n".join(lines)


def show_target(target: Target) -> str:
    if not target.against:
        seconds = target.measure == "wall"
        return f"at most {show(target.limit)} s" if seconds else f"at most {show(target.limit / MB)} MB"
    return f"at most {target.limit:g} x {target.against}"


def write_verdicts(verdicts: Sequence[Verdict]) -> str:
    """Return the table of the targets, each with what was reached."""
    if not verdicts:
        return ""
    lines = [["row", "form", "measure", "target", "reached", "met"]]
    for verdict in verdicts:
        target = verdict.target
        reached = verdict.value / verdict.bound * target.limit
        unit = 1 if target.against or target.measure == "wall" else MB
        said = [target.row, verdict.peer, target.measure, show_target(target), show(reached / unit)]
        lines.append([*said, "yes" if verdict.met else "NO"])
    return "\n".join(["", "**Targets**", "", *lay_out(lines)])


def write_facts(facts: dict[str, Any]) -> str:
    """Return what the figures depend on."""
    plain = [f"- {name}: {value}" for name, value in facts.items() if not isinstance(value, dict)]
    versions = [f"- {name}: {value}" for name, value in facts["versions"].items()]
    commands = [f"  {name}: {value}" for name, value in facts["commands"].items()]
    return "\n".join(["**Conditions**", "", *plain, *versions, "", "```", *commands, "```"])


# ---- the picture ----

BAR = 11
GAP = 3
LEFT = 128
RIGHT = 560
WIDTH = 700
MOST = 8.0  # times zbackup's; longer bars are cut, with their figure beside them
COLOURS = {
    "zbackup": "#2f81f7",
    "zbackup-no-latest": "#79b8ff",
    "rsyncd": "#8a8f98",
    "rsync-ssh": "#6b7280",
    "restic": "#d29922",
    "borg": "#bb5a3c",
    "rdiff-backup": "#8957b0",
    "rsnapshot": "#4d9375",
}
# Grey that can be read on white and on black, for viewers that do not say which they have.
STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#7a7f87}.n{font-weight:600}.h{font-size:13px;font-weight:600}"
    ".l{stroke:#7a7f87;stroke-opacity:.5;stroke-dasharray:2 3}"
    "@media(prefers-color-scheme:dark){text{fill:#b1bac4}}"
    "@media(prefers-color-scheme:light){text{fill:#424a53}}"
)


# A picture of all rows would be as long as the table.
PICTURED = (
    *("sqlite-first", "sqlite-1%", "sqlite-same", "small-first", "small-same", "dump-insert", "vm-changed"),
    *("versions-20", "versions-first", "small-restore"),
)


def ratios_of(table: Table) -> dict[str, dict[str, float]]:
    """Return, for each row that has other tools, the wall time of each as a multiple of zbackup's."""
    found = {}
    for row in [row for row in PICTURED if row in table] or table:
        peers = table[row]
        own = peers.get("zbackup") or peers.get("zbackup-no-latest")
        if own and any(not name.startswith("zbackup") for name in peers):
            found[row] = {name: cells["wall"].median / own["wall"].median for name, cells in peers.items()}
    return found


def draw_text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}"{more}>{escape(text)}</text>'


def draw_bar(y: float, peer: str, ratio: float) -> list[str]:
    """Return a bar with its figure."""
    width = max(1.0, min(ratio, MOST) / MOST * (RIGHT - LEFT))
    colour = COLOURS.get(peer, "#888")
    beside = f"{ratio:.2f}" + (" →" if ratio > MOST else "")
    return [
        f'<rect x="{LEFT}" y="{y:g}" width="{width:.1f}" height="{BAR}" fill="{colour}"/>',
        draw_text(LEFT + width + 5, y + BAR - 2, f"{beside}  {peer}"),
    ]


def draw_row(y: float, row: str, ratios: dict[str, float]) -> tuple[float, list[str]]:
    """Return the bars of one row, and where the next one begins."""
    parts = [draw_text(LEFT - 8, y + BAR - 2, row, ' class="n" text-anchor="end"')]
    for peer, ratio in ratios.items():
        parts += draw_bar(y, peer, ratio)
        y += BAR + GAP
    return y + 10, parts


def describe_rows(ratios: dict[str, dict[str, float]]) -> str:
    """Return the picture in words, for those who cannot see it."""
    rows = (f"{row}: " + ", ".join(f"{p} {r:.2f}" for p, r in peers.items()) for row, peers in ratios.items())
    return "; ".join(rows)


def write_svg(table: Table) -> str:
    """Return a picture of the wall times, as multiples of zbackup's."""
    ratios = ratios_of(table)
    title = "Wall time of each tool as a multiple of zbackup's (shorter is faster)"
    y, parts = 40.0, [draw_text(10, 20, title, ' class="h"')]
    for row, peers in ratios.items():
        y, drawn = draw_row(y, row, peers)
        parts += drawn
    one = LEFT + (RIGHT - LEFT) / MOST
    line = (
        f'<path d="M{one:.1f} 34V{y - 10:g}" stroke="#7a7f87" stroke-opacity="0.5" stroke-dasharray="2 3" fill="none"/>'
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:g}" role="img" aria-labelledby="t d">'
    words = f'<title id="t">{title}</title><desc id="d">{escape(describe_rows(ratios))}</desc>'
    return "\n".join([head, words, f"<style>{STYLE}</style>", line, *parts, "</svg>", ""])
