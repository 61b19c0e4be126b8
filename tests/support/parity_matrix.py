# SPDX-License-Identifier: Apache-2.0
"""The parity suite's table, as its tests take it and as docs/peft-support.md shows it.

Run as a script it brings the document up to date.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import peft
import transformers

import parity_linears
import parity_refusals
import parity_special
import parity_vocabulary
from parity_case import Case
from parity_families import FAMILIES, Family

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/peft-support.md"
SECTIONS: dict[str, Sequence[Case]] = {
    "Linears": parity_linears.CASES,
    "Norms, embedding, head and tokens": parity_vocabulary.CASES,
    "Initialisations": parity_special.INITS,
    "Experts and routers": parity_special.EXPERTS,
    "Activated LoRA": parity_special.ACTIVATED,
    "Requests for several adapters, and scales": parity_special.SUMS,
    "Refused fields": parity_refusals.FIELDS,
    "Refused in combination": parity_refusals.COMBINED,
}
CASES = [case for cases in SECTIONS.values() for case in cases]
BEGIN, END = "<!-- matrix: `python tests/support/parity_matrix.py` -->\n", "<!-- /matrix -->\n"


def cells(verdict: str) -> Iterator[tuple[Family, Case]]:
    """What a test has to show of which model, model by model."""
    return ((f, case) for f in FAMILIES.values() for case in CASES if case.verdict(f) == verdict)


def matrix() -> str:
    """Markdown."""
    counts = {verdict: sum(1 for _ in cells(verdict)) for verdict in ("applied", "refused", "n/a")}
    lines = [
        f"With peft {peft.__version__} and transformers {transformers.__version__}: {counts['applied']} cells are "
        f"applied, {counts['refused']} refused, {counts['n/a']} not applicable (n/a).",
        "",
        "| model | `model_type` | embedding and head |",
        "|---|---|---|",
        *(f"| {f.title} | `{f.model_type}` | {'tied' if f.tied else 'apart'} |" for f in FAMILIES.values()),
    ]
    titles = " | ".join(family.title for family in FAMILIES.values())
    for section, cases in SECTIONS.items():
        lines += ["", f"### {section}", "", f"| field | form | {titles} | |", "|---" * (3 + len(FAMILIES)) + "|"]
        lines += [_row(case) for case in cases]
    return "\n".join(lines) + "\n"


def written(text: str) -> str:
    """The document with the matrix of today between its markers."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{matrix()}{END}{after}"


def _row(case: Case) -> str:
    verdicts = " | ".join(case.verdict(family) for family in FAMILIES.values())
    fields = ", ".join(f"`{name}`" if re.fullmatch(r"\w+", name) else name for name in case.fields.split(", "))
    words = [f"`{case.refused}...`" if case.refused else "", case.note]
    return f"| {fields} | {case.form} | {verdicts} | {'; '.join(word for word in words if word)} |"


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text()))
