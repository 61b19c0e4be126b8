# SPDX-License-Identifier: Apache-2.0
"""What a tenant has of its caps: sequences, and a bucket of tokens. Time is an argument."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from multilora_backend.errors import ErrorCode, MultiloraError
from multilora_backend.scheduling.tenants import Tenant


@dataclass(eq=False)
class Quota:
    """One tenant's use. Sequences are admitted while the bucket is not empty, and may leave it in debt.

    So a tenant gets `tokens_per_s` in the long run without that anybody must know how long an output will be.
    """

    tenant: Tenant
    running: int = 0
    waiting: int = 0
    _level: float = field(default=math.nan, init=False)
    _at: float = field(default=0.0, init=False)

    @property
    def capped(self) -> bool:
        return bool(self.tenant.tokens_per_s or self.tenant.max_running)

    @property
    def capacity(self) -> float:
        return self.tenant.burst_tokens or self.tenant.tokens_per_s

    def delay(self, now: float) -> float:
        """Seconds until one more sequence may start: 0, or infinite if one of its own must end first."""
        if self.tenant.max_running and self.running >= self.tenant.max_running:
            return math.inf
        if not self.tenant.tokens_per_s:
            return 0.0
        self._fill(now)
        missing = min(1.0, self.capacity) - self._level
        # Less than that is a float's rest, which must not put the moment off again and again.
        return missing / self.tenant.tokens_per_s if missing > 1e-6 else 0.0

    def charge(self, tokens: int, now: float) -> None:
        if self.tenant.tokens_per_s:
            self._fill(now)
            self._level -= tokens

    def forgettable(self, now: float) -> bool:
        """True if a fresh one would be the same."""
        if self.running or self.waiting:
            return False
        if self.tenant.tokens_per_s:
            self._fill(now)
        return not self.tenant.tokens_per_s or self._level >= self.capacity

    def check(self, count: int) -> None:
        """Raises MultiloraError(UNAVAILABLE) if so many more sequences may not even wait."""
        cap = self.tenant.max_waiting
        if cap and self.waiting + count > cap:
            raise MultiloraError(
                ErrorCode.UNAVAILABLE, f"too many waiting requests of tenant {self.tenant.name!r}: max_waiting is {cap}"
            )

    def _fill(self, now: float) -> None:
        if math.isnan(self._level):
            self._level = self.capacity
        else:
            # A clock that goes back takes nothing away.
            gained = max(0.0, now - self._at) * self.tenant.tokens_per_s
            self._level = min(self.capacity, self._level + gained)
        self._at = now
