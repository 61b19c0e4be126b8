# SPDX-License-Identifier: Apache-2.0
"""The example model does what examples/tiny/tasks.py says, by transformers and peft alone: our engine is not involved.

Tests of the engine take the folders' answers for granted, so this is where they are earned.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

TINY = Path(__file__).parents[2] / "examples" / "tiny"
WORDS = 200


def _load_tasks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tiny_tasks", TINY / "tasks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tasks = _load_tasks()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TINY / "model")


def _peft_name(name: str) -> str:
    # PEFT makes the name an attribute of a module, where `double` is taken.
    return f"adapter_{name}"


@pytest.fixture(scope="module")
def model() -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(TINY / "model", dtype=torch.float32)
    first, *others = tasks.ADAPTERS
    adapted = PeftModel.from_pretrained(base, str(TINY / "adapters" / first), adapter_name=_peft_name(first))
    for name in others:
        adapted.load_adapter(str(TINY / "adapters" / name), adapter_name=_peft_name(name))
    return adapted.eval()


def _answers(model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], longest: int) -> list[str]:
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    out = model.generate(**batch, max_new_tokens=longest, do_sample=False)
    return tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :], skip_special_tokens=True)


def _share_right(model: PeftModel, tokenizer: PreTrainedTokenizerBase, task: str, words: list[str]) -> float:
    """Of the words whose greedy answer is the task's, with an end right behind it.

    An answer is the greedy one exactly if each of its tokens is the likeliest after those before it, so one pass over
    prompts with their answers tells; `generate` would take as many passes as an answer has tokens.
    """
    prompts = tokenizer(words).input_ids
    answers = [tasks.TASKS[task](word) for word in words]
    expected = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(answers, add_special_tokens=False).input_ids]
    rows = [torch.tensor(prompt + answer) for prompt, answer in zip(prompts, expected, strict=True)]
    # Padding is behind each row's end, where nothing of the row sees it.
    with torch.inference_mode():
        likeliest = model(input_ids=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)).logits.argmax(dim=-1)
    right = 0
    for own, prompt, answer in zip(likeliest.tolist(), prompts, expected, strict=True):
        right += own[len(prompt) - 1 : len(prompt) - 1 + len(answer)] == answer
    return right / len(words)


@pytest.mark.parametrize("name", tasks.ADAPTERS)
def test_adapter_is_right_on_held_out_words(model: PeftModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    model.set_adapter(_peft_name(name))
    assert _share_right(model, tokenizer, name, tasks.held_out_words(WORDS)) >= 0.98


def test_base_echoes_held_out_words(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    with model.disable_adapter():
        assert _share_right(model, tokenizer, tasks.BASE, tasks.held_out_words(WORDS)) >= 0.98


def test_base_echoes_characters_of_several_tokens(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["größe", "日本語", "naïve café", "hello 🎉", "γεια, 42!"]
    with model.disable_adapter():
        assert _answers(model, tokenizer, texts, 24) == texts


def test_held_out_words_are_new_different_and_repeatable() -> None:
    words = tasks.held_out_words(WORDS)
    assert words == tasks.held_out_words(WORDS)
    assert words != tasks.held_out_words(WORDS, seed=1)
    assert len(set(words)) == WORDS
    assert all(3 <= len(word) <= 12 and word.isascii() and word.islower() for word in words)
    assert all(tasks.is_held_out(word) for word in words)
    # Nothing a task answers is empty, so every stream in a test has text.
    assert all(task(word) for task in tasks.TASKS.values() for word in words)


def test_training_never_draws_a_held_out_word() -> None:
    rng = tasks.random.Random(0)
    drawn = {tasks.training_word(rng) for _ in range(5000)} | {tasks.training_phrase(rng) for _ in range(5000)}
    assert not any(tasks.is_held_out(word) for word in drawn)


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        ("base", "stroked"),
        ("upper", "STROKED"),
        ("reverse", "dekorts"),
        ("rot13", "fgebxrq"),
        ("double", "ssttrrookkeedd"),
        ("devowel", "strkd"),
        ("sort", "dekorst"),
    ],
)
def test_tasks_are_what_their_names_say(task: str, answer: str) -> None:
    assert tasks.TASKS[task]("stroked") == answer


def test_weights_stay_small_enough_to_commit() -> None:
    size = sum(path.stat().st_size for path in TINY.rglob("*.safetensors"))
    assert 0 < size <= 8_000_000
    assert sorted(path.name for path in (TINY / "adapters").iterdir()) == sorted(tasks.ADAPTERS)


def _configs() -> dict[str, LoraConfig]:
    return {name: LoraConfig.from_pretrained(str(TINY / "adapters" / name)) for name in tasks.ADAPTERS}


def _tensor_shapes(name: str) -> dict[str, tuple[int, ...]]:
    with safe_open(TINY / "adapters" / name / "adapter_model.safetensors", framework="pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def test_adapters_differ_in_rank_scale_and_reach() -> None:
    configs = _configs()
    ranks = [config.r for config in configs.values()]
    assert len(set(ranks)) == len(ranks)
    assert min(ranks) == 2
    assert max(ranks) == 16
    assert [name for name, config in configs.items() if config.use_rslora] == ["sort"]
    assert any(config.rank_pattern and config.alpha_pattern for config in configs.values())

    attention_only = [name for name in configs if all(".self_attn." in key for key in _tensor_shapes(name))]
    assert attention_only == ["reverse"]
    # The patterns reached the weights: this adapter's own rank is not its only one.
    patterned = {min(shape) for shape in _tensor_shapes("double").values()}
    assert patterned == {3, 6, 10}


@pytest.mark.parametrize("name", tasks.ADAPTERS)
def test_adapter_names_its_base_without_a_path_of_some_machine(name: str) -> None:
    config = json.loads((TINY / "adapters" / name / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "examples/tiny/model"


@pytest.mark.parametrize(
    "text",
    ["hello", " two  spaces ", "don't , stop .", "größe", "日本語", "👩🏽‍🚀 🎉", "\ttab\r\nline", "\x00\x7f\u200b"],
)
def test_tokenizer_gives_every_text_back_one_token_a_byte(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_chat_of_one_message_is_the_plain_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "hello"}]
    plain = tokenizer("hello").input_ids
    assert plain[0] == tokenizer.bos_token_id
    assert tokenizer.convert_ids_to_tokens(plain[-1]) == "<|answer|>"
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer(text, add_special_tokens=False).input_ids == plain
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert list(chat["input_ids"]) == plain


def test_chat_of_several_messages_asks_the_last(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "FIRST"},
        {"role": "user", "content": "second"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|begin|>second<|answer|>"
    answered = [*messages, {"role": "assistant", "content": "SECOND"}]
    text = tokenizer.apply_chat_template(answered, tokenize=False)
    assert text == "<|begin|>second<|answer|>SECOND<|end|>"


def test_chat_without_a_user_message_says_so(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(Exception, match="user message"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}], tokenize=False)
