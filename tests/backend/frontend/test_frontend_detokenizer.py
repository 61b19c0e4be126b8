# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multilora_backend.core import SamplingParams
from multilora_backend.frontend.detokenizer import Detokenizer

KINDS = ["byte_level", "byte_fallback", "metaspace", "word_piece"]
TEXTS = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from("the 你好🎉👩‍👩‍👧é\ufffd▁  .<>0x"), max_size=40
)


def chunks(items: list[int], cuts: list[int]) -> list[list[int]]:
    """Cuts at the given places (modulo the length); empty chunks included, as an engine may send none."""
    places = sorted(cut % (len(items) + 1) for cut in cuts)
    return [items[a:b] for a, b in itertools.pairwise([0, *places, len(items)])]


def run(tokenizer, sampling: SamplingParams, parts: list[list[int]]) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(tokenizer, sampling)
    return [*(detokenizer.push(part) for part in parts), detokenizer.finish()], detokenizer


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS, cuts=st.lists(st.integers(0, 200), max_size=8), skip=st.booleans())
def test_parts_add_up_to_the_decoded_whole(tokenizers, kind: str, text: str, cuts: list[int], skip: bool) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    parts, detokenizer = run(tokenizer, SamplingParams(skip_special_tokens=skip), chunks(ids, cuts))
    assert "".join(parts) == tokenizer.decode(ids, skip_special_tokens=skip)
    assert detokenizer.num_tokens == len(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)


@given(ids=st.lists(st.integers(0, 330), max_size=60), skip=st.booleans())
def test_any_tokens_of_a_byte_level_model_decode_like_the_whole(tokenizers, ids: list[int], skip: bool) -> None:
    """Models do emit bytes that are no UTF-8; the replacement characters then come where `decode` has them."""
    tokenizer = tokenizers["byte_level"]
    parts, _ = run(tokenizer, SamplingParams(skip_special_tokens=skip), [[i] for i in ids])
    assert "".join(parts) == tokenizer.decode(ids, skip_special_tokens=skip)


def byte_tokens(data: bytes) -> list[int]:
    return [3 + byte for byte in data]  # of the byte_fallback tokenizer: <unk>, two specials, then <0x00> ...


def test_a_character_comes_with_its_last_byte(tokenizers) -> None:
    parts, _ = run(tokenizers["byte_fallback"], SamplingParams(), [[i] for i in byte_tokens("a🎉é".encode())])
    assert parts == ["a", "", "", "", "🎉", "", "é", ""]


def test_bad_bytes_come_out_when_they_fit_nowhere_or_at_the_end(tokenizers) -> None:
    parts, _ = run(
        tokenizers["byte_fallback"], SamplingParams(), [[i] for i in byte_tokens(b"\xff\x80\xe4\xbda\xf0\x9f")]
    )
    assert parts == ["\ufffd", "\ufffd", "", "", "\ufffda", "", "", "\ufffd"]


def test_unknown_ids_add_nothing(tokenizers) -> None:
    parts, detokenizer = run(tokenizers["byte_level"], SamplingParams(), [[0, 9999, 1]])
    assert parts == ["", ""]
    assert detokenizer.num_tokens == 3


def simulate(pieces: list[str], stops: tuple[str, ...], include: bool, min_tokens: int) -> tuple[str, str | None, int]:
    """The definition, one character at a time: text, stop string, tokens consumed."""
    text = ""
    for count, piece in enumerate(pieces, 1):
        for character in piece:
            text += character
            found = [s for s in stops if text.endswith(s)]
            if found and count > min_tokens:
                stop = max(found, key=len)
                return (text if include else text[: -len(stop)]), stop, count
    return text, None, len(pieces)


@given(
    pieces=st.lists(st.text("ab", min_size=1, max_size=1), max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=4, unique=True),
    include=st.booleans(),
    min_tokens=st.integers(0, 8),
    cuts=st.lists(st.integers(0, 40), max_size=6),
)
def test_stop_strings_end_the_text_as_defined(
    tokenizers, pieces: list[str], stops: list[str], include: bool, min_tokens: int, cuts: list[int]
) -> None:
    """Single letters, so that stop strings cross every token border and overlap themselves and each other."""
    tokenizer = tokenizers["byte_fallback"]
    ids = byte_tokens("".join(pieces).encode())
    sampling = SamplingParams(stop=tuple(stops), include_stop_str_in_output=include, min_tokens=min_tokens)
    parts, detokenizer = run(tokenizer, sampling, chunks(ids, cuts))
    expected = simulate(pieces, tuple(stops), include, min_tokens)
    assert ("".join(parts), detokenizer.stopped, detokenizer.num_tokens) == expected
    if detokenizer.stopped is not None:
        assert detokenizer.push(ids) == detokenizer.finish() == ""


def test_only_what_may_become_a_stop_string_is_held_back(tokenizers) -> None:
    sampling = SamplingParams(stop=("END", "EN.."))
    parts, detokenizer = run(tokenizers["byte_fallback"], sampling, [[i] for i in byte_tokens(b"aEEN.bENDx")])
    assert parts == ["a", "", "E", "", "", "EN.b", "", "", "", "", ""]
    assert (detokenizer.stopped, detokenizer.num_tokens) == ("END", 9)


def test_a_token_may_hold_text_on_both_sides_of_the_stop(tokenizers) -> None:
    tokenizer = tokenizers["byte_level"]
    (token,) = tokenizer.encode("two words", add_special_tokens=False)
    for include, text in ((False, "two"), (True, "two w")):
        sampling = SamplingParams(stop=(" w",), include_stop_str_in_output=include)
        assert run(tokenizer, sampling, [[token, token]])[0] == [text, ""]


def test_what_was_held_back_comes_out_at_the_end(tokenizers) -> None:
    sampling = SamplingParams(stop=("abcd",))
    assert run(tokenizers["byte_fallback"], sampling, [byte_tokens(b"xabc\xf0")])[0] == ["x", "abc\ufffd"]


def test_cost_is_linear(tokenizers) -> None:
    """100k tokens, of which the worst kinds: nothing but bad bytes, and text that always looks like a stop string."""
    tokenizer = tokenizers["byte_fallback"]
    for data, sampling in (
        (b"\x80", SamplingParams()),
        (b"\xf0\x9f\x8e\x89 the", SamplingParams()),
        (b"a", SamplingParams(stop=("a" * 1000 + "b",))),
    ):
        ids = (byte_tokens(data) * 100_000)[:100_000]
        detokenizer = Detokenizer(tokenizer, sampling)
        start = time.process_time()
        for token in ids:
            detokenizer.push([token])
        # Measured 0.1 to 0.4 s; decoding the whole text again for each token would take minutes.
        assert time.process_time() - start < 8
