# SPDX-License-Identifier: Apache-2.0
"""What is compiled or captured while an engine serves: on CUDA by asking who does it, on the CPU by Triton's own keys.

On the CPU every launcher runs before its reference, and kernels are not run but bound: Triton's own code says which
variant of a kernel the arguments need, from types, constants, alignment and sizes of 1, and a variant that was not
needed before would be compiled.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import multilora_kernels
from multilora_kernels._triton import triton


class Compilations:
    """Names of kernels and whatever else the engine waited for, in order."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def take(self) -> list[str]:
        """Those since the last call."""
        names, self.names = self.names, []
        return names


@contextmanager
def watched(device: str) -> Iterator[Compilations]:
    """No variant of our kernels is compiled yet, as in a new process. What FlashInfer has loaded stays loaded."""
    from triton.runtime.jit import JITFunction

    modules = [
        importlib.import_module(f"multilora_kernels.{module.name}")
        for module in pkgutil.iter_modules(multilora_kernels.__path__)
    ]
    kernels = {id(x): x for module in modules for x in vars(module).values() if isinstance(x, JITFunction)}.values()
    assert len(kernels) > 10
    seen = Compilations()
    with ExitStack() as stack:
        if device == "cpu":
            _bind_only(stack, modules, seen)
        else:
            _ask_all(stack, list(kernels), seen)
        yield seen


def _bind_only(stack: ExitStack, modules: list[Any], seen: Compilations) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime import jit

    backend = make_backend(GPUTarget("cuda", 90, 32))
    binders: dict[Any, Any] = {}
    variants: set[Any] = set()

    def bind(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if kernel not in binders:
            binders[kernel] = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
        _, specialization, options = binders[kernel](*args, **options)
        variant = (kernel.__name__, str(specialization), str(sorted(options.items())))
        if variant not in variants:
            variants.add(variant)
            seen.names.append(" ".join(variant))

    launching = False

    def launch_too(tensor: Tensor) -> bool:
        """Called by an operator that chooses between launcher and reference: has it called once more to launch."""
        nonlocal launching
        if launching:
            return True
        operator = sys._getframe(1)
        names, _, _, values = inspect.getargvalues(operator)
        launching = True
        try:
            operator.f_globals[operator.f_code.co_name](**{name: values[name] for name in names})
        finally:
            launching = False
        return False

    stack.enter_context(mock.patch.object(jit.JITFunction, "run", bind))
    for module in modules:
        if hasattr(module, "use_kernel"):
            stack.enter_context(mock.patch.object(module, "use_kernel", launch_too))


def _ask_all(stack: ExitStack, kernels: list[Any], seen: Compilations) -> None:
    def hook(**about: Any) -> None:
        seen.names.append(about["repr"])

    runtime: Any = triton.knobs.runtime
    stack.callback(setattr, runtime, "jit_post_compile_hook", runtime.jit_post_compile_hook)
    runtime.jit_post_compile_hook = hook
    for kernel in kernels:
        kernel.device_caches.clear()

    def note(owner: Any, name: str) -> None:
        method = getattr(owner, name)

        def noting(self: Any, *args: Any, **options: Any) -> Any:
            seen.names.append(f"{owner.__name__}.{name}")
            return method(self, *args, **options)

        stack.enter_context(mock.patch.object(owner, name, noting))

    with suppress(ImportError):  # without FlashInfer attention runs in torch, which compiles nothing
        note(importlib.import_module("flashinfer.jit.core").JitSpec, "build_and_load")
    note(torch.cuda.CUDAGraph, "capture_begin")
