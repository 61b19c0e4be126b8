# SPDX-License-Identifier: Apache-2.0
"""Requests whose prompts were cut without an adapter's own tokens are handed back with the tokens, at no one's cost."""

from __future__ import annotations

import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

import tiny_models
from extras_models import ResizingJudge, save_trained
from multilora_backend.adapters.manager import AdapterManager
from multilora_backend.added_tokens import NO_TOKENS, AddedToken, AddedTokens
from multilora_backend.config import Config
from multilora_backend.core import SamplingParams
from multilora_backend.engine.engine import Engine
from multilora_backend.protocol import Failed, Outputs, Retokenise, Submit

CALL, END = AddedToken(61, "<call>"), AddedToken(62, "<end>", special=True, normalized=False)
BOTH = AddedTokens.of([CALL, END])
TABLES = ["embed_tokens", "lm_head"]
PROMPT = [5, 61, 7]
"""With one token that the base model has not."""
PLAIN = [5, 6, 7]
COUNT = 12


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    model = tiny_models.save_llama(root / "model")
    added = {"vocabulary": 63, "modules_to_save": TABLES, "target_modules": ["q_proj", "v_proj"]}
    for seed, (name, fields) in enumerate({"own": added, "plain": {}, "other": added}.items()):
        save_trained(model, root / "adapters" / name, seed, **fields)
    for name, contents in (("own", ["<call>", "<end>"]), ("other", ["<call>"])):
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        for content in contents:
            (tokenizer.add_special_tokens if content == "<end>" else tokenizer.add_tokens)([content])
        tokenizer.save(str(root / "adapters" / name / "tokenizer.json"))
    return root


@pytest.fixture(scope="module")
def said(made: Path) -> Callable[[str, list[int]], list[int]]:
    judge = ResizingJudge(made / "model", made / "adapters", "cpu")

    def greedy(adapter: str, prompt: list[int]) -> list[int]:
        tokens = list(prompt)
        for _ in range(COUNT):
            tokens.append(int(judge.logits(adapter, tokens, torch.float32)[-1].argmax()))
        return tokens[len(prompt) :]

    return greedy


