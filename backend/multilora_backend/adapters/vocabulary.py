# SPDX-License-Identifier: Apache-2.0
"""What an adapter does to the two tables that have a row for every token: the embedding, and the head.

A table may be replaced whole (`modules_to_save`, or because tokens were added before training), have single rows
replaced (`trainable_token_indices`), or have LoRA on it. The head may share its weight with the embedding; PEFT then
treats the two apart, unless `ensure_weight_tying` or trained rows tie them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from multilora_backend.adapters.base import EMBEDDING, HEAD, BaseModel
from multilora_backend.adapters.extras import AFFINE, LORA_A, LORA_B, ROWS, TOKENS, WEIGHT, ExtraSpec
from multilora_backend.adapters.found import Found, checked
from multilora_backend.adapters.peft_config import PeftConfig
from multilora_backend.adapters.tensors import TensorInfo
from multilora_backend.errors import ErrorCode, MultiloraError, invalid

TOKEN_FIELD = "trainable_token_indices"


@dataclass(frozen=True)
class TablePart:
    """For the embedding or the head; shapes as in the file."""

    place: str
    vocabulary: int
    """Tokens that the adapter knows."""
    hidden: int
    dtype: torch.dtype
    weight: TensorInfo | None = None
    """[vocabulary, hidden], in the base's place."""
    same: TensorInfo | None = None
    """[vocabulary, hidden]: a copy of the base model's weight, which must be right."""
    a: TensorInfo | None = None
    b: TensorInfo | None = None
    """[rank, vocabulary] and [hidden, rank] at the embedding, [rank, hidden] and [vocabulary, rank] at the head."""
    rank: int = 0
    scale: float = 1.0
    magnitude: TensorInfo | None = None
    lora_bias: TensorInfo | None = None
    """[hidden] at the embedding, [vocabulary] at the head."""
    tokens: tuple[int, ...] = ()
    rows: TensorInfo | None = None
    """[tokens, hidden]"""
    twins: tuple[tuple[TensorInfo, TensorInfo], ...] = ()
    """Tensors that must be equal, the second one transposed if that fits, since PEFT has one for both."""

    @property
    def has_lora(self) -> bool:
        return self.a is not None

    @property
    def specs(self) -> list[ExtraSpec]:
        shapes: dict[str, tuple[int, ...]] = {}
        if self.weight is not None:
            shapes[WEIGHT] = (self.vocabulary, self.hidden)
        elif self.tokens:
            shapes |= {TOKENS: (len(self.tokens),), ROWS: (len(self.tokens), self.hidden)}
        if self.a is not None:
            wide, narrow = (self.vocabulary, self.rank), (self.rank, self.hidden)
            shapes |= {LORA_A: wide, LORA_B: narrow} if self.place == EMBEDDING else {LORA_A: narrow, LORA_B: wide}
        if self.magnitude is not None or self.lora_bias is not None:
            shapes[AFFINE] = (2, self.hidden if self.place == EMBEDDING else self.vocabulary)
        dtypes = {AFFINE: torch.float32, TOKENS: torch.int64}
        return [ExtraSpec((kind, self.place), shape, dtypes.get(kind, self.dtype)) for kind, shape in shapes.items()]


def plan_tables(config: PeftConfig, found: Found, base: BaseModel) -> tuple[TablePart, ...]:
    """Raises MultiloraError unless the file has exactly what the config says, in shapes that fit."""
    if base.embedding is None or base.head is None:
        return ()
    saved = {place: config.saves(place) for place in (EMBEDDING, HEAD)}
    targeted = {place: config.targets_table(place) for place in (EMBEDDING, HEAD)}
    tokens = _tokens(config, base.tied)
    tie = base.tied and config.ensure_weight_tying
    if tie and any(saved.values()):
        saved = dict.fromkeys(saved, True)
    elif tie and any(targeted.values()):
        targeted = dict.fromkeys(targeted, True)
    for place, ids in tokens.items():
        other = "modules_to_save" if saved[place] else "target_modules" if targeted[place] else ""
        if other and ids:
            raise MultiloraError(ErrorCode.UNSUPPORTED, f"{TOKEN_FIELD}: {place} is in {other} as well")
    embedding = _table(EMBEDDING, base.embedding, config, found, saved, targeted, tokens)
    head = _table(HEAD, base.head, config, found, saved, targeted, tokens)
    if embedding.vocabulary != head.vocabulary:
        resized = embedding if embedding.weight is not None else head
        other = HEAD if resized is embedding else EMBEDDING
        assert resized.weight is not None
        raise invalid(resized.weight.name, f"has {resized.vocabulary} rows, which {other} does not have in the file")
    shares = base.tied and tokens[EMBEDDING] and tokens[EMBEDDING] == tokens[HEAD]
    head = _with_rows(head, found, embedding if shares else None)
    embedding = _with_rows(embedding, found, None)
    if tie:
        pairs = [(head.weight, embedding.weight), (head.a, embedding.b), (head.b, embedding.a)]
        head = replace(head, twins=head.twins + tuple((a, b) for a, b in pairs if a is not None and b is not None))
    elif base.tied and not any(saved.values()) and (embedding.weight is None) != (head.weight is None):
        lone = embedding.weight or head.weight
        assert lone is not None
        raise invalid(
            lone.name, "modules_to_save does not name it, and it is not clear whether it is the head's as well"
        )
    return tuple(part for part in (embedding, head) if part.specs or part.same is not None)


