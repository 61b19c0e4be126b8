# SPDX-License-Identifier: Apache-2.0
"""Two sequences share a page exactly if its K and V are the same: same tokens so far, same adapter on each of them."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from multilora_backend.adapters.activation import first_active
from multilora_backend.core import SamplingParams, Sequence
from multilora_backend.scheduling.pages import PageTable

PAGE = 4
ADAPTERS = {"": (), "plain": (), "a": (1, 2), "b": (1, 2), "c": (2,)}
"""Invocation tokens by adapter."""
prompts = st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=20)
starts = st.integers(0, 4).map(lambda n: [3, 1, 2, 3, 1, 3, 2, 2, 1, 2, 3, 3][: 3 * n])


def make(number: int, adapter: str, prompt: list[int]) -> Sequence:
    sequence = Sequence(("t", number, 0), len(prompt), list(prompt), SamplingParams(), 0, adapter=adapter)
    sequence.root = f"version of {adapter}".encode() if adapter else b""
    sequence.adapter_start = first_active(prompt, ADAPTERS[adapter])
    return sequence


def content(sequence: Sequence, page: int) -> list[tuple[int, bytes]]:
    """What K and V up to the end of a page depend on."""
    tokens = sequence.token_ids[: (page + 1) * PAGE]
    return [(t, sequence.root if i >= sequence.adapter_start else b"") for i, t in enumerate(tokens)]


@given(st.lists(st.tuples(st.sampled_from(sorted(ADAPTERS)), starts, prompts), min_size=2, max_size=6))
@example([("a", [3, 1, 2], [1, 3]), ("a", [3, 1, 2], [1, 2])])  # one page, with another start by what follows
def test_pages_are_shared_exactly_when_they_are_equal(said):
    table = PageTable(200, PAGE)
    seen: list[list[tuple[int, bytes]]] = []
    for number, (adapter, start, rest) in enumerate(said):
        sequence = make(number, adapter, start + rest)
        table.admit(sequence, sequence.root)
        longest = 0
        while longest < (sequence.num_tokens - 1) // PAGE and content(sequence, longest) in seen:
            longest += 1
        assert sequence.num_cached == longest * PAGE
        assert table.extend(sequence, sequence.num_tokens)
        sequence.num_computed = sequence.num_tokens
        table.publish(sequence, sequence.root)
        seen += [content(sequence, page) for page in range(sequence.num_tokens // PAGE)]
        table.check()
