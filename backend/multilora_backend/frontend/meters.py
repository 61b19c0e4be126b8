# SPDX-License-Identifier: Apache-2.0
"""The custom metrics' values, added up here and sent to Triton a few times a second.

Each update is a message to tritonserver (15 to 60 us), so none is made where something happens.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping
from typing import Any

from multilora_backend.frontend.series import SERIES, buckets_for

Labels = tuple[tuple[str, str], ...]
"""In the order of `Series.labels`."""


class Meters:
    """One thread's.

    A family of pb_utils keeps its series for as long as it lives itself, whoever else has dropped them. Families of
    one name are one family to Prometheus, so each series that is to end has one of its own.
    """

    def __init__(self, family: Any, base: dict[str, str], max_model_len: int) -> None:
        """`family` is pb_utils.MetricFamily, `base` the labels of every series."""
        self._base = base
        self._create = family
        self._families: dict[str, Any] = {}
        self._buckets: dict[str, list[float]] = {}
        self._children: dict[tuple[str, Labels], tuple[Any, Any]] = {}
        """With their families."""
        for name, series in SERIES.items():
            # An old Python backend has no histograms; everything else is still reported.
            if hasattr(family, series.kind.upper()):
                self._families[name] = self._family(name)
                if series.kind == "histogram":
                    self._buckets[name] = buckets_for(series, max_model_len)
        self._added: defaultdict[tuple[str, Labels], float] = defaultdict(float)
        self._observed: deque[tuple[str, Labels, float]] = deque()
        self._gauges: dict[tuple[str, Labels], float] = {}
        self._sent: dict[tuple[str, Labels], float] = {}

    def add(self, name: str, amount: float, *labels: tuple[str, str]) -> None:
        self._added[name, labels] += amount

    def observe(self, name: str, value: float, *labels: tuple[str, str]) -> None:
        self._observed.append((name, labels, value))

    def set(self, name: str, value: float, *labels: tuple[str, str]) -> None:
        self._gauges[name, labels] = value

    def get(self, name: str, *labels: tuple[str, str]) -> float | None:
        """What a gauge was last set to."""
        return self._gauges.get((name, labels))

    def replace(self, name: str, values: Mapping[Labels, float]) -> None:
        """Sets all series of a gauge that `ends`; those with other labels end."""
        for key in [key for key in self._gauges if key[0] == name and key[1] not in values]:
            self._forget(key)
        for labels, value in values.items():
            self._gauges[name, labels] = value

    def clear(self, *kept: str) -> None:
        """Sets every gauge to 0 but those named."""
        for key in self._gauges:
            if key[0] not in kept:
                self._gauges[key] = 0.0

    def flush(self) -> None:
        """Sends what has changed."""
        added, self._added = self._added, defaultdict(float)
        for key, amount in added.items():
            if amount:
                self._child(key).increment(amount)
        while self._observed:
            name, labels, value = self._observed.popleft()
            if name in self._families:
                self._child((name, labels)).observe(value)
        for key, value in self._gauges.items():
            if self._sent.get(key) != value:
                self._child(key).set(value)
                self._sent[key] = value

    def _forget(self, key: tuple[str, Labels]) -> None:
        for table in (self._gauges, self._sent, self._children):
            table.pop(key, None)

    def _family(self, name: str) -> Any:
        series = SERIES[name]
        kind = getattr(self._create, series.kind.upper())
        return self._create(name=name, description=series.description, kind=kind)

    def _child(self, key: tuple[str, Labels]) -> Any:
        if key not in self._children:
            name, labels = key
            family = self._family(name) if SERIES[name].ends else self._families[name]
            arguments = {"buckets": self._buckets[name]} if name in self._buckets else {}
            metric = family.Metric(labels={**self._base, **dict(labels)}, **arguments)
            self._children[key] = family, metric
        return self._children[key][1]
