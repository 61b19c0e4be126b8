# SPDX-License-Identifier: Apache-2.0
"""Small tokenizers of the kinds that real models have, built here, and parts of a front end with fakes around them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as HfTokenizer

from frontend_fakes import FakeEngines, FakeSender, Heard
from multilora_backend.config import Config
from multilora_backend.errors import ErrorCode, MultiloraError
from multilora_backend.frontend.engine_process import EngineProcess
from multilora_backend.frontend.link import Link
from multilora_backend.frontend.outbox import Delivery, Outbox
from multilora_backend.frontend.request import GenerateRequest, RawRequest
from multilora_backend.frontend.request import parse as parse_request
from multilora_backend.frontend.runtime import RuntimeFolder, folder_for
from multilora_backend.frontend.tokenizer import Tokenizer
from multilora_backend.frontend.tokenizers import Tokenizers
from multilora_backend.processes import Process
from multilora_backend.protocol import Hello, ModelCard
from outbox_bench import Letters, Seen

SPECIALS = ["<s>", "</s>"]
CORPUS = ["the quick brown fox jumps over the lazy dog", "then the other thing there, naïve", "你好你好 🎉 tööt"] * 4
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}</s>bot:{% endif %}"
)


def byte_level() -> HfTokenizer:
    """Like Llama 3, Qwen and GPT-2: merges over bytes, so tokens hold parts of characters."""
    hf = HfTokenizer(models.BPE())
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    hf.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIALS, initial_alphabet=alphabet)
    )
    hf.add_tokens(["two words"])  # an added token with a character (the space) outside the byte alphabet
    hf.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return hf


def byte_fallback() -> HfTokenizer:
    """Like Llama 2: U+2581 for spaces, and `<0xNN>` tokens for what is not in the vocabulary."""
    pieces = ["▁", *"abcdefghijklmnopqrstuvwxyz.", "▁t", "he", "▁the", "▁▁", "�"]
    vocab = {token: i for i, token in enumerate(["<unk>", *SPECIALS, *(f"<0x{b:02X}>" for b in range(256)), *pieces])}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "▁")]
    hf = HfTokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    hf.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    hf.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    hf.add_special_tokens(["<unk>", *SPECIALS])
    return hf


def metaspace() -> HfTokenizer:
    """Like T5: a Unigram model with the Metaspace pre-tokenizer and decoder."""
    hf = HfTokenizer(models.Unigram())
    hf.pre_tokenizer = pre_tokenizers.Metaspace()
    hf.decoder = decoders.Metaspace()
    hf.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=60, special_tokens=["<unk>", *SPECIALS], unk_token="<unk>")
    )
    return hf


def word_piece() -> HfTokenizer:
    """Like BERT: the decoder writes the spaces."""
    hf = HfTokenizer(models.WordPiece(unk_token="<unk>"))
    hf.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    hf.decoder = decoders.WordPiece()
    hf.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=80, special_tokens=["<unk>", *SPECIALS]))
    return hf


def word_suffix() -> HfTokenizer:
    """Like GPT-1: a token says that a word *ends*, so its text depends on what comes after."""
    hf = HfTokenizer(models.BPE(end_of_word_suffix="</w>"))
    hf.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    hf.decoder = decoders.BPEDecoder()
    hf.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=120, special_tokens=SPECIALS, end_of_word_suffix="</w>")
    )
    return hf


BUILDERS = {build.__name__: build for build in (byte_level, byte_fallback, metaspace, word_piece, word_suffix)}


@pytest.fixture(scope="session")
def make_card() -> Callable[..., ModelCard]:
    """make_card("byte_level", lora_enabled=False): the card of a model with that tokenizer."""
    cache: dict[str, bytes] = {}

    def make(kind: str = "byte_level", **overrides: object) -> ModelCard:
        if kind not in cache:
            cache[kind] = BUILDERS[kind]().to_str().encode()
        fields: dict[str, object] = {
            "model": "tiny",
            "max_model_len": 64,
            "vocab_size": 400,
            "eos_token_ids": [1],
            "tokenizer_json": cache[kind],
            "chat_template": TEMPLATE,
            "special_tokens": {"bos_token": "<s>", "eos_token": "</s>"},
            "lora_enabled": True,
        }
        return ModelCard(**{**fields, **overrides})  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def tokenizers(make_card: Callable[..., ModelCard]) -> dict[str, Tokenizer]:
    return {kind: Tokenizer(make_card(kind)) for kind in BUILDERS if kind != "word_suffix"}


def tensor(value: object) -> np.ndarray:
    """As pb_utils gives it: BYTES is an object array of bytes, BOOL np.bool_."""
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, bool):
        return np.array([value], dtype=np.bool_)
    if isinstance(value, dict):
        value = json.dumps(value)
    return np.array([value.encode() if isinstance(value, str) else value], dtype=np.object_)


@pytest.fixture(scope="session")
def parse(make_card, tokenizers) -> Callable[..., GenerateRequest]:
    """parse({"top_k": 5}, text_input="x"): request parameters, then tensors by name."""

    def run(
        parameters: dict[str, object] | None = None,
        *,
        card: dict[str, object] | None = None,
        max_prompt_bytes: int = 2000,
        **tensors: object,
    ) -> GenerateRequest:
        raw = RawRequest({name: tensor(value) for name, value in tensors.items()}, parameters or {})
        config = Config(max_prompt_bytes=max_prompt_bytes)
        request, _ = parse_request(raw, make_card(**(card or {})), config, Tokenizers(tokenizers["byte_level"]))
        return request

    return run


@pytest.fixture(scope="session")
def refused() -> Callable[..., str]:
    """refused(call, code): the message of the error that the call must raise, one line and not a page."""

    def run(call: Callable[[], object], code: ErrorCode = ErrorCode.INVALID_ARG) -> str:
        with pytest.raises(MultiloraError) as caught:
            call()
        assert caught.value.code is code
        assert "\n" not in caught.value.message
        assert len(caught.value.message) < 350
        return caught.value.message

    return run


@pytest.fixture
def engines(tmp_path: Path, make_card) -> FakeEngines:
    return FakeEngines(tmp_path, make_card())


@pytest.fixture
def connect(engines: FakeEngines) -> Iterator[Callable[..., Link]]:
    """A link with a `Heard` as its `heard`; closed after the test."""
    links: list[Link] = []

    def make(environ: dict[str, str] | None = None, **fields: object) -> Link:
        config = engines.config(**fields)
        folder = RuntimeFolder(folder_for(config, "multilora", "1", os.getpid()))
        process = EngineProcess(config, folder, os.getpid(), {**os.environ, **(environ or {})})
        heard = Heard()
        link = Link(process, Hello(f"front-{len(links)}", os.getpid(), os.getpid()), heard)
        link.heard = heard  # type: ignore[attr-defined]
        links.append(link)
        return link

    yield make
    for link in links:
        link.close()
    assert not any(Process.of(pid).alive for pid in engines.pids()), "an engine was left behind"


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def outbox(seen: Seen) -> Iterator[Outbox]:
    outbox = Outbox(seen)
    outbox.start()
    yield outbox
    outbox.close()


@pytest.fixture
def deliver(outbox: Outbox) -> Callable[..., Delivery]:
    """A watched delivery."""

    def make(request_id: int = 1, sender: FakeSender | None = None) -> Delivery:
        delivery = Delivery(request_id, sender or FakeSender(), None, Letters())
        outbox.watch(delivery)
        return delivery

    return make
