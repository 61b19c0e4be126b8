# SPDX-License-Identifier: Apache-2.0
"""KV pages: who holds which, and which full pages can be shared by requests with the same beginning.

A full page is known by a chain hash over (root, tokens so far), where the root is the adapter's version: the
K and V of a token depend on the adapter, so adapters never share pages, and a changed adapter never finds
the pages of its predecessor. An adapter that acts on a part of the prompt only shares what is before that with the
base model: the root comes in at the first page that has a token which the adapter acts on.

Page 0 is the trash page: padding rows write there and page tables are padded with it. It is never handed out.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict

from multilora_backend.core import Sequence

TRASH_PAGE = 0


class PageTable:
    """Allocates pages to sequences with reference counts. Pure bookkeeping: it never touches a tensor."""

    def __init__(self, num_pages: int, page_size: int, caching: bool = True) -> None:
        """`num_pages` includes the trash page, so num_pages - 1 can be held."""
        if num_pages < 2:
            raise ValueError(f"num_pages: must be at least 2, got {num_pages}")
        self.num_pages = num_pages
        self.page_size = page_size
        self.caching = caching
        self.queries = 0
        self.hits = 0
        """Tokens of prompts that began to be computed, and those of them that were found; see `count`."""
        self._references = [0] * num_pages
        # Pages without a holder, oldest first. Those with a hash can still be found; they are overwritten last.
        self._free: OrderedDict[int, None] = OrderedDict((page, None) for page in range(1, num_pages))
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the pages that sequences hold, 0 to 1."""
        return 1.0 - len(self._free) / (self.num_pages - 1)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def admit(self, sequence: Sequence, root: bytes) -> None:
        """Gives a sequence without pages those of the cache that hold its beginning, and sets `num_computed`.

        At least one token is left to compute, since its logits are what the sequence is here for.
        """
        if sequence.pages:
            raise RuntimeError(f"sequence {sequence.key} already holds pages")
        if not self.caching:
            return
        found: list[int] = []
        self._chain(sequence, root, (sequence.num_tokens - 1) // self.page_size)
        for digest in sequence.page_hashes:
            page = self._page_of.get(digest)
            if page is None:
                break
            found.append(page)
        for page in found:
            self._hold(page)
        sequence.pages = found
        sequence.num_published = len(found)
        sequence.num_computed = sequence.num_cached = len(found) * self.page_size

    def count(self, sequence: Sequence) -> None:
        """Counts what `admit` found of a prompt, when the sequence first runs.

        Not each look-up: while there are no pages for it, a sequence is admitted and backed out in every step.
        """
        if self.caching:
            self.queries += sequence.prompt_len
            self.hits += sequence.num_cached

    def extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Gives the sequence pages for its first `num_tokens` tokens: all that are missing, or none and False."""
        missing = self.pages_for(num_tokens) - len(sequence.pages)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            page, _ = self._free.popitem(last=False)
            self._forget(page)
            self._references[page] = 1
            sequence.pages.append(page)
        return True

    def publish(self, sequence: Sequence, root: bytes) -> None:
        """Makes the sequence's full, computed pages findable. Call it when the step that filled them is done."""
        if not self.caching:
            return
        first, full = sequence.num_published, sequence.num_computed // self.page_size
        if full <= first:
            return
        self._chain(sequence, root, full)
        for index in range(first, full):
            page, digest = sequence.pages[index], sequence.page_hashes[index]
            if page not in self._hash_of and digest not in self._page_of:
                self._hash_of[page] = digest
                self._page_of[digest] = page
        sequence.num_published = full

    def release(self, sequence: Sequence) -> None:
        """Takes all pages back. The last pages go first, so that beginnings stay findable longest."""
        for page in reversed(sequence.pages):
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free[page] = None
                if page not in self._hash_of:
                    self._free.move_to_end(page, last=False)
        sequence.pages = []
        sequence.page_hashes = []
        sequence.num_computed = sequence.num_published = 0

    def check(self) -> None:
        """Raises RuntimeError if the books do not balance. Called when the engine is idle, and by tests."""
        for page, count in enumerate(self._references):
            if (count == 0) != (page in self._free or page == TRASH_PAGE):
                raise RuntimeError(f"page {page}: {count} references, free: {page in self._free}")
        if {page: digest for digest, page in self._page_of.items()} != self._hash_of:
            raise RuntimeError("the prefix cache's two indexes differ")

    def _hold(self, page: int) -> None:
        if self._references[page] == 0:
            del self._free[page]
        self._references[page] += 1

    def _forget(self, page: int) -> None:
        digest = self._hash_of.pop(page, None)
        if digest is not None:
            del self._page_of[digest]

    def _chain(self, sequence: Sequence, root: bytes, count: int) -> None:
        """Chain hashes of at least the first `count` pages, all of them full; those that are known are not computed."""
        hashes, size = sequence.page_hashes, self.page_size
        parent = hashes[-1] if hashes else b""
        start = sequence.adapter_start
        for i in range(len(hashes), count):
            if i == start // size:
                # Where in the page it starts depends on tokens behind it: the invocation may go on there.
                parent += root + start.to_bytes(8, "little") if start else root
            tokens = array("q", sequence.token_ids[i * size : (i + 1) * size])
            parent = hashlib.blake2b(parent + tokens.tobytes(), digest_size=16).digest()
            hashes.append(parent)
