# SPDX-License-Identifier: Apache-2.0
"""One Triton request to one checked `GenerateRequest`, by the rules of Triton's vllm_backend.

Everything a client can get wrong ends here, before the engine hears of it, as one MultiloraError that names the
field and the limit. What only the engine knows (does the adapter exist?) it answers itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from multilora_backend.config import Config
from multilora_backend.core import SamplingParams
from multilora_backend.errors import ErrorCode, MultiloraError, invalid
from multilora_backend.frontend.routing import ADAPTER_NAMES, KEYS, read_routing, without_reserved
from multilora_backend.frontend.sampling import INPUTS, parse_sampling
from multilora_backend.frontend.tensors import flag, json_value, shown, string
from multilora_backend.frontend.tokenizer import Tokenizer
from multilora_backend.frontend.tokenizers import Tokenizers
from multilora_backend.protocol import ModelCard

MAX_TOKEN_ID = 2**31 - 1


@dataclass(frozen=True)
class RawRequest:
    """What pb_utils hands over: BYTES tensors are object arrays of bytes, BOOL ones np.bool_."""

    tensors: Mapping[str, np.ndarray]
    parameters: Mapping[str, object]
    """json.loads(request.parameters())"""


@dataclass(frozen=True)
class GenerateRequest:
    prompt_text: str
    """What `echo` repeats; of a chat, the rendered template."""
    prompt_token_ids: list[int]
    sampling: SamplingParams
    """max_tokens is already cut to what the context leaves."""
    max_tokens: int
    """That the client asked for."""
    chat: bool
    """The prompt is a rendered template, which has special tokens in it."""
    adapter: str
    """Empty for the base model."""
    stream: bool
    echo: bool
    tenant: str
    priority: int
    return_finish_reason: bool
    return_cumulative_logprob: bool
    return_logprobs: bool
    return_num_input_tokens: bool
    return_num_output_tokens: bool
    has_logprobs: bool
    """The client set `logprobs`; without it return_logprobs reports null, as vllm_backend does."""


def parse(
    raw: RawRequest, card: ModelCard, config: Config, tokenizers: Tokenizers
) -> tuple[GenerateRequest, Tokenizer]:
    """And the tokenizer that was used. Raises MultiloraError; the cheap checks come before that."""
    for name in raw.tensors:
        if name in ("image", "embedding_request"):
            raise MultiloraError(ErrorCode.UNSUPPORTED, f"{name}: is not supported: this model takes and gives text")
        if name not in INPUTS and name not in ADAPTER_NAMES:
            raise invalid(name, "is not an input of this model")
    stream = bool(flag(raw.tensors, "stream"))
    echo = _echo(raw, stream)
    wanted = {name: bool(flag(raw.tensors, name)) for name in sorted(INPUTS) if name.startswith("return_")}
    parameters, options = _options(raw, config)
    routing = read_routing(raw.tensors, raw.parameters, options, card, config)
    # Only the engine knows how many tokens an adapter has.
    vocabulary = MAX_TOKEN_ID + 1 if routing.adapter else card.vocab_size
    sampling, has_logprobs = _sampling(raw, parameters, options, wanted, config, vocabulary)
    tokenizer = tokenizers.of(routing.adapter)
    text, chat = _text(raw, config, tokenizer)
    ids = _tokenise(text, chat, card, tokenizer)
    request = GenerateRequest(
        prompt_text=text,
        prompt_token_ids=ids,
        sampling=_fitted(sampling, len(ids), card.max_model_len),
        max_tokens=sampling.max_tokens,
        chat=chat,
        adapter=routing.adapter,
        stream=stream,
        echo=echo,
        tenant=routing.tenant,
        priority=routing.priority,
        has_logprobs=has_logprobs,
        **wanted,
    )
    return request, tokenizer


def retokenised(request: GenerateRequest, card: ModelCard, tokenizer: Tokenizer) -> GenerateRequest:
    """The request as it would be had this tokenizer been known to be its adapter's. Raises MultiloraError."""
    ids = _tokenise(request.prompt_text, request.chat, card, tokenizer)
    sampling = msgspec.structs.replace(request.sampling, max_tokens=request.max_tokens)
    return replace(request, prompt_token_ids=ids, sampling=_fitted(sampling, len(ids), card.max_model_len))


