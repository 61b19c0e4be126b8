# SPDX-License-Identifier: Apache-2.0
"""Trains the example from nothing: `examples/tiny/model` and one PEFT adapter a task in `examples/tiny/adapters`.

The base echoes its prompt; an adapter makes it answer with the word in upper case, reversed, and so on
(tiny/tasks.py). An adapter of rank 2 cannot teach a model of 850,000 weights to change case. As with a large model, it
can only bring out what pre-training has put there. So the base is trained on all tasks, told which one is wanted by a
vector added to every embedding. The vectors are then thrown away: the model that is saved echoes, and to do
anything else it needs an adapter.

Run `python examples/train_tiny.py [FOLDER]`. Prints the share of held-out words answered exactly right.
"""

from __future__ import annotations

import argparse
import math
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from tiny.tasks import ADAPTERS, BASE, TASKS, held_out_words, is_held_out, training_phrase, training_word
from tiny.tokenizer import CONTEXT, END, build_tokenizer

SEED = 0
BASE_STEPS, BASE_BATCH, BASE_RATE = 7000, 64, 2e-3
LORA_STEPS, LORA_BATCH, LORA_RATE = 600, 64, 5e-3

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_SEVEN = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]

# Deliberately as different as adapters in the wild: every way to say `target_modules`, odd ranks, ranks and alphas by
# module, and rsLoRA, whose scale is alpha / sqrt(r) instead of alpha / r.
LORAS: dict[str, dict[str, Any]] = {
    "upper": {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"},
    "reverse": {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION},
    "rot13": {"r": 4, "lora_alpha": 8, "target_modules": ALL_SEVEN},
    "double": {
        "r": 6,
        "lora_alpha": 12,
        "target_modules": ALL_SEVEN,
        "rank_pattern": {"down_proj": 10, r"layers\.0\.self_attn\.q_proj": 3},
        "alpha_pattern": {"down_proj": 15},
    },
    "devowel": {"r": 5, "lora_alpha": 10, "target_modules": r".*\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj"},
    "sort": {"r": 16, "lora_alpha": 8, "use_rslora": True, "target_modules": ALL_SEVEN},
}

IGNORE = -100
"""The label of a token that is not to be predicted."""

Logits = Callable[[torch.Tensor, list[str]], torch.Tensor]
"""(ids `[batch, length]`, each row's task) -> `[batch, length, vocabulary]`."""

tokenizer = build_tokenizer()


def build_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def collate(tasks: list[str], prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels `[batch, longest]` of prompts with their right answers; only the answers have labels.

    Padded on the right, so causal attention keeps the padding out and no mask is needed.
    """
    asked = [tokenizer(prompt).input_ids for prompt in prompts]
    answers = [TASKS[task](prompt) + END for task, prompt in zip(tasks, prompts, strict=True)]
    answered = [tokenizer(answer, add_special_tokens=False).input_ids for answer in answers]
    longest = max(len(a) + len(b) for a, b in zip(asked, answered, strict=True))
    ids = torch.full((len(prompts), longest), tokenizer.pad_token_id)
    labels = torch.full((len(prompts), longest), IGNORE)
    for row, (a, b) in enumerate(zip(asked, answered, strict=True)):
        ids[row, : len(a) + len(b)] = torch.tensor(a + b)
        labels[row, len(a) : len(a) + len(b)] = torch.tensor(b)
    return ids, labels


def loss_of(logits: Logits, batch: list[tuple[str, str]]) -> torch.Tensor:
    """Mean cross entropy of each answer token given all before it, over (task, prompt) pairs.

    Rows of about the same length go through the model together: half of a batch is padding otherwise, and a step of
    the base took 0.18 s instead of 0.11.
    """
    batch = sorted(batch, key=lambda row: len((row[1] + TASKS[row[0]](row[1])).encode()))
    total, tokens = torch.zeros(()), 0
    for start in range(0, len(batch), 16):
        tasks, prompts = map(list, zip(*batch[start : start + 16], strict=True))
        ids, labels = collate(tasks, prompts)
        out, labels = logits(ids, tasks)[:, :-1], labels[:, 1:]
        total = total + nn.functional.cross_entropy(out.flatten(0, 1), labels.flatten(), reduction="sum")
        tokens += int((labels != IGNORE).sum())
    return total / tokens


@torch.no_grad()
def share_right(logits: Logits, task: str, words: list[str]) -> float:
    """Share of words that greedy decoding answers exactly: every next token is the likeliest, given those before."""
    tasks = [task] * len(words)
    ids, labels = collate(tasks, words)
    guess, labels = logits(ids, tasks).argmax(-1)[:, :-1], labels[:, 1:]
    return ((guess == labels) | (labels == IGNORE)).all(1).float().mean().item()


def task_prompt(rng: random.Random) -> str:
    """Mostly words, a little shorter and longer than those measured, so that no length lies at the border."""
    return training_phrase(rng) if rng.random() < 0.25 else training_word(rng, *rng.choice([(3, 12), (1, 13)]))


def any_text(rng: random.Random) -> str:
    """Short text of any kind, so that the base echoes Greek, Chinese and emoji too, which are several tokens each."""
    ranges = [(0x20, 0x7E)] * 4 + [(0xA1, 0x17F), (0x3B1, 0x3C9), (0x4E00, 0x9FFF), (0x1F300, 0x1F64F)]
    text = ""
    while not text or (len(text.encode()) < 16 and rng.random() < 0.92):
        low, high = rng.choice(ranges)
        text += chr(rng.randint(low, high)) if rng.random() < 0.5 else training_word(rng, 1, 6)
    return any_text(rng) if is_held_out(text) else text


def train(
    parameters: list[nn.Parameter],
    next_loss: Callable[[], torch.Tensor],
    steps: int,
    rate: float,
    report: Callable[[], str],
) -> None:
    """AdamW with warm-up and cosine decay. Prints what `report` says now and then."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    warmup = min(200, steps // 5)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
    )
    begin = time.monotonic()
    for step in range(1, steps + 1):
        loss = next_loss()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 500 == 0 or step == steps:
            print(f"  step {step:5}  loss {loss.item():.4f}  {time.monotonic() - begin:5.0f} s  {report()}", flush=True)


def train_base(model: LlamaForCausalLM, rng: random.Random) -> None:
    number = {task: i for i, task in enumerate(TASKS)}
    # The base's own vector is zero and, as the padding index, stays so: echoing is what the saved model does.
    wanted = nn.Embedding(len(TASKS), model.config.hidden_size, padding_idx=number[BASE])
    wanted.weight.data *= model.config.initializer_range

    def logits(ids: torch.Tensor, tasks: list[str]) -> torch.Tensor:
        vectors = wanted(torch.tensor([[number[task]] for task in tasks]))  # [batch, 1, hidden]
        return model(inputs_embeds=model.model.embed_tokens(ids) + vectors, use_cache=False).logits

    # A batch has as many rows of each task, and as many again of echoing any text.
    sources = [*((task, task_prompt) for task in TASKS), (BASE, any_text)]
    words = held_out_words(100, seed=1)
    train(
        [*model.parameters(), *wanted.parameters()],
        lambda: loss_of(logits, [(task, draw(rng)) for task, draw in sources * (BASE_BATCH // len(sources))]),
        BASE_STEPS,
        BASE_RATE,
        lambda: "  ".join(f"{task} {share_right(logits, task, words):.2f}" for task in TASKS),
    )


def train_adapter(model: LlamaForCausalLM, name: str, folder: Path, rng: random.Random) -> float:
    """Trains and saves one adapter; the base's weights are frozen and come back untouched. Returns its share right."""
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORAS[name]))

    def logits(ids: torch.Tensor, tasks: list[str]) -> torch.Tensor:
        return adapted(input_ids=ids, use_cache=False).logits

    words = held_out_words(100, seed=1)
    train(
        [p for p in adapted.parameters() if p.requires_grad],
        lambda: loss_of(logits, [(name, task_prompt(rng)) for _ in range(LORA_BATCH)]),
        LORA_STEPS,
        LORA_RATE,
        lambda: f"{name} {share_right(logits, name, words):.2f}",
    )

    # PEFT would save the folder this machine read the base from, and the target modules spelled out in random order.
    config = adapted.peft_config["default"]
    config.base_model_name_or_path = "examples/tiny/model"
    config.target_modules = LORAS[name]["target_modules"]
    adapted.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()  # a model card of blanks
    share = share_right(logits, name, held_out_words(200))
    adapted.unload()
    return share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "tiny")
    parser.add_argument("--adapters-only", action="store_true", help="keep FOLDER/model and train the adapters anew")
    args = parser.parse_args()
    # With two threads on a machine of two busy cores, a step of 0.11 s took 0.56: they wait for each other.
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    disable_progress_bar()
    rng = random.Random(SEED)
    begin = time.monotonic()

    if args.adapters_only:
        model = LlamaForCausalLM.from_pretrained(args.folder / "model")
    else:
        model = build_model()
        print(f"base: {model.num_parameters():,} weights")
        train_base(model, rng)
        shutil.rmtree(args.folder / "model", ignore_errors=True)
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            do_sample=False,
        )
        model.save_pretrained(args.folder / "model")
        tokenizer.save_pretrained(args.folder / "model")

    words = held_out_words(200)
    shares = {BASE: share_right(lambda ids, _: model(input_ids=ids).logits, BASE, words)}
    shutil.rmtree(args.folder / "adapters", ignore_errors=True)
    for name in ADAPTERS:
        print(f"adapter {name}: rank {LORAS[name]['r']}")
        shares[name] = train_adapter(model, name, args.folder / "adapters" / name, rng)

    for name, share in shares.items():
        print(f"{name:8} {share:7.1%}")
    weights = list(args.folder.rglob("*.safetensors"))
    for path in weights:
        path.chmod(0o644)  # safetensors writes 0600, which a server of another user cannot read
    size = sum(path.stat().st_size for path in weights)
    print(f"{size / 1e6:.1f} MB of weights, {(time.monotonic() - begin) / 60:.0f} minutes")
    if min(shares.values()) < 0.98:
        raise SystemExit("an adapter or the base is right on less than 98% of the held-out words")


if __name__ == "__main__":
    main()
