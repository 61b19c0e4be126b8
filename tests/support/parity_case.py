# SPDX-License-Identifier: Apache-2.0
"""A row of the parity suite's table: a field of peft.LoraConfig in one of its forms, and what becomes of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from parity_families import Family

Config = Callable[[Family], dict[str, Any]]
"""Fields of LoraConfig for that model, over those of `plain`."""


def plain(family: Family) -> dict[str, Any]:
    return {"r": 8, "lora_alpha": 12, "target_modules": [family.q, family.o, family.up, family.down]}


@dataclass(frozen=True)
class Case:
    fields: str
    """Of LoraConfig, with commas; or what is no field of it, in words."""
    form: str
    config: Config = plain
    note: str = ""
    """For the users who read the matrix."""
    refused: str = ""
    """How the reason starts, if it is; else it is applied."""
    experts_only: bool = False
    """Not applicable to models without experts."""
    vocabulary: int = 0
    """Tokens that the embedding was resized to; 0: those of the base model."""
    recipe: str = ""
    """Of `parity_recipes`: how the adapter is made, if not by training all that its config lets be trained."""
    inserts: tuple[tuple[int, ...], ...] = ((),)
    """One request for each: tokens that are put into its prompt. Prompts have none above 49 otherwise."""
    parts: tuple[tuple[str, float], ...] = ()
    """A request for a sum of the adapters of other cases, by their names, with weights. There is no adapter then."""

    @property
    def name(self) -> str:
        """Of the adapter, and in test ids."""
        return re.sub(r"[^a-z0-9_]+", "-", f"{self.fields} {self.form}".lower()).strip("-")

    @property
    def asked(self) -> str:
        """What a request names."""
        return ",".join(f"{name}:{weight:g}" for name, weight in self.parts) or self.name

    @property
    def covers(self) -> set[str]:
        """Fields of LoraConfig, if it is about any."""
        return set(self.fields.split(", "))

    def verdict(self, family: Family) -> str:
        """What the matrix says."""
        if self.experts_only and not family.experts:
            return "n/a"
        return "refused" if self.refused else "applied"
