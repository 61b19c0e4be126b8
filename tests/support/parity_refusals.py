# SPDX-License-Identifier: Apache-2.0
"""Cases of the parity suite that are refused, by what the reason begins with."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.config import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    KasaConfig,
    LoraGAConfig,
    MontecloraConfig,
    VeloraConfig,
)

from parity_case import Case, Config
from parity_families import FAMILIES
from parity_special import BOTH, DORA, EXPERTS, INVOKE


def _is(**fields: Any) -> Config:
    return lambda f: {"target_modules": [f.q], **fields}


def _init(
    value: str, recipe: str = "configured", why: str = "; convert the adapter when saving it", **more: Any
) -> Case:
    fields = ", ".join(["init_lora_weights", *more])
    why = f"init_lora_weights: '{value.split('_niter')[0]}' changes the base model's weights{why}"
    return Case(fields, f"{value}, as trained", _is(init_lora_weights=value, **more), recipe=recipe, refused=why)


EXTRAS = "an adapter with DoRA, trained biases, norms, embeddings, heads or tokens cannot be part of a sum"
FIELDS = [
    _init("pissa"),
    _init("pissa_niter_4"),
    _init("olora"),
    _init("corda", corda_config=CordaConfig()),
    _init("lora_ga", lora_ga_config=LoraGAConfig()),
    _init("loftq", recipe="edited", why=", and nothing converts it", loftq_config={"loftq_bits": 4}),
    Case("layer_replication", "set", _is(layer_replication=[[0, 2], [1, 2]]),
         refused="layer_replication: replicated layers make another base model"),
    Case("use_qalora, qalora_group_size", "true", _is(use_qalora=True, qalora_group_size=8),
         refused="use_qalora: QALoRA is not supported"),
    Case("use_bdlora", "set", _is(use_bdlora=BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2)),
         refused="use_bdlora: block-diagonal LoRA is not supported"),
    Case("arrow_config", "set", _is(arrow_config=ArrowConfig(top_k=2)),
         refused="arrow_config: Arrow routing is not supported"),
    Case("kasa_config", "set", _is(kasa_config=KasaConfig()),
         refused="kasa_config: KaSA changes the base model's weights"),
    Case("velora_config", "set", _is(velora_config=VeloraConfig()), refused="velora_config: VeLoRA is not supported"),
    Case("monteclora_config", "set", _is(monteclora_config=MontecloraConfig()),
         refused="monteclora_config: MonteCLoRA samples weights, which is not supported"),
    Case("megatron_config, megatron_core", "set", _is(megatron_config={"tensor_model_parallel_size": 2}),
         refused="megatron_config: Megatron's parallel linears are not supported"),
    Case("peft_type", "another method", _is(peft_type="LOHA"), recipe="edited",
         refused="peft_type: only 'LORA' is supported"),
    Case("target_modules", "left out", lambda _: {"target_modules": None},
         "PEFT has the names of architectures in a table of its own, which is not applied",
         refused="target_modules: is required"),
    Case("a field of a later PEFT", "set", _is(a_field_of_the_future=0.5), recipe="edited",
         refused="a_field_of_the_future: is not understood"),
]  # fmt: skip

COMBINED = [
    Case("modules_to_save", "a linear", lambda f: {"target_modules": [f.q], "modules_to_save": [f.o]},
         refused="modules_to_save: full weights of linears"),
    Case("modules_to_save", "routers", _is(modules_to_save=["gate"]), experts_only=True,
         refused="modules_to_save: full weights of linears"),
    Case("modules_to_save", "experts", _is(modules_to_save=["experts"]), experts_only=True,
         refused="modules_to_save: full weights of linears"),
    Case("target_parameters", "the weight of a linear", lambda f: {"target_parameters": [f"{f.o}.weight"]},
         "LoRA on a linear is what target_modules is for",
         refused="names no parameter of the base model that LoRA can act on"),
    Case("target_parameters, use_dora", "both", _is(target_parameters=BOTH, use_dora=True), experts_only=True,
         refused="use_dora: PEFT has no use_dora with target_parameters"),
    Case("target_parameters, alora_invocation_tokens", "both",
         _is(target_parameters=BOTH, alora_invocation_tokens=[*INVOKE]), experts_only=True, recipe="edited",
         refused="alora_invocation_tokens: PEFT has no alora_invocation_tokens with target_parameters"),
    Case("use_dora", "on experts, saved with transformers 4",
         lambda f: {**_former(f.model_type), "use_dora": True}, experts_only=True, recipe="former",
         refused="use_dora: PEFT has none on experts and routers"),
    Case("use_rslora", "on experts, saved with transformers 4",
         lambda f: {**_former(f.model_type), "use_rslora": True}, experts_only=True, recipe="former",
         refused="use_rslora: PEFT gives other scales to experts that transformers 4 had as linears"),
    Case("alora_invocation_tokens", "on experts, saved with transformers 4",
         lambda f: {**_former(f.model_type), "alora_invocation_tokens": [*INVOKE]}, experts_only=True, recipe="former",
         refused="alora_invocation_tokens: PEFT has none on experts and routers"),
    Case("init_lora_weights, use_dora", "mica, and true", _is(init_lora_weights="mica", use_dora=True), recipe="edited",
         refused="use_dora: PEFT does not combine it with init_lora_weights 'mica'"),
    Case("init_lora_weights, alora_invocation_tokens", "mica, and set",
         _is(init_lora_weights="mica", alora_invocation_tokens=[*INVOKE]), recipe="edited",
         refused="alora_invocation_tokens: PEFT does not combine it with init_lora_weights 'mica'"),
    Case("init_lora_weights, target_parameters", "mica, and set",
         _is(init_lora_weights="mica", target_parameters=BOTH), experts_only=True, recipe="edited",
         refused="target_parameters: PEFT does not combine it with init_lora_weights 'mica'"),
    Case("lora_bias", "with use_dora", _is(lora_bias=True, use_dora=True), recipe="edited",
         refused="lora_bias: PEFT does not combine it with use_dora"),
    Case("alora_invocation_tokens", "with use_dora", lambda _: {"alora_invocation_tokens": [*INVOKE], "use_dora": True},
         "likewise with trained biases, norms, embeddings, heads and tokens", recipe="edited",
         refused="alora_invocation_tokens: cannot be combined with DoRA"),
    Case("sum of adapters", "with DoRA", note="likewise with what its reason lists", parts=((DORA, 0.5),),
         refused=EXTRAS),
    Case("sum of adapters", "on experts", parts=((EXPERTS[0].name, 0.5),), experts_only=True,
         refused="an adapter with LoRA on experts cannot be part of a sum"),
    Case("sum of adapters", "with alora_invocation_tokens",
         parts=(("alora_invocation_tokens-in-prompts-once-several-times-and-not-at-all", 0.5),),
         refused="an adapter with alora_invocation_tokens cannot be part of a sum"),
]  # fmt: skip


def _former(model_type: str) -> dict[str, Any]:
    return next(case for case in EXPERTS if case.recipe == "former").config(FAMILIES[model_type])
