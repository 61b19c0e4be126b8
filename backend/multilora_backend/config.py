# SPDX-License-Identifier: Apache-2.0
"""The configuration: one frozen dataclass, from config.pbtxt, vllm_backend's model.json and the environment.

Sources in rising precedence: the defaults below, `model.json` in the version folder, the `parameters` of
config.pbtxt, environment variables `MULTILORA_<FIELD>`. A key that no source knows is refused by name, and
`vLLM` engine arguments that have no effect here are listed with the reason in `VLLM_IGNORED`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import TIMEOUT_MAX
from typing import Any, Literal

from multilora_backend.errors import ErrorCode, MultiloraError, invalid

ENV_PREFIX = "MULTILORA_"
_HEADER = re.compile(r"[A-Za-z][A-Za-z0-9-]{0,63}")


@dataclass(frozen=True)
class Config:
    """What an operator may set. Paths are relative to the model's folder in the repository. Units are in names."""

    # Model
    model: str = ""
    """Folder of a transformers model (config.json, safetensors, tokenizer.json). Required."""
    adapters: str = ""
    """Folder with one PEFT adapter a sub-folder, or a YAML or JSON file `name: folder`. Empty: LoRA is off."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda if torch sees a CUDA device."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: float32 on the CPU, the checkpoint's dtype on CUDA."""
    max_model_len: int = 0
    """Prompt and output tokens together; 0: what the model's config allows."""

    # Batching
    max_num_seqs: int = 256
    """Sequences that run at the same time."""
    max_num_batched_tokens: int = 2048
    """Tokens in one step; longer prompts are prefilled in chunks."""
    max_waiting: int = 10_000
    """Sequences that may wait; one more is answered UNAVAILABLE at once."""
    block_size: int = 16
    """Tokens in a KV page."""
    kv_cache_bytes: int = 0
    """0: on the CPU 256 MiB, on CUDA what `gpu_memory_utilization` leaves."""
    kv_host_bytes: int = 2 * 2**30
    """Host memory for KV pages that others need on the device meanwhile; 0: what loses its pages is computed again."""
    gpu_memory_utilization: float = 0.9
    """Share of the device's memory that weights, adapters, graphs and KV pages may take together."""
    cuda_graph_bytes: int = 3 * 2**30
    """Device memory for captured steps (CUDA graphs); when it is spent, fewer sizes are captured."""
    enforce_eager: bool = False
    """Capture nothing: a quicker start and slower decoding."""
    async_scheduling: Literal["auto", "true", "false"] = "auto"
    """Prepare a step while the one before it runs. auto: on CUDA."""
    enable_prefix_caching: bool = True
    """Requests of the same adapter version with the same beginning share KV pages."""
    strategies: str = "adapter_first,fair_share,priority,preload"
    """Which of these order requests and adapters, see docs/scheduling.md; empty: first come, first served."""
    max_overtake_s: float = 2.0
    """adapter_first: so long may requests of resident adapters overtake one whose adapter must be loaded."""
    tenure_s: float = 2.0
    """So long an adapter keeps its place in the batch when there are more than fit and another one is overdue."""
    fair_input_weight: float = 1.0
    """fair_share: what a prompt token counts."""
    fair_output_weight: float = 2.0
    """fair_share: what an output token counts."""
    tenants: str = ""
    """YAML file with classes, weights, permissions and caps of tenants; empty: all are equal, without caps."""

    # Adapters
    max_loras: int = 0
    """Different adapters in one step; 0: as many as the device pool holds."""
    adapter_device_bytes: int = 0
    """Device pool for adapters; 0: on the CPU 256 MiB, on CUDA a twelfth of the device, at most 8 GiB."""
    adapter_extras_bytes: int = 0
    """Device memory for what adapters have besides A and B, as DoRA; 0: a sixteenth of `adapter_device_bytes`."""
    adapter_host_bytes: int = 4 * 2**30
    """Host cache for adapters in device layout; on CUDA pinned at start, as far as the configured adapters need it."""
    adapter_load_threads: int = 2
    """Threads that read, check and lay out adapters."""
    adapters_watch_s: float = 5.0
    """How often `adapters` is looked at for adapters that came, changed or went; 0: never."""
    adapter_roots: str = ""
    """What adapters may come from besides `adapters`: folders, `hf:owner[/repository]`, URLs; commas between them."""
    adapter_cache_dir: str = ""
    """Where adapters from a hub or a URL are kept; empty: multilora/adapters in the user's cache folder."""
    adapter_state_file: str = ""
    """Where adapters that commands loaded, aliases and pins outlive a restart; empty: `.multilora.json` in the folder
    `adapters`, or the file's name with `.state.json` beside it. Each server needs its own."""
    adapter_max_bytes: int = 8 * 2**30
    """Adapters with larger files are refused, before they are downloaded where their size is told."""
    lora_experts: bool = True
    """Mixtures of experts: keep room for LoRA on experts. Without, adapters of attention alone take far less."""
    lora_strategy: Literal["auto", "reference", "grouped", "bordered"] = "auto"
    """auto: grouped on the CPU; on CUDA bordered: A rides in the base GEMM, in prompts for few ranks only."""
    admin_token: str = ""
    """What every command to the model multilora_adapters must then carry as `token`; empty: none is asked for."""

    # Requests
    tenant_header: str = ""
    """Header that names a request's tenant, for a gateway to set; `tenant` in the request is then refused."""
    priority_header: str = ""
    """Header with a request's priority, likewise; `request_priority` in the request is then refused."""
    default_max_tokens: int = 16
    """When a request names no max_tokens; vLLM's default."""
    max_prompt_bytes: int = 4 * 2**20
    """Longer prompts are refused before they are tokenised."""
    max_n: int = 16
    """Largest `n` of a request."""

    # Processes
    engine_python: str = ""
    """Interpreter of the engine process; empty: the first python3 on PATH."""
    engine_start_timeout_s: float = 600.0
    """How long the load of the Triton model waits for the engine."""
    runtime_dir: str = ""
    """Where the engine's socket lies; empty: a folder of this server in the system's temporary folder."""
    num_threads: int = 0
    """torch's CPU threads in the engine; 0: one less than the cores, on CUDA at most 4."""
    report_custom_metrics: bool = True
    """Metrics on Triton's endpoint; REPORT_CUSTOM_METRICS of vllm_backend sets it too."""
    metrics_adapters: int = 64
    """Adapters with time series of their own for latency, in each front end; the rest shares `__other__`."""
    metrics_tenants: int = 64
    """Tenants with time series of their own, likewise."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Of the front end and the engine."""

    def __post_init__(self) -> None:
        def require(name: str, ok: bool, limit: str) -> None:
            if not ok:
                raise invalid(name, f"must be {limit}, got {getattr(self, name)!r}")

        for name in (
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_waiting",
            "block_size",
            "adapter_load_threads",
        ):
            require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("default_max_tokens", "max_prompt_bytes", "max_n"):
            require(name, getattr(self, name) >= 1, "at least 1")
        for name in (
            "max_model_len",
            "kv_cache_bytes",
            "kv_host_bytes",
            "cuda_graph_bytes",
            "max_loras",
            "adapter_device_bytes",
            "adapter_extras_bytes",
            "num_threads",
        ):
            require(name, getattr(self, name) >= 0, "0 or more")
        require("adapter_host_bytes", self.adapter_host_bytes >= 0, "0 or more")
        require("metrics_adapters", self.metrics_adapters >= 0, "0 or more")
        require("metrics_tenants", self.metrics_tenants >= 0, "0 or more")
        require("adapters_watch_s", 0 <= self.adapters_watch_s <= TIMEOUT_MAX, f"0 to {TIMEOUT_MAX:.0f}")
        require("adapter_max_bytes", self.adapter_max_bytes >= 1, "at least 1")
        require("max_overtake_s", 0 <= self.max_overtake_s < math.inf, "0 or more, and finite")
        require("tenure_s", 0 < self.tenure_s < math.inf, "above 0, and finite")
        for name in ("fair_input_weight", "fair_output_weight"):
            require(name, 0 <= getattr(self, name) < math.inf, "0 or more, and finite")
        require("fair_output_weight", self.fair_input_weight + self.fair_output_weight > 0, "above 0, or the other is")
        for name in ("tenant_header", "priority_header"):
            value = getattr(self, name)
            require(name, not value or bool(_HEADER.fullmatch(value)), "the name of an HTTP header")
        require(
            "engine_start_timeout_s",
            0 < self.engine_start_timeout_s <= TIMEOUT_MAX,
            f"above 0, up to {TIMEOUT_MAX:.0f}",
        )
        require("gpu_memory_utilization", 0 < self.gpu_memory_utilization <= 1, "in (0, 1]")

    @property
    def lora_enabled(self) -> bool:
        return bool(self.adapters)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], source: str) -> Config:
        """Builds a config from names and values; strings are cast to the field's type.

        Raises MultiloraError(INVALID_ARG) that names `source` and the key if a key is unknown or a value bad.
        """
        return cls(**_checked(values, source))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Config:
        return cls.from_mapping(json.loads(text), "configuration")


