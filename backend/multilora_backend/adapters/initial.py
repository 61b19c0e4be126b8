# SPDX-License-Identifier: Apache-2.0
"""PiSSA, OLoRA, CorDA and LoRA-GA take their first A and B out of the base model's weights before they train.

What was learned is then B A - B0 A0, so with the adapter as it was before training (A0, B0) it is plain LoRA of twice
the rank on the base model that everybody shares. PEFT's save_pretrained does the same, to the bit, when it is told of
the initial adapter (path_initial_model_for_weight_conversion); here it is done to files that were saved without.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from multilora_backend.adapters import checks
from multilora_backend.adapters.peft_config import PeftConfig
from multilora_backend.adapters.tensors import (
    Header,
    TensorInfo,
    encode_header,
    metadata_of,
    parse_header,
    tensor_of,
)
from multilora_backend.errors import ErrorCode, MultiloraError, invalid

_A_OR_B = re.compile(r".*\.lora_(A|B)(?:\.default)?\.weight")


def initial_folder(config: PeftConfig) -> str:
    """Below the adapter's own: `pissa_init`, as PEFT's example has it, or likewise `olora_init`, ..."""
    return f"{config.init}_init"


def require_initial(folder: Path, config: PeftConfig) -> None:
    """Raises MultiloraError that says what to do unless the initial adapter is there."""
    place = initial_folder(config)
    if not (folder / place).is_dir():
        raise MultiloraError(
            ErrorCode.UNSUPPORTED,
            f"init_lora_weights: {config.init!r} changes the base model's weights; convert the adapter when saving it "
            "(path_initial_model_for_weight_conversion of PEFT's save_pretrained), or put the adapter as it was before "
            f"training into its folder as {place}",
        )


def converted_config(config: PeftConfig) -> PeftConfig:
    """Twice the rank, the same scale. Raises MultiloraError for what PEFT does not convert."""
    if config.use_rslora and (config.rank_pattern or config.alpha_pattern):
        raise _not_converted("use_rslora", config, "together with rank_pattern or alpha_pattern")
    if config.target_parameters:
        raise _not_converted("target_parameters", config)
    return replace(
        config,
        r=checks.rank("r", 2 * config.r),
        lora_alpha=config.lora_alpha * (2**0.5 if config.use_rslora else 2),
        rank_pattern=tuple((key, checks.rank("rank_pattern", 2 * rank)) for key, rank in config.rank_pattern),
        alpha_pattern=tuple((key, 2 * alpha) for key, alpha in config.alpha_pattern),
        init="",
    )


def converted_header(config: PeftConfig, trained: Header, initial: Header, labels: tuple[str, str]) -> Header:
    """Of the file that PEFT would write; `labels` name the two files.

    Raises MultiloraError unless both have the same tensors, and nothing but A and B.
    """
    ours, first = (parse_header(header, label) for header, label in zip((trained, initial), labels, strict=True))
    for name, info in ours.items():
        match = _A_OR_B.fullmatch(name)
        if match is None:
            raise _not_converted(name, config, "with other tensors than A and B of linears")
        _check_twin(info, first.get(name), labels[1])
    for name in first.keys() - ours.keys():
        raise invalid(f"{labels[1]}: {name}", "the trained adapter has none")
    shapes = {name: (info.dtype, _doubled(info)) for name, info in ours.items()}
    return encode_header(shapes, metadata_of(trained, labels[0]))


def convert(
    result: Header, trained: Header, data: NDArray[np.uint8], initial: Header, first: NDArray[np.uint8], label: str
) -> NDArray[np.uint8]:
    """The file that `result` is the header of: A is [A; A0], B is [B, -B0]."""
    converted = np.empty(result.file_size, dtype=np.uint8)
    converted[: len(result.raw)] = np.frombuffer(result.raw, dtype=np.uint8)
    own, other = parse_header(trained, label), parse_header(initial, label)
    for name, info in parse_header(result, label).items():
        new, old = tensor_of(own[name], data), tensor_of(other[name], first)
        joined = torch.cat([new, -old], dim=1) if _is_b(name) else torch.cat([new, old])
        converted[info.start : info.stop] = joined.flatten().view(torch.uint8).numpy()
    return converted


def _check_twin(info: TensorInfo, twin: TensorInfo | None, label: str) -> None:
    if twin is None:
        raise invalid(f"{label}: {info.name}", "is missing, and the trained adapter has it")
    for what, new, old in (("shape", info.shape, twin.shape), ("dtype", info.dtype, twin.dtype)):
        if new != old:
            raise invalid(f"{label}: {info.name}", f"has {what} {old}, the trained adapter {new}")
    if len(info.shape) != 2:
        raise invalid(info.name, f"must have two dimensions, got shape {list(info.shape)}")


def _doubled(info: TensorInfo) -> tuple[int, ...]:
    height, width = info.shape
    return (height, 2 * width) if _is_b(info.name) else (2 * height, width)


def _is_b(name: str) -> bool:
    match = _A_OR_B.fullmatch(name)
    return match is not None and match[1] == "B"


def _not_converted(field: str, config: PeftConfig, how: str = "") -> MultiloraError:
    return MultiloraError(ErrorCode.UNSUPPORTED, f"{field}: PEFT does not convert {config.init} {how}".rstrip())
