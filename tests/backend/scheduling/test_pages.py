# SPDX-License-Identifier: Apache-2.0
"""The page table never hands out a page twice, and finds exactly the beginnings that were published."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from multilora_backend.core import SamplingParams, Sequence
from multilora_backend.scheduling.pages import TRASH_PAGE, PageTable
from profiles import examples


def sequence(tokens: list[int], number: int = 0) -> Sequence:
    return Sequence(
        key=("test", number, 0), prompt_len=len(tokens), token_ids=tokens, sampling=SamplingParams(), seed=0
    )


def compute(pages: PageTable, s: Sequence, root: bytes = b"") -> bool:
    """Admits a sequence and computes all its tokens, as the scheduler and a step would."""
    pages.admit(s, root)
    if not pages.extend(s, s.num_tokens):
        pages.release(s)
        return False
    s.num_computed = s.num_tokens
    pages.publish(s, root)
    return True


def test_same_beginning_shares_full_pages_only():
    pages = PageTable(10, 4)
    first, second = sequence(list(range(11))), sequence([*range(8), 99, 98])
    compute(pages, first)
    pages.admit(second, b"")
    assert second.pages == first.pages[:2]
    assert second.num_computed == second.num_cached == 8


def test_another_root_shares_nothing():
    pages = PageTable(10, 4)
    compute(pages, sequence(list(range(11))), b"v1")
    other = sequence(list(range(11)))
    pages.admit(other, b"v2")
    assert other.pages == []


def test_one_token_is_always_left_to_compute():
    pages = PageTable(10, 4)
    compute(pages, sequence(list(range(8))))
    again = sequence(list(range(8)))
    pages.admit(again, b"")
    assert again.num_computed == 4


def test_released_pages_are_found_until_they_are_needed():
    pages = PageTable(5, 4)
    first = sequence(list(range(12)))
    compute(pages, first)
    pages.release(first)
    again = sequence(list(range(12)))
    pages.admit(again, b"")
    assert again.num_computed == 8
    pages.release(again)
    assert compute(pages, sequence([7] * 16))  # takes every page
    late = sequence(list(range(12)))
    pages.admit(late, b"")
    assert late.num_computed == 0


def test_pages_that_nobody_can_find_are_taken_before_those_that_somebody_may():
    pages = PageTable(4, 4)
    kept, partial = sequence(list(range(8))), sequence([7, 7])
    compute(pages, kept)
    compute(pages, partial)
    pages.release(kept)
    pages.release(partial)
    assert compute(pages, sequence([9, 9]))
    again = sequence([*range(8), 1])
    pages.admit(again, b"")
    assert again.num_computed == 8


def test_without_caching_nothing_is_found():
    pages = PageTable(10, 4, caching=False)
    compute(pages, sequence(list(range(11))))
    other = sequence(list(range(11)))
    pages.admit(other, b"")
    assert other.pages == []


def test_extend_gives_all_or_nothing():
    pages = PageTable(4, 4)
    s = sequence([1] * 20)
    assert not pages.extend(s, 13)
    assert s.pages == []
    assert pages.num_free == 3
    assert pages.extend(s, 12)
    assert pages.usage == 1.0


def test_a_table_needs_a_page_beside_the_trash_page():
    with pytest.raises(ValueError, match="num_pages"):
        PageTable(1, 16)


class PageMachine(RuleBasedStateMachine):
    """Random admissions, growth and releases over a small table and few different tokens, so that prefixes collide."""

    def __init__(self) -> None:
        super().__init__()
        self.table = PageTable(9, 2)
        self.live: list[tuple[Sequence, bytes]] = []
        self.published: set[tuple[bytes, tuple[int, ...]]] = set()

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9), root=st.sampled_from([b"", b"v1", b"v2"]))
    def admit(self, tokens: list[int], root: bytes) -> None:
        s = sequence(tokens, len(self.live))
        self.table.admit(s, root)
        assert s.num_computed < s.num_tokens
        for end in range(2, s.num_computed + 1, 2):
            assert (root, tuple(tokens[:end])) in self.published, "found a beginning that nobody computed"
        if not self.table.extend(s, s.num_tokens):
            self.table.release(s)
            return
        s.num_computed = s.num_tokens
        self.table.publish(s, root)
        self.published |= {(root, tuple(tokens[:end])) for end in range(2, len(tokens) + 1, 2)}
        self.live.append((s, root))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), token=st.integers(0, 1))
    def grow(self, data: st.DataObject, token: int) -> None:
        s, root = data.draw(st.sampled_from(self.live))
        if self.table.extend(s, s.num_tokens + 1):
            s.token_ids.append(token)
            s.num_computed += 1
            self.table.publish(s, root)
            full = s.num_computed - s.num_computed % 2
            self.published.add((root, tuple(s.token_ids[:full])))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.live) - 1))
        self.table.release(self.live.pop(index)[0])

    @invariant()
    def books_balance(self) -> None:
        self.table.check()
        held = {page for s, _ in self.live for page in s.pages}
        assert TRASH_PAGE not in held
        assert self.table.num_free == 8 - len(held)

    @invariant()
    def pages_that_will_be_written_have_one_holder(self) -> None:
        for s, _ in self.live:
            if s.num_tokens % 2:  # the last page is not full: the next token is written there
                assert sum(s.pages[-1] in other.pages for other, _ in self.live) == 1


PageMachine.TestCase.settings = examples(60, stateful_step_count=40)
TestPageMachine = PageMachine.TestCase