class Bench:
    def __init__(self, made: Path, adapters: Path, **settings: object) -> None:
        places = {"model": str(made / "model"), "adapters": str(adapters)}
        fixed = {"device": "cpu", "block_size": 4, "adapters_watch_s": 0.0, "adapter_extras_bytes": 2**20}
        self.engine = Engine(Config(**places, **{**fixed, **settings}), wake=lambda: None)
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.failed: dict[int, str] = {}
        self.returned: dict[int, list[AddedTokens]] = defaultdict(list)

    def submit(self, number: int, prompt: list[int], adapter: str, tokens: AddedTokens, **sampling: object) -> None:
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": COUNT, "ignore_eos": True, **sampling})
        self.engine.submit("front", Submit(number, prompt, params, adapter, tokens_digest=tokens.digest))

    def run(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            busy = self.engine.step()
            for message in self.engine.take_replies().get("front", []):
                if isinstance(message, Failed):
                    self.failed[message.request_id] = message.message
                elif isinstance(message, Retokenise):
                    self.returned[message.request_id].append(message.tokens)
                for item in message.items if isinstance(message, Outputs) else ():
                    self.tokens[item.request_id] += item.token_ids
            if self.engine.idle:
                break
            assert time.monotonic() < deadline
            if not busy:
                time.sleep(0.002)  # a load is under way
        self.engine.check_idle()


@pytest.fixture
def bench(made: Path, tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    started = []

    def start(tokenizers: bool = True, **settings: object) -> Bench:
        left_out = shutil.ignore_patterns(*([] if tokenizers else ["tokenizer.json"]))
        shutil.copytree(made / "adapters", tmp_path / "adapters", ignore=left_out)
        started.append(Bench(made, tmp_path / "adapters", **settings))
        return started[-1]

    yield start
    for each in started:
        each.engine.close()


def test_a_prompt_that_was_cut_otherwise_is_handed_back(bench, said):
    run = bench()
    run.engine.step()  # takes in what the start has found
    run.submit(0, PLAIN, "own", NO_TOKENS)
    run.submit(1, PLAIN, "plain", BOTH)
    run.submit(2, PLAIN, "", BOTH)
    run.submit(3, PLAIN, "other", BOTH)
    assert not run.engine.scheduler.has_work
    run.run()
    assert run.returned == {0: [BOTH], 1: [NO_TOKENS], 2: [NO_TOKENS], 3: [AddedTokens.of([CALL])]}
    run.submit(0, PROMPT, "own", BOTH)
    run.submit(1, PLAIN, "plain", NO_TOKENS)
    run.submit(2, PLAIN, "", NO_TOKENS)
    run.submit(3, PROMPT, "other", AddedTokens.of([CALL]))
    run.run()
    for number, (adapter, prompt) in enumerate([("own", PROMPT), ("plain", PLAIN), ("", PLAIN), ("other", PROMPT)]):
        assert run.tokens[number] == said(adapter, prompt), adapter
    assert not run.failed


def test_ids_are_judged_by_what_the_adapter_knows(bench):
    run = bench()
    run.engine.step()
    for number, (adapter, known, tokens) in enumerate([("own", 63, BOTH), ("plain", 61, NO_TOKENS)]):
        for field in ("stop_token_ids", "logit_bias"):
            for id_ in (known - 1, known):
                value = (id_,) if field == "stop_token_ids" else {id_: 1.0}
                run.submit(100 * number + id_, PLAIN, adapter, tokens, **{field: value}, max_tokens=3)
                run.run()
                assert bool(run.failed) == (id_ == known)
                for message in run.failed.values():
                    assert message == f"{field}: token ids must be below the vocabulary's {known}"
                run.failed.clear()


def test_no_id_is_negative(bench, monkeypatch):
    """Whether anybody has looked at the adapter or not: what indexes by it would take the last token for it."""
    monkeypatch.setattr(AdapterManager, "check_all", lambda manager, wait_s: None)
    run = bench()
    for number, adapter in enumerate(["", "own"]):
        run.submit(number, [5, -1], adapter, NO_TOKENS)
    run.run()
    assert all(message.startswith("text_input: token ids must be") for message in run.failed.values())
    assert sorted(run.failed) == [0, 1]


def test_what_is_not_known_yet_is_found_out_before_it_runs(bench, said, monkeypatch):
    """As with an adapter that must be downloaded: nobody has looked at it when its first requests come."""
    monkeypatch.setattr(AdapterManager, "check_all", lambda manager, wait_s: None)
    run = bench()
    run.submit(0, PLAIN, "own", NO_TOKENS)
    run.submit(1, PLAIN, "own", NO_TOKENS, n=2)
    run.submit(2, PLAIN, "plain", NO_TOKENS)
    run.submit(3, PLAIN, "", NO_TOKENS)
    run.run()
    assert run.returned == {0: [BOTH], 1: [BOTH]}
    assert dict(run.tokens) == {2: said("plain", PLAIN), 3: said("", PLAIN)}
    run.submit(0, PROMPT, "own", BOTH)
    run.run()
    assert run.tokens[0] == said("own", PROMPT)
    assert not run.failed


def test_ids_of_what_is_not_known_yet_are_judged_when_it_is(bench, monkeypatch):
    monkeypatch.setattr(AdapterManager, "check_all", lambda manager, wait_s: None)
    run = bench()
    run.submit(0, PLAIN, "own", BOTH, stop_token_ids=(62,), max_tokens=3)
    assert run.engine.take_replies()["front"] == [Retokenise(0, NO_TOKENS)]
    run.submit(0, PLAIN, "own", NO_TOKENS, stop_token_ids=(62,), max_tokens=3)
    run.submit(1, PLAIN, "plain", NO_TOKENS, logit_bias={62: 1.0}, max_tokens=3)
    run.run()
    assert run.returned == {0: [BOTH], 1: [NO_TOKENS]}
    assert not run.tokens
    run.submit(0, PLAIN, "own", BOTH, stop_token_ids=(62,), max_tokens=3)
    run.submit(1, PLAIN, "plain", NO_TOKENS, logit_bias={62: 1.0}, max_tokens=3)
    run.run()
    assert len(run.tokens[0]) == 3
    assert run.failed == {1: "logit_bias: token ids must be below the vocabulary's 61"}


@pytest.mark.parametrize("tokens", [True, False])
def test_an_adapter_that_has_lost_tokens_since_its_check_takes_nobody_down(bench, said, tmp_path, tokens):
    """With a table of more rows, and with or without a tokenizer that has tokens for them."""
    run = bench(tokenizers=tokens)
    run.engine.step()
    shutil.rmtree(tmp_path / "adapters" / "own")
    shutil.copytree(tmp_path / "adapters" / "plain", tmp_path / "adapters" / "own")
    if tokens:
        run.submit(0, PROMPT, "own", BOTH)
    else:
        run.submit(0, PLAIN, "own", NO_TOKENS, logit_bias={62: 1.0})
    run.submit(1, PLAIN, "", NO_TOKENS)
    run.run()
    assert run.returned == {0: [NO_TOKENS]}
    assert dict(run.tokens) == {1: said("", PLAIN)}
    assert not run.failed


def test_half_a_request_is_not_begun_again(bench, tmp_path):
    """Of two sequences one has ended when the adapter turns out to have changed: they would be of two adapters."""
    run = bench(adapter_host_bytes=0, max_num_seqs=1)
    run.engine.step()
    run.submit(0, PROMPT, "own", BOTH, max_tokens=1, n=2)
    while not run.tokens[0]:
        run.engine.step()
        for message in run.engine.take_replies().get("front", []):
            run.tokens[0] += [t for item in message.items for t in item.token_ids]
    adapters = run.engine.adapters
    adapters._life.residency.evict(adapters.records["own"])
    shutil.rmtree(tmp_path / "adapters" / "own")
    shutil.copytree(tmp_path / "adapters" / "other", tmp_path / "adapters" / "own")
    run.run()
    assert "was changed at its source while this request waited" in run.failed[0]
    assert not run.returned


@pytest.mark.parametrize("successor", ["plain", "other"])
def test_who_waits_for_what_was_replaced_is_cut_for_its_successor(bench, said, successor, tmp_path):
    run = bench(adapter_host_bytes=0)
    run.engine.step()
    run.submit(0, PROMPT, "own", BOTH, max_tokens=1)
    run.run()
    adapters = run.engine.adapters
    adapters._life.residency.evict(adapters.records["own"])  # as another adapter's load would
    shutil.rmtree(tmp_path / "adapters" / "own")
    shutil.copytree(tmp_path / "adapters" / successor, tmp_path / "adapters" / "own")
    run.submit(1, PROMPT, "own", BOTH)
    run.run()
    tokens = AddedTokens.of([CALL] if successor == "other" else [])
    assert run.returned == {1: [tokens]}
    run.submit(1, PLAIN, "own", tokens)
    run.run()
    assert run.tokens[1] == said(successor, PLAIN)
    assert not run.failed
