# SPDX-License-Identifier: Apache-2.0
"""The engine's adapters: the manager as the configuration wants it, what is watched, and whose sequences hold what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from multilora_backend.adapters import layout
from multilora_backend.adapters.cache import default_cache_dir, fetch
from multilora_backend.adapters.catalogue import Catalogue
from multilora_backend.adapters.entry import AdapterEntry
from multilora_backend.adapters.folder import WEIGHTS
from multilora_backend.adapters.manager import AdapterManager
from multilora_backend.adapters.polled import Polled
from multilora_backend.adapters.sources import Roots, parse_source
from multilora_backend.adapters.statefile import StateFile
from multilora_backend.adapters.watcher import Watcher
from multilora_backend.config import Config
from multilora_backend.core import Sequence
from multilora_backend.engine import memory
from multilora_backend.errors import ErrorCode
from multilora_backend.models.fusion import base_model
from multilora_backend.models.loader import LoadedModel

if TYPE_CHECKING:
    from multilora_backend.engine.engine import Engine

TRANSFERS = 2
"""Weights on their way to the device while the next ones are read."""
MAX_LOADING_BYTES = 2**30
"""Loads of very large adapters pin their memory when they come."""


def create_adapters(
    config: Config, model: LoadedModel, wake: Callable[[], None]
) -> tuple[AdapterManager, Watcher | None]:
    """`wake` is called from other threads when there is news. The watcher has not been started."""
    place = Path(config.adapters)
    roots = Roots.for_operator(config.adapter_roots, config.adapters)
    catalogue = Catalogue.read(config.adapters, roots) if config.lora_enabled else None
    cache_dir = Path(config.adapter_cache_dir) if config.adapter_cache_dir else default_cache_dir()
    if catalogue is not None and model.device.type == "cuda":
        layout.reserve(pinned_bytes(config, catalogue.entries))
    manager = AdapterManager(
        catalogue,
        model.sites,
        device_bytes=config.adapter_device_bytes or memory.adapter_bytes(model.device),
        extras_bytes=memory.extras_bytes(config, model.device),
        base=base_model(model.module, Path(config.model)),
        host_bytes=config.adapter_host_bytes,
        load_threads=config.adapter_load_threads,
        dtype=model.dtype,
        device=model.device,
        on_change=wake,
        locate=partial(fetch, cache_dir=cache_dir, max_bytes=config.adapter_max_bytes),
        admit=partial(
            parse_source,
            roots=Roots.for_clients(config.adapter_roots, config.adapters),
            base=place if place.is_dir() else place.parent,
        ),
        watched=config.adapters_watch_s > 0,
        state=StateFile(state_path(config)) if config.lora_enabled else None,
    )
    watcher = None
    if catalogue is not None and config.adapters_watch_s > 0:
        watcher = Watcher(config.adapters, roots, config.adapters_watch_s, wake, catalogue.entries)
    return manager, watcher


def pinned_bytes(config: Config, entries: Iterable[AdapterEntry]) -> int:
    """What adapters of this machine will take of the host by the sizes of their files: kept and being loaded."""
    sizes = [_file_size(entry) for entry in entries if entry.source.is_local]
    loading = (2 * config.adapter_load_threads + TRANSFERS) * max(sizes, default=0)
    return min(sum(sizes), config.adapter_host_bytes) + min(loading, MAX_LOADING_BYTES)


def _file_size(entry: AdapterEntry) -> int:
    try:
        return (entry.source.path / WEIGHTS).stat().st_size
    except OSError:
        return 0  # which its check will tell


def state_path(config: Config) -> Path:
    """See `Config.adapter_state_file`."""
    if config.adapter_state_file:
        return Path(config.adapter_state_file)
    place = Path(config.adapters)
    return place / ".multilora.json" if place.is_dir() else place.with_name(place.name + ".state.json")


def see_to_holders(engine: Engine, polled: Polled) -> None:
    """Sequences whose revision cannot be served go on with its successor, or end with the reason.

    A revision that was unloaded is gone with the last of them: nothing may be asked of one that nobody waits for.
    """
    for key in polled.failed:
        if waiting := engine.scheduler.waiting_for(key):
            engine.fail(waiting, ErrorCode.INTERNAL, engine.adapters.reason(key))
    for key in polled.looked_at:
        _hand_back(engine, engine.scheduler.waiting_for(key), key)
    for key, successor in polled.moved:
        waiting = engine.scheduler.waiting_for(key)
        if not waiting:
            continue
        # What has output cannot go on with other weights: it would be half of one and half of another adapter.
        counts = Counter(sequence.key[:2] for sequence in waiting)
        begun = {s.key[:2] for s in waiting if s.num_output_tokens or counts[s.key[:2]] < s.sampling.n}
        name = engine.adapters.records[key].title
        message = f"LoRA {name} was changed at its source while this request waited to go on with what it was before"
        engine.fail([s for s in waiting if s.key[:2] in begun], ErrorCode.UNAVAILABLE, message)
        _hand_back(engine, [sequence for sequence in waiting if not sequence.finished], successor)
        for sequence in waiting:
            if not sequence.finished:
                engine.adapters.hold(successor)
                engine.scheduler.reassign(sequence, successor)
                engine.adapters.drop(key)


def _hand_back(engine: Engine, waiting: list[Sequence], key: str) -> None:
    """Hands back what came before it was known which tokens the adapter has. Nothing of it can have run with it.

    What names tokens that the adapter has not is handed back as well: it is refused when it comes again.
    """
    if not waiting:
        return
    tokens, known = engine.adapters.tokens(key), engine.adapters.vocabulary(key) or engine.card.vocab_size
    wrong = [each for each in waiting if each.tokens_digest != tokens.digest or each.ids_below > known]
    engine.retokenise(wrong, tokens)
