# SPDX-License-Identifier: Apache-2.0
"""Triton's metrics as `pb_utils.MetricFamily` gives them, kept in memory.

As in tritonserver 2.51, a family keeps its metrics until it is deleted itself; then their series end, and whoever else
has a metric of the same name and labels holds freed memory.
"""

from __future__ import annotations

import gc
import weakref

from multilora_backend.frontend.series import SERIES

BASE = {"model": "multilora", "version": "1"}


class FakeTriton:
    """Triton's registry: one value for a name and labels, whichever front end's object it is that changes it."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, frozenset], float] = {}
        self.observed: dict[str, list[float]] = {}
        self.observed_by: dict[tuple[str, frozenset], list[float]] = {}
        self.buckets: dict[str, list[float]] = {}
        self.messages = 0
        self.alive: weakref.WeakSet = weakref.WeakSet()
        self.freed: set[tuple[str, frozenset]] = set()

    def family(self, histograms: bool = True) -> type:
        triton = self

        class Metric:
            def __init__(self, name: str, labels: dict[str, str]) -> None:
                assert labels.items() >= BASE.items()
                assert tuple(label for label in labels if label not in BASE) == SERIES[name].labels
                assert all(isinstance(value, str) for value in labels.values())
                self.name, self.labels = name, frozenset(labels.items() - BASE.items())
                self.key = self.name, self.labels
                triton.alive.add(self)
                triton.freed.discard(self.key)

            def send(self) -> None:
                assert self.key not in triton.freed, self.key
                triton.messages += 1

            def increment(self, amount: float) -> None:
                assert amount > 0
                self.send()
                triton.values[self.key] = triton.values.get(self.key, 0) + amount

            def set(self, value: float) -> None:
                self.send()
                triton.values[self.key] = value

            def observe(self, value: float) -> None:
                self.send()
                triton.observed.setdefault(self.name, []).append(value)
                triton.observed_by.setdefault(self.key, []).append(value)

        class MetricFamily:
            COUNTER, GAUGE = range(2)

            def __init__(self, name: str, description: str, kind: int) -> None:
                assert description.endswith(".")
                self.name, self.kind = name, kind
                self.metrics: list[Metric] = []

            def __del__(self) -> None:
                triton.freed.update(metric.key for metric in self.metrics)

            def Metric(self, labels: dict[str, str], buckets: list[float] | None = None) -> Metric:
                assert (buckets is None) == (self.kind != 2)
                if buckets is not None:
                    assert buckets == sorted(buckets)
                    triton.buckets[self.name] = buckets
                self.metrics.append(Metric(self.name, labels))
                return self.metrics[-1]

        if histograms:
            MetricFamily.HISTOGRAM = 2  # type: ignore[attr-defined]
        return MetricFamily

    def __getitem__(self, name: str) -> float:
        return self.values[name, frozenset()]

    def labelled(self, name: str, **labels: str) -> float:
        return self.values[name, frozenset(labels.items())]

    def series(self, name: str) -> list[dict[str, str]]:
        """The labels of those that a scrape would show."""
        gc.collect()
        shown = [metric.labels for metric in self.alive if metric.name == name]
        return [dict(labels) for labels in sorted(shown, key=sorted)]
