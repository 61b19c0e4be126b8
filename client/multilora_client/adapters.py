# SPDX-License-Identifier: Apache-2.0
"""The commands of operators: which adapters there are, and what becomes of them while the server serves.

`Client.adapters` and `AsyncClient.adapters` have the same methods. All are idempotent: what is there already, or gone
already, is no error.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, cast

from multilora_client.errors import RequestTimeout, ServerError
from multilora_client.settings import COMMAND_TIMEOUT_S
from multilora_client.types import AdapterInfo

PAGE = 250
"""Adapters asked for at once by `list`."""


class Adapters:
    """Where a method has `wait`, it returns when all is done, and raises RequestTimeout after `timeout` seconds.

    What was begun then goes on; `show` tells how far it is.
    """

    def __init__(self, ask: Callable[[str, Mapping[str, Any]], dict[str, Any]]) -> None:
        self._ask = ask

    def load(
        self,
        name: str,
        source: str | None = None,
        *,
        version: str | None = None,
        pinned: bool = False,
        tenants: Sequence[str] = (),
        wait: bool = True,
        timeout: float = COMMAND_TIMEOUT_S,
    ) -> AdapterInfo:
        """Adds an adapter, or replaces it: requests in flight end on what they began with.

        Without `source` it is the folder of that name among the server's configured adapters; what else is allowed
        depends on the server's `adapter_roots`. `version` refuses any other content; `tenants` are who may use it.
        """
        arguments = _load(name, source, version, pinned, tenants, wait, timeout)
        return _adapter(done("load", self._ask("load", arguments), wait))

    def unload(self, name: str, *, wait: bool = True, timeout: float = COMMAND_TIMEOUT_S) -> None:
        """Takes no new requests for it, lets those in flight end, and gives its memory back."""
        done("unload", self._ask("unload", waiting(name, wait, timeout)), wait)

    def preload(self, name: str, *, wait: bool = True, timeout: float = COMMAND_TIMEOUT_S) -> AdapterInfo:
        """Brings it to the device or, if that has no room, to the host's memory."""
        return _adapter(done("preload", self._ask("preload", waiting(name, wait, timeout)), wait))

    def pin(self, name: str, *, wait: bool = True, timeout: float = COMMAND_TIMEOUT_S) -> AdapterInfo:
        """Keeps it on the device until `unpin`."""
        return _adapter(done("pin", self._ask("pin", waiting(name, wait, timeout)), wait))

    def unpin(self, name: str) -> AdapterInfo:
        return _adapter(self._ask("unpin", {"name": name}))

    def alias(self, alias: str, target: str) -> None:
        """Lets `alias` stand for a name or `name@version`, from the next request on."""
        self._ask("alias", {"alias": alias, "target": target})

    def unalias(self, alias: str) -> None:
        self._ask("unalias", {"alias": alias})

    def show(self, name: str) -> AdapterInfo:
        """Raises AdapterNotFound if there is none of that name, alias or `name@version`."""
        return _adapter(self._ask("show", {"name": name}))

    def list(self, prefix: str = "", state: str | None = None) -> list[AdapterInfo]:
        """All whose names begin with `prefix`, in order of name."""
        found: list[AdapterInfo] = []
        while not _take(found, self._ask("list", _page(prefix, state, len(found)))):
            pass
        return found


class AsyncAdapters:
    """See `Adapters`."""

    def __init__(self, ask: Callable[[str, Mapping[str, Any]], Awaitable[dict[str, Any]]]) -> None:
        self._ask = ask

    async def load(
        self,
        name: str,
        source: str | None = None,
        *,
        version: str | None = None,
        pinned: bool = False,
        tenants: Sequence[str] = (),
        wait: bool = True,
        timeout: float = COMMAND_TIMEOUT_S,
    ) -> AdapterInfo:
        arguments = _load(name, source, version, pinned, tenants, wait, timeout)
        return _adapter(done("load", await self._ask("load", arguments), wait))

    async def unload(self, name: str, *, wait: bool = True, timeout: float = COMMAND_TIMEOUT_S) -> None:
        done("unload", await self._ask("unload", waiting(name, wait, timeout)), wait)

    async def preload(self, name: str, *, wait: bool = True, timeout: float = COMMAND_TIMEOUT_S) -> AdapterInfo:
        return _adapter(done("preload", await self._ask("preload", waiting(name, wait, timeout)), wait))

    async def pin(self, name: str, *, wait: bool = True, timeout: float = COMMAND_TIMEOUT_S) -> AdapterInfo:
        return _adapter(done("pin", await self._ask("pin", waiting(name, wait, timeout)), wait))

    async def unpin(self, name: str) -> AdapterInfo:
        return _adapter(await self._ask("unpin", {"name": name}))

    async def alias(self, alias: str, target: str) -> None:
        await self._ask("alias", {"alias": alias, "target": target})

    async def unalias(self, alias: str) -> None:
        await self._ask("unalias", {"alias": alias})

    async def show(self, name: str) -> AdapterInfo:
        return _adapter(await self._ask("show", {"name": name}))

    async def list(self, prefix: str = "", state: str | None = None) -> list[AdapterInfo]:
        found: list[AdapterInfo] = []
        while not _take(found, await self._ask("list", _page(prefix, state, len(found)))):
            pass
        return found


def waiting(name: str, wait: bool, timeout: float) -> dict[str, Any]:
    return {"name": name, "wait": wait, "timeout_s": timeout}


def done(action: str, result: dict[str, Any], wait: bool) -> dict[str, Any]:
    """Raises RequestTimeout if somebody waited and the server says that it is not done."""
    if wait and not result.get("done", True):
        state = result.get("adapter", {}).get("state")
        raise RequestTimeout(f"{action} is not done yet{f' (the adapter is {state})' if state else ''}; it goes on")
    return result


def _load(
    name: str,
    source: str | None,
    version: str | None,
    pinned: bool,
    tenants: Sequence[str],
    wait: bool,
    timeout: float,
) -> dict[str, Any]:
    given = {"source": source, "version": version, "pinned": pinned or None, "tenants": [*tenants] or None}
    return {**waiting(name, wait, timeout), **given}


def _page(prefix: str, state: str | None, offset: int) -> dict[str, Any]:
    return {"prefix": prefix, "state": state, "offset": offset, "limit": PAGE}


def _take(found: list[AdapterInfo], page: dict[str, Any]) -> bool:
    """Adds a page; whether it was the last."""
    infos, total = page.get("adapters"), page.get("total")
    if not isinstance(infos, list) or not isinstance(total, int):
        raise ServerError(f"an answer without a list of adapters, only {sorted(page)}")
    found += infos
    return not infos or len(found) >= total


def _adapter(result: dict[str, Any]) -> AdapterInfo:
    if not isinstance(result.get("adapter"), dict):
        raise ServerError(f"an answer without an adapter, only {sorted(result)}")
    return cast(AdapterInfo, result["adapter"])
