# SPDX-License-Identifier: Apache-2.0
"""Prompts and answers of adapters that have tokens of their own: what the engine hands back is cut again."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tokenizers import AddedToken as HfToken
from tokenizers import Tokenizer as HfTokenizer

from frontend_fakes import FakeEngines, FakeSender, wait_until
from multilora_backend.added_tokens import NO_TOKENS, AddedToken, AddedTokens
from multilora_backend.errors import ErrorCode, MultiloraError
from multilora_backend.frontend import service as service_module
from multilora_backend.frontend import tokenizers as tokenizers_module
from multilora_backend.frontend.request import RawRequest, retokenised
from multilora_backend.frontend.service import Service
from multilora_backend.frontend.tokenizers import Tokenizers

KINDS = ("byte_level", "byte_fallback", "metaspace", "word_piece")
TEXTS = ("<own>", "the <own> fox", "the<own>fox <call> 你好 <call>", "a naïve <s> <own><own>", "callcall call", "")


def more(hf: HfTokenizer) -> list[AddedToken]:
    first = hf.get_vocab_size(with_added_tokens=True)
    return [
        AddedToken(first, "<own>", special=True, normalized=False),
        AddedToken(first + 1, "<call>", lstrip=True, rstrip=True),
        AddedToken(first + 2, "call", single_word=True),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_it_cuts_and_writes_as_a_tokenizer_to_which_they_were_added(kind, make_card, tokenizers):
    base = tokenizers[kind]
    expected = HfTokenizer.from_str(make_card(kind).tokenizer_json.decode())
    added = AddedTokens.of(reversed(more(expected)))
    before = [base.encode(text) for text in TEXTS]
    tokenizer = base.with_tokens(added)
    for token in added.tokens:
        options = {
            name: value for name, value in msgspec.structs.asdict(token).items() if name not in ("id", "content")
        }
        (expected.add_special_tokens if token.special else expected.add_tokens)([HfToken(token.content, **options)])
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == expected.encode(text).ids
        pieces = b"".join(tokenizer.piece(id_, first=at == 0) for at, id_ in enumerate(ids))
        assert pieces.decode() == expected.decode(ids, skip_special_tokens=False)
    assert tokenizer.longest_token == max(base.longest_token, 6)
    long = base.with_tokens(AddedTokens.of([AddedToken(added.tokens[0].id, "x" * 999)]))
    assert long.longest_token == 999
    assert tokenizer.special_ids == base.special_ids | {added.tokens[0].id}
    assert [base.encode(text) for text in TEXTS] == before, "the base's has stayed as it was"
    assert base.piece(added.tokens[0].id, first=True) == b""


def test_thousands_of_tokens_take_no_time(tokenizers):
    """A call of the library for each would take seconds: 0.24 for 1,000, 3.7 for 4,000."""
    base = tokenizers["byte_level"]
    first = base._hf.get_vocab_size(with_added_tokens=True)
    added = AddedTokens.of(AddedToken(first + i, f"<speech {i}>", special=i > 2000) for i in range(4000))
    began = time.thread_time()
    tokenizer = base.with_tokens(added)
    assert time.thread_time() - began < 1.0
    assert tokenizer.encode("<speech 0><speech 3999>", add_special_tokens=False) == [first, first + 3999]


def test_a_number_that_it_would_not_get_is_refused(tokenizers):
    for number in (0, 5000):
        with pytest.raises(MultiloraError, match=rf"^tokenizer\.json: token '<own>' has id {number}, and would get"):
            tokenizers["byte_level"].with_tokens(AddedTokens.of([AddedToken(number, "<own>")]))


def test_what_is_remembered_is_bounded(tokenizers, monkeypatch):
    monkeypatch.setattr(tokenizers_module, "MAX_NAMES", 3)
    monkeypatch.setattr(tokenizers_module, "MAX_TOKENIZERS", 2)
    base = tokenizers["byte_level"]
    [own, *_] = more(base._hf)
    sets = [AddedTokens.of([msgspec.structs.replace(own, content=f"<own{i}>")]) for i in range(3)]
    known = Tokenizers(base)
    assert known.of("a") is base
    for name, added in zip("abc", (sets[0], sets[1], sets[0]), strict=True):
        assert known.learn(name, added).digest == known.of(name).digest == added.digest
    assert known.of("a") is known.of("c"), "adapters with the same tokens share a tokenizer"
    known.learn("d", sets[2])
    assert [known.of(name).digest for name in "abcd"] == ["", "", sets[0].digest, sets[2].digest]
    assert known.learn("c", NO_TOKENS) is base
    assert known.of("c") is base


def test_token_ids_of_adapters_are_the_engines_to_judge(parse, refused):
    for field, value in (("stop_token_ids", [500]), ("logit_bias", {"500": 1.0})):
        options = {field: value}
        assert "500" in refused(lambda options=options: parse(text_input="x", sampling_parameters=options))
        assert parse(text_input="x", lora_name="a", sampling_parameters=options).adapter == "a"


@pytest.fixture
def engines(tmp_path: Path, make_card, tokenizers) -> FakeEngines:
    engines = FakeEngines(tmp_path, make_card())
    engines.behave(tokens=msgspec.to_builtins(more(tokenizers["byte_level"]._hf)))
    return engines


@pytest.fixture
def service(engines: FakeEngines) -> Iterator[Service]:
    service = Service(
        engines.config(), model="m", version="1", instance="f", server_pid=os.getpid(), environ=os.environ
    )
    service.start()
    yield service
    service.close()


def send(service: Service, text: str, sender: FakeSender | None = None, **parameters: object) -> FakeSender:
    sender = sender or FakeSender()
    tensors = {"text_input": np.array([text.encode()], dtype=object), "return_num_input_tokens": np.array([True])}
    service.handle(RawRequest(tensors, parameters), sender)
    return sender


def test_a_prompt_is_retokenised_once(service, engines, tokenizers):
    """The fake engine says the prompt's tokens: so they were cut, numbered and written by the adapter's tokenizer."""
    base = tokenizers["byte_level"]
    text = "the<own>fox<call>"
    for round_ in (1, 2):
        sender = send(service, text, lora_name="tagged", max_tokens=60, skip_special_tokens=False).wait()
        assert sender.error is None
        ids = base.with_tokens(AddedTokens.of(more(base._hf))).encode(text)
        assert ids != base.encode(text)
        assert sender.responses[0]["num_input_tokens"].tolist() == [len(ids)]
        assert sender.text.startswith(f"{text}<s>{text}<s>{text}"), "echo and answer"
        submits = engines.heard("Submit")
        assert len(submits) == round_ + 1, "handed back once, known from then on"
        assert submits[-1]["prompt_token_ids"] == ids
        assert submits[-1]["sampling"]["max_tokens"] == min(60, 64 - len(ids)), "more room than the base's tokens left"
    assert send(service, "<own>", max_tokens=2).wait().responses[0]["num_input_tokens"].tolist() == [
        len(base.encode("<own>"))
    ]
    wait_until(lambda: not service._in_flight)


def test_a_chat_is_retokenised_as_one(service, engines, tokenizers):
    """The template has written the special tokens."""
    messages = b'[{"role": "user", "content": "<own>"}]'
    sender = FakeSender()
    tensors = {"messages": np.array([messages], dtype=object)}
    service.handle(RawRequest(tensors, {"lora_name": "tagged", "max_tokens": 2}), sender)
    assert sender.wait().error is None
    base = tokenizers["byte_level"]
    tokenizer = base.with_tokens(AddedTokens.of(more(base._hf)))
    assert engines.heard("Submit")[-1]["prompt_token_ids"] == tokenizer.encode("<s>user: <own></s>bot:", False)


def test_who_leaves_while_it_is_retokenised_leaves_nothing(service, engines, monkeypatch):
    sender = FakeSender()

    def slowly(*arguments):
        sender.cancelled = True
        wait_until(lambda: not service._in_flight)
        return retokenised(*arguments)

    monkeypatch.setattr(service_module, "retokenised", slowly)
    send(service, "abc", sender, lora_name="tagged", max_tokens=60)
    assert sender.wait().error.code is ErrorCode.CANCELLED
    again = wait_until(lambda: len(engines.heard("Submit")) == 2 and engines.heard("Submit")[1])
    wait_until(lambda: [abort["request_id"] for abort in engines.heard("Abort")] == [again["request_id"]] * 2)


def test_who_is_handed_back_while_the_front_end_closes_gets_its_answer(service, engines, monkeypatch):
    hear = service.on_retokenise

    def late(message):
        wait_until(lambda: service._closing)
        hear(message)

    monkeypatch.setattr(service, "on_retokenise", late)
    sender = send(service, "abc", lora_name="tagged", max_tokens=3)
    wait_until(lambda: engines.heard("Submit"))
    service.close()
    assert sender.wait().error is None


def test_it_does_not_go_on_for_ever(service, engines):
    error = send(service, "abc", lora_name="restless").wait().error
    assert error.code is ErrorCode.UNAVAILABLE
    assert error.message == "the tokens of LoRA restless have changed 4 times meanwhile; please retry"
    assert len(engines.heard("Submit")) == 5
    assert send(service, "abc", max_tokens=2).wait().error is None
    wait_until(lambda: not service._in_flight)


def test_tokens_that_cannot_be_added_end_the_request(service, engines):
    os.kill(engines.pids()[-1], 9)
    engines.behave(tokens=[{"id": 9999, "content": "<own>"}])
    wait_until(lambda: service.ready and len(engines.pids()) == 2)
    error = send(service, "abc", lora_name="tagged").wait().error
    assert error.code is ErrorCode.UNSUPPORTED
    assert error.message.startswith("tokenizer.json: token '<own>' has id 9999, and would get")
    wait_until(lambda: not service._in_flight)
