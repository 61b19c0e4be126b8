# SPDX-License-Identifier: Apache-2.0
"""Requests that go on while a test does something else, and whose answers are checked afterwards."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from multilora_client import Client
from tiny.tasks import BASE, TASKS, held_out_words

GREEDY = {"temperature": 0.0, "max_tokens": 32}


@dataclass(frozen=True)
class Answered:
    name: str
    word: str
    text: str
    sent: float
    """time.monotonic() before the request was sent."""


class Traffic:
    """A thread for each name, None for the base, that sends one request after the other."""

    def __init__(self, url: str, names: Sequence[str | None]) -> None:
        self.answers: list[Answered] = []
        self.errors: list[str] = []
        self._client = Client(url)
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(name, seed), daemon=True) for seed, name in enumerate(names)
        ]

    def _run(self, name: str | None, seed: int) -> None:
        words = held_out_words(25, seed=seed)
        count = 0
        while not self._ended.is_set():
            word, sent = words[count % len(words)], time.monotonic()
            try:
                text = self._client.generate(word, name, **GREEDY).text
            except Exception as error:  # told by `wrong`
                self.errors.append(f"{name}: {error!r}")
                return
            self.answers.append(Answered(name or BASE, word, text, sent))
            count += 1

    def wait_for_more(self, per_thread: int, timeout: float = 30.0) -> None:
        """Until every thread would have had time for so many more answers."""
        target = len(self.answers) + per_thread * len(self._threads)
        deadline = time.monotonic() + timeout
        while len(self.answers) < target and not self.errors:
            assert time.monotonic() < deadline, "the traffic stands still"
            time.sleep(0.01)

    def wrong(self, right: Mapping[str, Set[str]], since: float = 0.0) -> list[object]:
        """Errors, and answers that are not wholly those of one of the tasks that `right` has for their name.

        With `since`, of requests that were sent after it. Empty is right only if there was something to check.
        """
        checked = [each for each in self.answers if each.sent >= since and each.name in right]
        assert checked, "there was no traffic to judge by"
        bad = [each for each in checked if each.text not in {TASKS[task](each.word) for task in right[each.name]}]
        return [*self.errors, *bad]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(30)
        self._client.close()
