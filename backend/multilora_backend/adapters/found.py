# SPDX-License-Identifier: Apache-2.0
"""The tensors of an adapter's file by what they are, and what the config says of whether they must be there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from multilora_backend.adapters.targets import current_name
from multilora_backend.adapters.tensors import DTYPES, TensorInfo
from multilora_backend.errors import ErrorCode, MultiloraError, invalid

_NAME = re.compile(
    r"base_model\.model\.(?P<module>.+?)\."
    r"(?:(?P<A>lora_A(?:\.default)?\.weight)"
    r"|(?P<B>lora_B(?:\.default)?\.weight)"
    r"|(?P<lora_bias>lora_B(?:\.default)?\.bias)"
    r"|(?P<magnitude>lora_magnitude_vector(?:\.default)?(?:\.weight)?)"
    r"|(?P<bias>(?:base_layer\.)?bias)"
    r"|(?P<embedding_A>lora_embedding_A(?:\.default)?)"
    r"|(?P<embedding_B>lora_embedding_B(?:\.default)?)"
    r"|(?P<rows>token_adapter\.trainable_tokens_delta(?:\.default)?)"
    r"|(?P<base_weight>(?:token_adapter\.)?base_layer\.weight)"
    r"|(?P<original>original_module\.weight)"
    r"|(?P<copy>modules_to_save(?:\.default)?\.weight)"
    r"|(?P<weight>weight))"
)

LORA = frozenset({"A", "B"})
LINEAR = LORA | {"lora_bias", "magnitude", "bias"}
NORM = frozenset({"weight"})
TABLE = frozenset({"magnitude", "rows", "base_weight", "original", "copy", "weight"})
EMBEDDING_KINDS = TABLE | {"embedding_A", "embedding_B"}
HEAD_KINDS = TABLE | {"A", "B", "lora_bias"}
"""Kinds of tensors, groups of _NAME, that a module may have in an adapter's file."""

_SPELLED = {
    "A": "lora_A",
    "B": "lora_B",
    "lora_bias": "lora_B.bias",
    "magnitude": "lora_magnitude_vector",
    "embedding_A": "lora_embedding_A",
    "embedding_B": "lora_embedding_B",
    "rows": "token_adapter.trainable_tokens_delta",
}


def module_and_kind(name: str) -> tuple[str, str]:
    """What a tensor belongs to, as today's models call it, and what it is there: one of the kinds above.

    Raises MultiloraError for a name that PEFT does not give.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise MultiloraError(ErrorCode.UNSUPPORTED, f"{name}: is no tensor that a LoRA adapter has")
    return current_name(match["module"]), str(match.lastgroup)


def check_dtype(info: TensorInfo) -> None:
    """Raises MultiloraError for a dtype that an adapter's tensors may not have."""
    if info.dtype not in DTYPES:
        raise MultiloraError(ErrorCode.UNSUPPORTED, f"{info.name}: dtype {info.dtype} is not supported")


class Found:
    def __init__(self, tensors: Mapping[str, TensorInfo], kinds: Callable[[str], frozenset[str]]) -> None:
        """`kinds`: of tensors that a module may have here; none for what the base model does not have.

        Raises MultiloraError for a tensor that has no place.
        """
        self._found: dict[tuple[str, str], TensorInfo] = {}
        for name, info in tensors.items():
            module, kind = module_and_kind(name)
            allowed = kinds(module)
            if not allowed:
                raise invalid(name, f"the base model has no {module} that an adapter can act on")
            if kind not in allowed:
                if kind == "weight":
                    raise MultiloraError(
                        ErrorCode.UNSUPPORTED, f"modules_to_save: full weights of linears ({module}) are not supported"
                    )
                raise invalid(name, f"{module} cannot have it")
            check_dtype(info)
            if self._found.setdefault((module, kind), info) is not info:
                raise invalid(name, "occurs twice, with and without the adapter's name")

    @property
    def modules(self) -> frozenset[str]:
        """That have a tensor."""
        return frozenset(module for module, _ in self._found)

    def __iter__(self) -> Iterator[tuple[tuple[str, str], TensorInfo]]:
        """(module, kind), tensor."""
        return iter(self._found.items())

    def get(self, module: str, kind: str) -> TensorInfo | None:
        return self._found.get((module, kind))

    def expect(self, module: str, kind: str, shape: tuple[int, ...], field: str) -> TensorInfo:
        """The tensor, which must be there. Raises MultiloraError that names it, or the field that asks for it."""
        info = self.get(module, kind)
        if info is None:
            raise invalid(
                f"{module}.{_SPELLED.get(kind, kind)}",
                f"is missing in adapter_model.safetensors, and {field} in adapter_config.json asks for it",
            )
        return checked(info, shape)

    def either(self, module: str, kind: str, shape: tuple[int, ...], field: str, wanted: bool) -> TensorInfo | None:
        """The tensor if the config wants it; then it must be there, and otherwise it must not."""
        if wanted:
            return self.expect(module, kind, shape, field)
        info = self.get(module, kind)
        if info is not None:
            raise invalid(info.name, f"{field} in adapter_config.json does not ask for it")
        return None


def checked(info: TensorInfo, shape: tuple[int, ...]) -> TensorInfo:
    """Raises MultiloraError unless the tensor has that shape."""
    if info.shape != shape:
        raise invalid(
            info.name,
            f"has shape {list(info.shape)}, expected {list(shape)} from the base model and adapter_config.json",
        )
    return info