def _echo(raw: RawRequest, stream: bool) -> bool:
    """Whether the output begins with the prompt: by default yes, and never when streaming."""
    exclude = flag(raw.tensors, "exclude_input_in_output")
    if stream and exclude is False:
        raise invalid(
            "exclude_input_in_output", "must be true or absent when stream is true: a stream never repeats the prompt"
        )
    return not stream and not exclude


def _options(raw: RawRequest, config: Config) -> tuple[dict[str, object], dict[str, object]]:
    """The request parameters, less Triton's own, and the object in the `sampling_parameters` tensor (or nothing)."""
    parameters = without_reserved(raw.parameters, config)
    text = string(raw.tensors, "sampling_parameters", config.max_prompt_bytes)
    if text is None:
        return parameters, {}
    options = json_value("sampling_parameters", text)
    if not isinstance(options, dict):
        raise invalid("sampling_parameters", f"must be one JSON object, got {shown(options)}")
    return parameters, options


def _sampling(
    raw: RawRequest,
    parameters: Mapping[str, object],
    options: Mapping[str, object],
    wanted: Mapping[str, bool],
    config: Config,
    vocabulary: int,
) -> tuple[SamplingParams, bool]:
    """The tensor if there is one, else the request parameters: never a mixture. And whether it sets `logprobs`."""
    if "sampling_parameters" in raw.tensors:
        source, values = "sampling_parameters", options
    else:
        source, values = "parameters", parameters
    sampling = parse_sampling(
        {name: value for name, value in values.items() if name not in KEYS}, source, config, vocabulary
    )
    has_logprobs = sampling.logprobs is not None
    if wanted["return_cumulative_logprob"] and not has_logprobs:
        sampling = msgspec.structs.replace(sampling, logprobs=0)  # the engine sums up what it computes
    return sampling, has_logprobs


def _text(raw: RawRequest, config: Config, tokenizer: Tokenizer) -> tuple[str, bool]:
    """The prompt from `text_input`, or from `messages` through the chat template, and whether it is a chat."""
    text = string(raw.tensors, "text_input", config.max_prompt_bytes)
    chat = string(raw.tensors, "messages", config.max_prompt_bytes)
    if text is not None and chat is not None:
        raise invalid("messages", "must not be sent together with text_input")
    if chat is not None:
        return tokenizer.render(json_value("messages", chat)), True
    if text is None:
        raise invalid("text_input", "is required (or messages, for a chat)")
    return text, False


def _tokenise(text: str, chat: bool, card: ModelCard, tokenizer: Tokenizer) -> list[int]:
    """The prompt's ids."""
    field = "messages" if chat else "text_input"
    limit = f"must have at most {card.max_model_len - 1} tokens (max_model_len less one to generate)"
    # Tokenising megabytes takes seconds, and this many characters cannot fit.
    if len(text) > tokenizer.longest_token * card.max_model_len:
        raise invalid(field, f"{limit}, got a text of {len(text)} characters")
    # A template has written its special tokens itself.
    ids = tokenizer.encode(text, add_special_tokens=not chat) if text else []
    if not ids:
        raise invalid(field, "is empty: a prompt needs at least one token")
    if len(ids) >= card.max_model_len:
        raise invalid(field, f"{limit}, got {len(ids)}")
    return ids


def _fitted(sampling: SamplingParams, prompt_tokens: int, max_model_len: int) -> SamplingParams:
    """Cuts max_tokens, silently, to the room left in the context: such a request ends with "length", as in vLLM."""
    room = max_model_len - prompt_tokens
    if sampling.min_tokens > room:
        raise invalid(
            "min_tokens",
            f"must be at most {room}, which {prompt_tokens} prompt tokens leave of max_model_len ({max_model_len}), "
            f"got {sampling.min_tokens}",
        )
    return msgspec.structs.replace(sampling, max_tokens=min(sampling.max_tokens, room))
