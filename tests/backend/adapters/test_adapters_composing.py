# SPDX-License-Identifier: Apache-2.0
"""A composition's weights are what PEFT makes of its parts by `add_weighted_adapter(combination_type="cat")`."""

from __future__ import annotations

from decimal import Decimal

import peft
import pytest
import torch

from multilora_backend.adapters.composing import compose, composed_version
from multilora_backend.adapters.peft import read_adapter
from multilora_backend.adapters.ranks import padded
from multilora_backend.errors import MultiloraError


def delta(weights, site, sites, module: str) -> torch.Tensor:
    """[out, in] that a module's weight would get."""
    laid_out, place = weights.sites[site], sites[site].modules.index(module)
    rows, first = padded(weights.rank), sum(sites[site].out_features[:place])
    a = laid_out.a[place * rows : (place + 1) * rows]
    return (a.T @ laid_out.b[:, first : first + sites[site].out_features[place]]).T


@pytest.mark.parametrize("factors", [("0.7", "0.3", "-1.5"), ("2", "0", "0.125")])
def test_it_is_pefts_cat(save, sites, llama, factors):
    folders = {
        "a": save("a", 1, r=4),
        "b": save("b", 2, r=8, lora_alpha=3, target_modules=["q_proj", "v_proj", "down_proj"]),
        "c": save("c", 3, r=3, rank_pattern={"k_proj": 5}, alpha_pattern={"o_proj": 1}),
    }
    read = [read_adapter(folder, sites, torch.float32) for folder in folders.values()]
    weights = compose([(w, Decimal(f)) for w, f in zip(read, factors, strict=True)], sites, torch.float32)
    assert weights.rank == 4 + 8 + 5
    model = peft.PeftModel.from_pretrained(llama, str(folders["a"]), adapter_name="a")
    for name in "bc":
        model.load_adapter(str(folders[name]), adapter_name=name)
    model.add_weighted_adapter(list("abc"), [float(f) for f in factors], "sum", combination_type="cat")
    compared = 0
    for name, module in model.base_model.model.named_modules():
        if not isinstance(module, peft.tuners.lora.LoraLayer):
            continue
        site = next(i for i, site in enumerate(sites) if name in site.modules)
        expected = module.get_delta_weight("sum")
        # fp32, sums of 17 products: a few ulps of the largest
        assert (delta(weights, site, sites, name) - expected).abs().max() <= 32 * 2**-24 * expected.abs().max()
        compared += 1
    assert compared == 14


def test_what_no_part_touches_is_left_out(save, sites):
    read = [
        read_adapter(save(name, seed, target_modules=[module]), sites, torch.float32)
        for seed, (name, module) in enumerate([("a", "k_proj"), ("b", "up_proj")])
    ]
    weights = compose([(w, Decimal(1)) for w in read], sites, torch.float32)
    assert [site is not None for site in weights.sites] == [True, False, True, False] * 2
    assert all(torch.isfinite(buffer.data).all() for buffer in weights.buffers)
    assert (delta(weights, 0, sites, sites[0].modules[0]) == 0).all()


def test_the_order_of_parts_says_nothing(save, sites):
    parts = [
        (read_adapter(save(n, s), sites, torch.bfloat16), Decimal(w)) for n, s, w in [("a", 1, "0.3"), ("b", 2, 2)]
    ]
    one, two = compose(parts, sites, torch.bfloat16), compose(parts[::-1], sites, torch.bfloat16)
    assert one.version == two.version == composed_version((w.version, f) for w, f in parts)
    assert all(torch.equal(x.data, y.data) for x, y in zip(one.buffers, two.buffers, strict=True))
    other = compose([(parts[0][0], Decimal("0.3")), (parts[1][0], Decimal("2.1"))], sites, torch.bfloat16)
    assert other.version != one.version
    assert composed_version([("a", Decimal("0.50"))]) == composed_version([("a", Decimal("0.5"))])


def test_a_weight_that_overflows_is_refused(save, sites, edit_tensors):
    folder = edit_tensors(save(), lambda tensors: [t.mul_(3000) for n, t in tensors.items() if "lora_B" in n])
    weights = read_adapter(folder, sites, torch.float16)
    with pytest.raises(MultiloraError, match=r"lora_name: an adapter's B does not fit torch.float16"):
        compose([(weights, Decimal(1000))], sites, torch.float16)


def test_nothing_of_nothing_is_nothing(save, sites, edit_tensors):
    dead = edit_tensors(save("dead"), lambda tensors: [t.zero_() for n, t in tensors.items() if "lora_B" in n])
    parts = [read_adapter(folder, sites, torch.float32) for folder in (dead, save("alive", 1))]
    assert compose([(parts[0], Decimal(2))], sites, torch.float32).no_effect
    assert not compose([(part, Decimal(2)) for part in parts], sites, torch.float32).no_effect