def _tokens(config: PeftConfig, tied: bool) -> dict[str, tuple[int, ...]]:
    """Whose rows are replaced, in each of the two tables."""
    tokens: dict[str, tuple[int, ...]] = {EMBEDDING: (), HEAD: ()}
    for name, ids in config.trainable_token_indices:
        places = [place for place in tokens if (place.endswith(name) if name else place == EMBEDDING)]
        if not places:
            raise MultiloraError(
                ErrorCode.UNSUPPORTED, f"{TOKEN_FIELD}: {name!r} is neither the embedding nor the head"
            )
        tokens |= dict.fromkeys(places, ids)
    if tied and tokens[EMBEDDING]:
        if not tokens[HEAD]:
            tokens[HEAD] = tokens[EMBEDDING]
        elif tokens[HEAD] != tokens[EMBEDDING] and config.ensure_weight_tying:
            raise invalid(TOKEN_FIELD, "with ensure_weight_tying embedding and head must have the same tokens")
    return tokens


def _table(
    place: str,
    base: Tensor,
    config: PeftConfig,
    found: Found,
    saved: dict[str, bool],
    targeted: dict[str, bool],
    tokens: dict[str, tuple[int, ...]],
) -> TablePart:
    vocabulary, hidden = base.shape
    wrapped = targeted[place] or bool(tokens[place])
    info, inner = found.get(place, "weight"), found.get(place, "base_weight")
    for copy in (found.get(place, "copy"), found.get(place, "original")):
        if copy is not None and not (saved[place] and info is not None):
            raise invalid(copy.name, "modules_to_save does not name the module")
    if saved[place]:
        info = found.expect(place, "weight", (info.shape[0] if info is not None and info.shape else 0, hidden),
                            "modules_to_save")  # fmt: skip
    for own, there in ((info, not wrapped), (inner, wrapped and not saved[place])):
        if own is not None and not there:
            raise invalid(own.name, "PEFT would not find it")
    if inner is not None and (".token_adapter." in inner.name) != bool(tokens[place]):
        raise invalid(inner.name, "PEFT would not find it")
    weight, same = info or inner, None
    if weight is not None:
        vocabulary = weight.shape[0] if weight.shape else 0
        checked(weight, (max(vocabulary, 1), hidden))
        if weight is inner and vocabulary == base.shape[0]:
            weight, same = None, inner
    part = TablePart(place, vocabulary, hidden, base.dtype, weight, same, tokens=tokens[place])
    return _with_lora(part, config, found, targeted)


def _with_lora(part: TablePart, config: PeftConfig, found: Found, targeted: dict[str, bool]) -> TablePart:
    place, wanted = part.place, targeted[part.place]
    embedding = place == EMBEDDING
    # Both have the embedding's A and B if they are tied.
    rank = config.rank(EMBEDDING if targeted[EMBEDDING] and config.ensure_weight_tying else place)
    wide, width = (part.vocabulary, part.hidden) if embedding else (part.hidden, part.vocabulary)
    names = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    if wanted and embedding and config.lora_bias:
        raise MultiloraError(ErrorCode.UNSUPPORTED, "lora_bias: PEFT does not combine it with LoRA on embeddings")
    return replace(
        part,
        a=found.either(place, names[0], (rank, wide), "target_modules", wanted),
        b=found.either(place, names[1], (width, rank), "target_modules", wanted),
        rank=rank,
        scale=config.scale(place),
        magnitude=found.either(place, "magnitude", (width,), "use_dora", wanted and config.use_dora),
        lora_bias=None
        if embedding
        else found.either(place, "lora_bias", (width,), "lora_bias", wanted and config.lora_bias),
    )


def _with_rows(part: TablePart, found: Found, shared: TablePart | None) -> TablePart:
    """`shared`: the table whose rows this one has as well; the file may repeat them."""
    ids = part.tokens
    if ids and max(ids) >= part.vocabulary:
        raise invalid(TOKEN_FIELD, f"must be below the vocabulary's {part.vocabulary}, got {max(ids)}")
    shape = (len(ids), part.hidden)
    if shared is None:
        return replace(part, rows=found.either(part.place, "rows", shape, TOKEN_FIELD, bool(ids)))
    rows = found.expect(shared.place, "rows", shape, TOKEN_FIELD)
    again = found.get(part.place, "rows")
    return replace(part, rows=rows, twins=part.twins if again is None else ((checked(again, shape), rows),))
