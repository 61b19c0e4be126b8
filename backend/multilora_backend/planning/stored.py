# SPDX-License-Identifier: Apache-2.0
"""A base model whose weights stay in its files until an adapter is compared with them, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from multilora_backend.adapters.base import EMBEDDING, HEAD, BaseModel
from multilora_backend.adapters.base_files import stored_tensors
from multilora_backend.adapters.peft_plan import AdapterPlan
from multilora_backend.adapters.tensors import DTYPES, TensorInfo
from multilora_backend.core import LoraSite
from multilora_backend.errors import ErrorCode, MultiloraError, invalid

Places = Mapping[str, tuple[Path, TensorInfo]]


@dataclass(frozen=True)
class StoredWeights:
    folder: Path
    dtype: torch.dtype
    """In which the model runs."""

    @cached_property
    def places(self) -> Places:
        return {info.name: (path, info) for path, info in stored_tensors(self.folder)}

    def find(self, name: str, shape: Sequence[int]) -> tuple[Path, TensorInfo]:
        """Raises MultiloraError unless a tensor of that name and shape is stored."""
        if name not in self.places:
            raise invalid("model", f"{self.folder} stores no {name}")
        path, info = self.places[name]
        if info.dtype not in DTYPES or info.shape != tuple(shape):
            raise invalid("model", f"{self.folder} stores {name} as {info.dtype} {list(info.shape)}")
        return path, info

    def read(self, name: str, shape: Sequence[int]) -> Tensor:
        """Raises as `find`, or OSError."""
        path, info = self.find(name, shape)
        with path.open("rb") as file:
            file.seek(info.start)
            data = bytearray(file.read(info.stop - info.start))
        return torch.frombuffer(data, dtype=DTYPES[info.dtype]).view(info.shape).to(self.dtype)


@dataclass(frozen=True, eq=False)
class StoredLinear:
    """A `BaseLinear`."""

    weights: StoredWeights
    site: LoraSite
    biased: bool

    @property
    def base_weight(self) -> Tensor:
        return self._read("weight", self.site.in_features)

    @property
    def base_bias(self) -> Tensor | None:
        return self._read("bias") if self.biased else None

    def _read(self, name: str, *columns: int) -> Tensor:
        parts = zip(self.site.modules, self.site.out_features, strict=True)
        return torch.cat([self.weights.read(f"{module}.{name}", (rows, *columns)) for module, rows in parts])


def with_weights(base: BaseModel, plan: AdapterPlan, sites: Sequence[LoraSite], dtype: torch.dtype) -> BaseModel:
    """`base`, whose tensors are on the meta device, with those that `plan` is compared with or computed from.

    Those of linears are read when they are asked for. Raises MultiloraError or OSError if they are not in the files, by
    the names that modules have in the model.
    """
    if base.identity is None:
        raise MultiloraError(ErrorCode.UNSUPPORTED, "model: nothing is known of its files")
    stored = StoredWeights(base.identity.folder, dtype)
    linears = {
        index: StoredLinear(stored, sites[index], linear.base_bias is not None)
        for index, linear in base.linears.items()
    }
    for part in plan.affine:
        site = sites[part.site]
        stored.find(f"{part.module}.weight", (site.out_features[part.slice], site.in_features))
    norms = dict(base.norms)
    for norm in plan.norms:
        norms[norm.module] = stored.read(f"{norm.module}.weight", base.norms[norm.module].shape)
    embedding, head = base.embedding, base.head
    if plan.tables and embedding is not None and head is not None:
        own = stored.read(f"{EMBEDDING}.weight", embedding.shape)
        head = own if base.tied else stored.read(f"{HEAD}.weight", head.shape)
        embedding = own
    return replace(base, linears=linears, norms=norms, embedding=embedding, head=head)
