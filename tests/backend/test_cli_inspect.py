# SPDX-License-Identifier: Apache-2.0
"""`multilora inspect` as a user types it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from extras_models import save_trained
from multilora_backend import cli
from multilora_backend.adapters.base_files import base_fingerprint

ROOT = Path(__file__).resolve().parents[2]
MODEL, ADAPTERS = ROOT / "examples/tiny/model", ROOT / "examples/tiny/adapters"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ADAPTERS / "upper", tmp_path / "upper"))


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    status = cli.main(["inspect", *map(str, arguments)])
    output = capsys.readouterr()
    assert output.err == ""
    return status, output.out


@pytest.mark.parametrize("name", sorted(path.name for path in ADAPTERS.iterdir()))
def test_the_examples_load(name: str, capsys: pytest.CaptureFixture[str]):
    status, text = run(capsys, ADAPTERS / name, "--model", MODEL)
    assert status == 0
    assert re.search(r"\nIt would load, as version [0-9a-f]{32}\.\n$", text)
    assert f"fingerprint {base_fingerprint(MODEL)}" in text
    status, text = run(capsys, ADAPTERS / name)
    assert status == 0
    assert "--model tells whether it fits a model" in text


def test_the_table_is_by_module_with_layers_together(capsys: pytest.CaptureFixture[str]):
    _, text = run(capsys, ADAPTERS / "double", "--model", MODEL)
    rows = [line.split() for line in text.splitlines() if line.strip().startswith("model.layers")]
    assert ["model.layers.*.mlp.down_proj", "4", "10", "1.5"] in [row[:4] for row in rows]
    # One layer's q_proj has a rank of its own.
    assert [row[1:4] for row in rows if row[0].endswith("q_proj")] == [["1", "3", "4"], ["3", "6", "2"]]


def test_what_it_has_besides_a_and_b_has_a_table_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_trained(MODEL, tmp_path / "dora", r=6, use_dora=True, modules_to_save=["norm"], target_modules=["q_proj"])
    capsys.readouterr()  # of PEFT
    status, text = run(capsys, tmp_path / "dora", "--model", MODEL)
    assert status == 0
    rows = [line.split() for line in text.splitlines()]
    assert ["model.layers.*.self_attn.qkv_proj", "affine", "4", "8.0", "KiB"] in rows
    assert ["model.norm", "weight", "1", "512", "B"] in rows
    assert ["model.norm", "1", "weight", "128", "F32", "512", "B"] in rows, "nothing in the pool of A and B"
    assert "an adapter with DoRA, trained biases, norms, embeddings, heads or tokens cannot be part of a sum." in text


def test_tokens_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_trained(MODEL, tmp_path, vocabulary=270, modules_to_save=["lm_head", "embed_tokens"], r=4)
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    tokenizer.add_tokens([f"[tool {i}]" for i in range(10)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    capsys.readouterr()  # of PEFT
    status, text = run(capsys, tmp_path, "--model", MODEL)
    assert status == 0
    shown = ", ".join(f"[tool {i}] ({260 + i})" for i in range(8))
    assert f"\nIt has tokens of its own: {shown} and 2 more.\n" in text
    _, text = run(capsys, tmp_path, "--model", MODEL, "--json")
    assert json.loads(text)["fit"]["tokens"] == {f"[tool {i}]": 260 + i for i in range(10)}


def test_json_has_all_of_it(capsys: pytest.CaptureFixture[str]):
    status, text = run(capsys, ADAPTERS / "double", "--model", MODEL, "--json")
    found = json.loads(text)
    assert (status, found["loads"], found["reasons"]) == (0, True, [])
    assert len(found["adapter"]["modules"]) == len(found["fit"]["modules"]) == 28
    assert found["fit"]["padded_rank"] == 16
    assert sum(module["device_bytes"] for module in found["fit"]["modules"]) == found["fit"]["pool_bytes"]
    assert found["fit"]["fingerprint"] == base_fingerprint(MODEL)
    status, text = run(capsys, ADAPTERS / "double", "--json")
    assert json.loads(text)["fit"] is None


def test_several_are_a_line_each(tmp_path: Path, adapter: Path, capsys: pytest.CaptureFixture[str]):
    status, text = run(capsys, ADAPTERS, "--model", MODEL)
    assert status == 0
    assert [line.split()[0] for line in text.splitlines() if "loads" in line] == sorted(
        path.name for path in ADAPTERS.iterdir()
    )
    shutil.copytree(adapter, tmp_path / "broken")
    (tmp_path / "broken" / WEIGHTS).write_bytes(b"")
    status, text = run(capsys, tmp_path)
    assert status == 1
    assert [line.split()[0] for line in text.splitlines() if "truncated" in line] == ["broken"]
    status, text = run(capsys, tmp_path, "--json")
    assert status == 1
    assert [each["loads"] for each in json.loads(text)["adapters"]] == [False, True]


@pytest.mark.parametrize("with_model", [True, False])
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("content", [None, b"", b"[]", b"\xff" * 64])
def test_what_is_broken_is_a_verdict(content, name, with_model, adapter: Path, capsys: pytest.CaptureFixture[str]):
    if content is None:
        (adapter / name).unlink()
    else:
        (adapter / name).write_bytes(content)
    status, text = run(capsys, adapter, *(["--model", MODEL] if with_model else []))
    assert status == 1
    _, _, reasons = text.partition("It would not load:\n")
    assert reasons.startswith(f"  {name}: ")


def test_no_folder_and_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    status, text = run(capsys, tmp_path / "none")
    assert (status, text.splitlines()[-1]) == (1, "  folder: does not exist")
    assert cli.main(["inspect", str(ADAPTERS / "upper"), "--model", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"multilora: model: {tmp_path} holds no config.json\n"
    assert cli.main(["inspect", str(ADAPTERS / "upper"), "--set", "nonsense=1"]) == 1
    assert "unknown key 'nonsense'" in capsys.readouterr().err


def test_another_model_and_why_not(adapter: Path, capsys: pytest.CaptureFixture[str]):
    tensors = load_file(adapter / WEIGHTS)
    name = next(name for name in tensors if "lora_A" in name)
    save_file({**tensors, name: torch.zeros(2, 130)}, adapter / WEIGHTS)
    assert run(capsys, adapter)[0] == 0
    status, text = run(capsys, adapter, "--model", MODEL)
    assert status == 1
    assert f"{name}: has shape [2, 130], expected [2, 384]" in text
    settings = ["--set", "adapter_device_bytes=350000"]
    status, text = run(capsys, ADAPTERS / "sort", "--model", MODEL, *settings)
    assert status == 1
    assert "rank 16 needs adapter_device_bytes of" in text


def test_an_adapter_without_effect_says_so(adapter: Path, capsys: pytest.CaptureFixture[str]):
    tensors = {name: torch.zeros_like(tensor) for name, tensor in load_file(adapter / WEIGHTS).items()}
    save_file(tensors, adapter / WEIGHTS)
    for more in ([], ["--model", MODEL]):
        status, text = run(capsys, adapter, *more)
        assert status == 0
        assert "It has no effect: all its deltas are zero." in text
    assert "loads, no effect" in run(capsys, adapter.parent, "--model", MODEL)[1]


def test_links_into_a_root_are_followed(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """As of a snapshot in a Hugging Face cache."""
    store = tmp_path / "store"
    store.mkdir()
    (adapter / WEIGHTS).rename(store / "blob")
    (adapter / WEIGHTS).symlink_to(store / "blob")
    apart = tmp_path / "apart"
    apart.mkdir()
    shutil.move(adapter, apart)
    status, text = run(capsys, apart / "upper", "--model", MODEL)
    assert status == 1
    assert "is a symbolic link that leaves" in text
    assert run(capsys, apart / "upper", "--model", MODEL, "--set", f"adapter_roots={store}")[0] == 0


def test_a_recorded_fingerprint(adapter: Path, capsys: pytest.CaptureFixture[str]):
    own = base_fingerprint(MODEL)
    for recorded, expected in ((own, 0), ("ab" * 32, 1)):
        metadata = {"format": "pt", "base_model_fingerprint": recorded}
        save_file(load_file(adapter / WEIGHTS), adapter / WEIGHTS, metadata=metadata)
        status, text = run(capsys, adapter, "--model", MODEL)
        assert status == expected
        assert f"fingerprint {recorded}" in text
    assert f"base_model_fingerprint: the adapter is for {recorded}, the model is {own}" in text


def test_in_a_pipe_the_names_are_whole():
    command = [sys.executable, "-m", "multilora_backend.cli", "inspect", str(ADAPTERS / "double")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "model.layers.*.self_attn.q_proj " in done.stdout
    assert done.stderr == ""