_TYPES: dict[str, Any] = typing.get_type_hints(Config)
_PATHS = ("model", "adapters", "tenants", "adapter_state_file")
_TRUE = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}

VLLM_IGNORED: dict[str, str] = {
    "disable_log_stats": "metrics are on Triton's endpoint",
    "disable_log_requests": "requests are not logged",
    "max_lora_rank": "ranks are not padded; memory bounds them (adapter_device_bytes)",
    "max_cpu_loras": "the host cache is bounded in bytes (adapter_host_bytes)",
    "lora_dtype": "adapters have the model's dtype",
    "seed": "a request's seed is the request's",
    "swap_space": "kv_host_bytes bounds what preempted sequences take on the host",
    "enable_chunked_prefill": "prefill is always chunked",
    "tokenizer_mode": "the tokenizers library is always used",
    "limit_mm_per_prompt": "text only",
}
"""Engine arguments of model.json that are accepted and do nothing, with the reason that is logged."""

_VLLM_FIXED: dict[str, tuple[Any, str]] = {
    "tensor_parallel_size": (1, "one device a model"),
    "pipeline_parallel_size": (1, "one device a model"),
    "data_parallel_size": (1, "one device a model"),
    "trust_remote_code": (False, "code from a model folder is never run"),
    "quantization": (None, "quantised bases are not supported"),
    "speculative_config": (None, "speculative decoding is not supported"),
}
"""Engine arguments that are accepted at one value only."""

