"""The table of docs/project/reliability-table.md: every fault, how it has to end, and the test that asserts it.

python -m faults.table            prints it
python -m faults.table PAGE.md    writes it into a page, between its two marks
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

from faults.catalogue import all_faults, shorter_list
from faults.harness import Fault

BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"


def series(fault: Fault) -> tuple[str, str]:
    """Faults that differ by a number alone share a row."""
    return fault.kind, re.sub(r"(moment|write) \d+", r"\1 N", fault.name)


def table() -> str:
    """The rows, with a heading and a count for each kind."""
    kinds: dict[str, dict[str, list[Fault]]] = defaultdict(lambda: defaultdict(list))
    for fault in all_faults().values():
        kind, name = series(fault)
        kinds[kind][name].append(fault)
    faults = list(all_faults().values())
    quick = len(shorter_list())
    lines = [f"{len(faults)} faults of {len(kinds)} kinds; {quick} of them are in the shorter list.", ""]
    for kind, rows in sorted(kinds.items()):
        lines += [f"## {kind[0].upper()}{kind[1:]}", "", "| fault | how it ends | tests |", "|---|---|---:|"]
        lines += [
            f"| {escaped(name)} | {escaped(str(of_row[0].ending))} | {len(of_row)} |" for name, of_row in rows.items()
        ]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def escaped(text: str) -> str:
    """Text in a cell."""
    return re.sub(r"([|*_<>`\[\]{}])", r"\\\1", text)


def filled(page: str) -> str:
    """A page with the table of today between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert after, f"the page has no {BEGIN} and {END}"
    return f"{before}{BEGIN}\n\n{table()}\n{END}{after}"


def main() -> None:
    if len(sys.argv) > 1:
        page = Path(sys.argv[1])
        page.write_text(filled(page.read_text()))
    else:
        print(table(), end="")


if __name__ == "__main__":
    main()
