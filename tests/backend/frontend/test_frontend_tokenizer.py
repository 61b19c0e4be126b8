# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pytest
from tokenizers import Tokenizer as HfTokenizer

from multilora_backend.errors import ErrorCode, MultiloraError
from multilora_backend.frontend.tokenizer import Tokenizer

HELLO = [{"role": "user", "content": "hi"}]


def test_importing_the_front_end_pulls_in_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, pkgutil, importlib, multilora_backend.frontend as f\n"
        "names = [m.name for m in pkgutil.iter_modules(f.__path__)]\n"
        "assert 'request' in names, names\n"
        "[importlib.import_module(f'multilora_backend.frontend.{n}') for n in names]\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_special_tokens_are_added_to_a_prompt_and_not_to_a_chat(tokenizers) -> None:
    tokenizer = tokenizers["byte_level"]
    assert tokenizer.encode("the")[0] == 0
    assert tokenizer.encode("the", add_special_tokens=False) == tokenizer.encode("the")[1:]
    text = tokenizer.render(HELLO)
    assert text == "<s>user: hi</s>bot:"
    assert tokenizer.encode(text, add_special_tokens=False).count(0) == 1


def test_truncation_and_padding_of_the_file_are_off(make_card) -> None:
    hf = HfTokenizer.from_str(make_card().tokenizer_json.decode())
    hf.enable_truncation(4)
    hf.enable_padding(length=4)
    tokenizer = Tokenizer(make_card(tokenizer_json=hf.to_str().encode()))
    assert len(tokenizer.encode("x")) == 2
    assert len(tokenizer.encode("x y z " * 9)) > 10


def test_a_decoder_that_looks_ahead_is_refused(make_card) -> None:
    with pytest.raises(MultiloraError, match=r"tokenizer\.json: its decoder is not supported") as caught:
        Tokenizer(make_card("word_suffix"))
    assert caught.value.code is ErrorCode.UNSUPPORTED


def test_token_text_shows_one_token_as_it_is_in_a_text(tokenizers) -> None:
    fallback = tokenizers["byte_fallback"]
    by_text = {fallback.token_text(i): i for i in range(300)}
    assert " the" in by_text
    assert fallback.token_text(1) == "<s>"
    assert fallback.token_text(3 + 0xE4) == "\ufffd"
    assert fallback.token_text(10_000) == ""


def test_concurrent_encodes_agree_with_single_ones(tokenizers) -> None:
    tokenizer = tokenizers["byte_level"]
    texts = [f"the {i} quick 你好 fox {i * 7919}" for i in range(300)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tokenizer.encode, texts)) == [tokenizer.encode(text) for text in texts]


def test_other_threads_run_while_a_long_text_is_tokenised(tokenizers) -> None:
    beats: list[float] = []
    done = threading.Event()

    def beat() -> None:
        while not done.wait(0.001):
            beats.append(time.monotonic())

    thread = threading.Thread(target=beat)
    thread.start()
    start = time.monotonic()
    tokenizers["byte_level"].encode("the quick brown fox 你好 " * 40_000)
    end = time.monotonic()
    done.set()
    thread.join()
    # Measured 100 to 300; holding the GIL leaves the two at the borders.
    assert sum(start < at < end for at in beats) > 5


TEMPLATES = {
    "{{ messages | tojson }}": '[{"role": "user", "content": "hi"}]',
    "{{ '<a & ü>' | tojson }}": '"<a & ü>"',
    "{{ strftime_now('%Y') }}": f"{datetime.now():%Y}",
    "{{ bos_token + eos_token }}": "<s></s>",
    "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}": "01",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}!": "hi!",
    "{% if tools %}tools{% endif %}{% if add_generation_prompt %}go{% endif %}": "go",
    "{% set ns = namespace(x=1) %}\n  {% if true %}\n{% set ns.x = 2 %}\n  {% endif %}\n{{ ns.x }}": "2",
}


@pytest.mark.parametrize(("template", "rendered"), TEMPLATES.items())
def test_templates_find_what_transformers_offers(make_card, template: str, rendered: str) -> None:
    assert Tokenizer(make_card(chat_template=template)).render(HELLO) == rendered


@pytest.mark.parametrize(
    ("template", "code", "message"),
    [
        (None, ErrorCode.UNSUPPORTED, "messages: the model has no chat template"),
        ("{% if %}", ErrorCode.UNSUPPORTED, "messages: the model's chat template does not compile"),
        (
            "{{ raise_exception('no user') }}",
            ErrorCode.INVALID_ARG,
            "messages: the chat template refuses them: no user",
        ),
        ("{{ messages[0].content + 1 }}", ErrorCode.INVALID_ARG, "messages: the chat template refuses them"),
        ("{{ messages.append(1) }}", ErrorCode.INVALID_ARG, "messages: the chat template refuses them"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", ErrorCode.INVALID_ARG, "unsafe"),
    ],
)
def test_template_errors(make_card, template: str | None, code: ErrorCode, message: str) -> None:
    with pytest.raises(MultiloraError) as caught:
        Tokenizer(make_card(chat_template=template)).render(HELLO)
    assert caught.value.code is code
    assert message in caught.value.message
