# SPDX-License-Identifier: Apache-2.0
"""Tokens that an adapter's tokenizer has and the base model's has not: found, or refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers import models as hf_models

from extras_models import save_trained
from multilora_backend.adapters.peft import check_adapter, fingerprint, read_adapter
from multilora_backend.adapters.tensors import parse_header, read_header
from multilora_backend.added_tokens import NO_TOKENS, AddedToken, AddedTokens
from multilora_backend.errors import MultiloraError

VOCABULARY = 31
KNOWN = [{"id": 1, "content": "<s>", "special": True}, {"id": 4, "content": "w4"}]
OWN = {"id": 31, "content": "<tool>", "lstrip": True, "normalized": False, "special": True}
TOOL = AddedToken(31, "<tool>", lstrip=True, normalized=False, special=True)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    words = {("<s>" if i == 1 else f"w{i}"): i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(hf_models.WordLevel(words, unk_token="w0"))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.add_tokens(["w4"])
    return tokenizer


@pytest.fixture
def running(models, tokenizer):
    """Sites and base model."""
    sites, base = models[False]
    return sites, dataclasses.replace(base, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def resized(folders, tmp_path_factory) -> Path:
    """An adapter that knows two tokens more."""
    folder = tmp_path_factory.mktemp("resized")
    return save_trained(folders[False], folder, vocabulary=VOCABULARY + 2, target_modules=["q_proj"])


def tell(folder: Path, added: Any) -> Path:
    (folder / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "added_tokens": added, "model": {"vocab": {}}})
    )
    return folder


def read(folder: Path, running) -> tuple[AddedTokens, str]:
    """And the version. The check, which reads no weights, must find the same."""
    sites, base = running
    weights = read_adapter(folder, sites, torch.float32, base=base)
    assert check_adapter(folder, sites, base=base).tokens == weights.tokens
    return weights.tokens, weights.version


def test_what_the_base_model_has_not(resized, running, tmp_path):
    assert json.loads((resized / "adapter_config.json").read_text())["target_modules"] == ["q_proj"]
    versions = {}
    for added, expected in (
        (KNOWN, ()),
        (None, ()),
        ([*KNOWN, OWN], (TOOL,)),
        ([{"id": 32, "content": "<end>"}, *KNOWN, OWN], (TOOL, AddedToken(32, "<end>"))),
        ([{"id": 7, "content": "w7"}], (AddedToken(7, "w7"),)),  # it is cut out of texts from now on
    ):
        tokens, version = read(tell(resized, added), running)
        assert tokens.tokens == expected
        assert tokens == AddedTokens.of(reversed(expected))
        assert versions.setdefault(tokens.digest, version) == version
    assert len(versions) == len(set(versions.values())) == 4, "with other tokens it is another version"
    (resized / "tokenizer.json").unlink()
    assert read(resized, running)[0] is NO_TOKENS
    assert read(resized, (running[0], dataclasses.replace(running[1], tokenizer=None)))[0] is NO_TOKENS


@pytest.mark.parametrize(
    ("added", "match"),
    [
        ([{"id": 5, "content": "w4"}], r"token 'w4' has id 5, and 4 in the base model's$"),
        ([{"id": 33, "content": "<tool>"}], r"token '<tool>': its id must be below 33, got 33$"),
        ([{"id": -1, "content": "<tool>"}], r"token '<tool>': its id must be below 33, got -1$"),
        ([{"id": 32, "content": "<tool>"}], r"token '<tool>' has id 32, and would get 31 if it were added"),
        ([{"id": "31", "content": "<tool>"}], r"is not a tokenizer's file: Expected `int`, got `str`"),
        ([{"id": 31}], r"is not a tokenizer's file: Object missing required field `content`"),
        ({}, r"is not a tokenizer's file: Expected `array \| null`, got `object`"),
    ],
)
def test_refused_by_name(resized, running, added, match):
    sites, base = running
    tell(resized, added)
    for reading in (
        lambda: check_adapter(resized, sites, base=base),
        lambda: read_adapter(resized, sites, torch.float32, base=base),
    ):
        with pytest.raises(MultiloraError, match=rf"^tokenizer\.json: {match}"):
            reading()


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"\xff{}", b'{"added_tokens": [{"id": 31, "content": "\xff"}]}', b"[" * 9999]
)
def test_broken_files(resized, running, content):
    sites, base = running
    (resized / "tokenizer.json").write_bytes(content)
    with pytest.raises(MultiloraError, match=r"^tokenizer\.json: is not a tokenizer's file"):
        check_adapter(resized, sites, base=base)


def test_who_trains_no_table_is_not_looked_at(folders, running, tmp_path):
    """Most folders hold the base model's tokenizer, of several MB: looking at it would cost more than all else."""
    save_trained(folders[False], tmp_path, target_modules=["q_proj"])
    assert read(tell(tmp_path, [OWN]), running)[0] is NO_TOKENS


def test_a_folder_with_another_tokenizer_is_another(resized):
    before = fingerprint(tell(resized, KNOWN))
    assert fingerprint(resized) == before
    assert fingerprint(tell(resized, [*KNOWN, OWN])) != before


def test_the_files_are_those_that_transformers_writes(resized, running, tokenizer):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    theirs.add_tokens(["<one>", "<two>"])
    theirs.save_pretrained(str(resized))
    with (resized / "adapter_model.safetensors").open("rb") as file:
        rows = {info.shape[0] for name, info in parse_header(read_header(file, ""), "").items() if "embed_tok" in name}
    assert rows == {VOCABULARY + 2}
    assert [(token.id, token.content) for token in read(resized, running)[0].tokens] == [(31, "<one>"), (32, "<two>")]
