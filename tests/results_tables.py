"""The tables of training/RESULTS.md."""

from __future__ import annotations

import re

from dmd2.settings import ROOT

Table = dict[str, dict[str, str]]


def read_tables() -> dict[str, Table]:
    """Cells by their section, row and column; a section by its title up to a bracket or comma."""
    text = (ROOT / "training" / "RESULTS.md").read_text(encoding="utf-8")
    tables = {}
    for section in text.split("\n## ")[1:]:
        lines = [line for line in section.splitlines() if line.startswith("|")]
        head, _, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in lines)
        title = re.split(r" \(|, |\n", section)[0]
        tables[title] = {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}
    return tables


def percent(cell: str) -> float:
    """The share of a cell such as "85.4 (82-88)"."""
    return float(cell.split()[0])
