# SPDX-License-Identifier: Apache-2.0
"""Clients for a multilora model behind Triton: sync and asyncio, over gRPC or HTTP. Needs no torch."""

from multilora_client.aio import AsyncClient, AsyncCompletionStream
from multilora_client.client import Client, CompletionStream
from multilora_client.errors import (
    AdapterNotFound,
    InvalidRequest,
    MultiloraClientError,
    NotFound,
    RequestCancelled,
    RequestTimeout,
    ServerError,
    ServerUnavailable,
)
from multilora_client.types import (
    AdapterChoice,
    AdapterInfo,
    Choice,
    Chunk,
    Completion,
    Message,
    SamplingOptions,
    TokenLogprob,
)

__all__ = [
    "AdapterChoice",
    "AdapterInfo",
    "AdapterNotFound",
    "AsyncClient",
    "AsyncCompletionStream",
    "Choice",
    "Chunk",
    "Client",
    "Completion",
    "CompletionStream",
    "InvalidRequest",
    "Message",
    "MultiloraClientError",
    "NotFound",
    "RequestCancelled",
    "RequestTimeout",
    "SamplingOptions",
    "ServerError",
    "ServerUnavailable",
    "TokenLogprob",
]