TRITON_PARAMETERS = {"FORCE_CPU_ONLY_INPUT_TENSORS", "EXECUTION_ENV_PATH", "REPORT_CUSTOM_METRICS"}


def load(
    model_dir: Path, version: str, parameters: Mapping[str, str], environ: Mapping[str, str]
) -> tuple[Config, list[str]]:
    """Reads all sources for the Triton model in `model_dir` (the folder that holds config.pbtxt).

    Returns the config, with the paths of `_PATHS` made absolute, and the notes to log (ignored arguments).
    """
    version_dir = model_dir / version
    values, notes = _from_vllm(version_dir)
    ours = {key: value for key, value in parameters.items() if key not in TRITON_PARAMETERS}
    values.update(_relative_to(model_dir, _checked(ours, "config.pbtxt parameters")))
    if "REPORT_CUSTOM_METRICS" in parameters:
        values["report_custom_metrics"] = parameters["REPORT_CUSTOM_METRICS"]
    env = {k[len(ENV_PREFIX) :].lower(): v for k, v in environ.items() if k.startswith(ENV_PREFIX)}
    values.update(_relative_to(Path.cwd(), _checked(env, f"environment ({ENV_PREFIX}*)")))
    config = Config.from_mapping(values, "configuration")
    if not config.model:
        raise invalid("model", "is required: set it in config.pbtxt, model.json or MULTILORA_MODEL")
    return config, notes


def _from_vllm(version_dir: Path) -> tuple[dict[str, Any], list[str]]:
    path = version_dir / "model.json"
    if not path.exists():
        return {}, []
    try:
        arguments = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise invalid("model.json", f"is not JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise invalid("model.json", "must be one JSON object of engine arguments")
    notes, values = [], {}
    enable_lora = _cast("enable_lora", arguments.pop("enable_lora", False), bool, "model.json")
    for key, value in arguments.items():
        if key in VLLM_IGNORED:
            notes.append(f"model.json: {key} has no effect: {VLLM_IGNORED[key]}")
        elif key in _VLLM_FIXED:
            only, why = _VLLM_FIXED[key]
            if value != only:
                raise MultiloraError(
                    ErrorCode.UNSUPPORTED,
                    f"model.json: {key}: only {only!r} is supported ({why}), got {value!r}",
                )
        elif key == "max_model_len" and value is None:
            continue
        else:
            values[key] = value
    values = _relative_to(version_dir, _checked(values, "model.json"))
    if enable_lora:
        adapters = version_dir / "multi_lora.json"
        if not adapters.exists():
            raise invalid("multi_lora.json", f"is missing beside model.json in {version_dir}, and enable_lora is set")
        values["adapters"] = str(adapters)
    return values, notes


def _relative_to(base: Path, values: dict[str, Any]) -> dict[str, Any]:
    return {key: str((base / value).resolve()) if key in _PATHS and value else value for key, value in values.items()}


def _checked(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    unknown = sorted(set(values) - set(_TYPES))
    if unknown:
        raise invalid(source, f"unknown key {', '.join(map(repr, unknown))}; known are {', '.join(_TYPES)}")
    return {key: _cast(key, value, _TYPES[key], source) for key, value in values.items()}


def _cast(key: str, value: Any, to: Any, source: str) -> Any:
    """Strings become the field's type, as config.pbtxt and the environment know nothing else."""
    if isinstance(to, types.GenericAlias) or typing.get_origin(to) is Literal:
        choices = typing.get_args(to)
        value = str(value).lower() if isinstance(value, bool) else value
        if value not in choices:
            raise invalid(key, f"must be one of {', '.join(choices)}, got {value!r} ({source})")
        return value
    try:
        if to is bool:
            return value if isinstance(value, bool) else _TRUE[str(value).lower()]
        if to is int and not isinstance(value, bool):
            if isinstance(value, float) and value != int(value):
                raise ValueError
            return int(value)
        if to is float and not isinstance(value, bool):
            return float(value)
        if to is str and isinstance(value, str):
            return value
    except (KeyError, ValueError, TypeError, OverflowError):
        pass
    raise invalid(
        key,
        f"must be {'true or false' if to is bool else f'of type {to.__name__}'}, got {value!r} ({source})",
    )
