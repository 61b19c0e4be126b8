# SPDX-License-Identifier: Apache-2.0
"""The example's tokenizer: one token a byte, so that every UTF-8 text is possible, and no merges.

A letter is one token and an emoji is four, none of which is text on its own. The post-processor frames a prompt as
`<|begin|> hello <|answer|>`, so a user sends just the word.
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PAD, BEGIN, ANSWER, END = "<|pad|>", "<|begin|>", "<|answer|>", "<|end|>"
CONTEXT = 1024

# One question, one answer: the last user message is the prompt and earlier turns are dropped, because the model was
# never taught to look at them. An answer after it is rendered too, as a fine-tuning library expects.
CHAT_TEMPLATE = """\
{%- set turn = namespace(user=none, answer=none) -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}
    {%- set turn.user = message.content -%}
    {%- set turn.answer = none -%}
  {%- elif message.role == 'assistant' -%}
    {%- set turn.answer = message.content -%}
  {%- endif -%}
{%- endfor -%}
{%- if turn.user is not string -%}
  {{- raise_exception('messages must hold a user message whose content is a string') -}}
{%- endif -%}
{{- '<|begin|>' + turn.user -}}
{%- if turn.answer is not none -%}
  {{- '<|answer|>' + turn.answer + '<|end|>' -}}
{%- elif add_generation_prompt -%}
  {{- '<|answer|>' -}}
{%- endif -%}
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    specials = [PAD, BEGIN, ANSWER, END]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(specials + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {ANSWER}", special_tokens=[(BEGIN, vocab[BEGIN]), (ANSWER, vocab[ANSWER])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[ANSWER],
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )
