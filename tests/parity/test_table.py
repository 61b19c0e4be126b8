# SPDX-License-Identifier: Apache-2.0
"""The table of the parity suite leaves nothing out, and docs/peft-support.md is the table."""

from __future__ import annotations

import dataclasses

import peft

from multilora_backend.adapters.peft_fields import BASE_CHANGING_INITS, BASE_KEEPING_INITS, REFUSED
from multilora_backend.models.loader import SUPPORTED
from parity_families import FAMILIES
from parity_matrix import CASES, DOCUMENT, written


def test_every_field_of_peft_has_a_case():
    covered = set().union(*(case.covers for case in CASES))
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} - covered == set()


def test_every_refused_field_is_refused_in_a_case():
    reasons = " ".join(case.refused for case in CASES)
    assert [name for name in REFUSED if f"{name}: {REFUSED[name]}" not in reasons] == []


def test_every_initialisation_has_a_case():
    forms = [case.form for case in CASES if "init_lora_weights" in case.covers]
    assert [init for init in (*BASE_KEEPING_INITS, *BASE_CHANGING_INITS) if not any(init in f for f in forms)] == []


def test_every_supported_model_is_a_column():
    assert set(FAMILIES) == set(SUPPORTED)


def test_names_are_unique():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)


def test_the_document_is_up_to_date():
    text = DOCUMENT.read_text()
    assert written(text) == text, "run `.venv/bin/python tests/support/parity_matrix.py`"
