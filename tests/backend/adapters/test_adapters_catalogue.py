# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import pytest

from multilora_backend.adapters.catalogue import Catalogue, name_problem
from multilora_backend.errors import ErrorCode, MultiloraError


def folders(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


def written(root: Path, name: str, text: str) -> str:
    (root / name).write_text(text)
    return str(root / name)


def test_folder_lists_adapters_and_what_is_broken(tmp_path):
    folders(
        tmp_path,
        "sheep/adapter_config.json",
        "doll/adapter_config.json",
        "no config/adapter_model.safetensors",
        "pickled/adapter_model.bin",
        "notes/README.md",
        ".cache/adapter_config.json",
        "adapter_config.txt",
    )
    catalogue = Catalogue.read(str(tmp_path))
    assert catalogue.names() == list(catalogue) == ["doll", "no config", "pickled", "sheep"]
    assert catalogue.path("doll") == tmp_path / "doll"
    assert "sheep" in catalogue
    assert "notes" not in catalogue


def test_folder_with_an_odd_name_leaves_it_out_and_says_so(tmp_path, caplog):
    folders(tmp_path, "a@1/adapter_config.json", "b/adapter_config.json", "__base__/adapter_config.json")
    assert Catalogue.read(str(tmp_path)).names() == ["b"]
    assert "a@1' is left out" in caplog.text
    assert "__base__' is left out: its name is reserved" in caplog.text


def test_one_adapter_is_no_catalogue(tmp_path):
    folders(tmp_path, "adapter_config.json")
    with pytest.raises(MultiloraError, match=r"^adapters: .* is one adapter"):
        Catalogue.read(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("multi_lora.json", json.dumps({"sheep": "weights/sheep", "doll": "/abs/doll"})),
        ("adapters.yaml", "sheep: weights/sheep\ndoll: /abs/doll\n"),
        ("adapters.yaml", "adapters:\n- {name: sheep, path: weights/sheep}\n- {name: doll, path: /abs/doll}\n"),
        (
            "adapters.json",
            json.dumps(
                {"adapters": [{"name": "sheep", "path": "weights/sheep"}, {"path": "/abs/doll", "name": "doll"}]}
            ),
        ),
    ],
)
def test_files_keep_their_order_and_are_relative_to_themselves(file, text, tmp_path):
    catalogue = Catalogue.read(written(tmp_path, file, text))
    assert catalogue.names() == ["sheep", "doll"]
    assert catalogue.path("sheep") == tmp_path / "weights" / "sheep"
    assert catalogue.path("doll") == Path("/abs/doll")


@pytest.mark.parametrize(("file", "text"), [("a.yaml", ""), ("a.json", "{}"), ("a.yaml", "adapters: []")])
def test_no_adapters_yet(file, text, tmp_path):
    catalogue = Catalogue.read(written(tmp_path, file, text))
    assert len(catalogue) == 0
    assert catalogue.unknown("x").message == "LoRA x is not supported, we currently support []"


def test_an_adapter_may_be_called_adapters(tmp_path):
    assert Catalogue.read(written(tmp_path, "a.yaml", "adapters: folder")).names() == ["adapters"]


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("a.yaml", "x: a\nx: b", "'x' occurs twice"),
        ("a.json", '{"x": "a", "x": "b"}', "'x' occurs twice"),
        ("a.yaml", "adapters:\n- {name: x, path: a}\n- {name: x, path: b}", "'x' occurs twice"),
        ("a.yaml", "adapters:\n- {name: x, path: a, rank: 3}", "a name and a path and nothing else"),
        ("a.yaml", "adapters: [x]", "a name and a path and nothing else"),
        ("a.yaml", "adapters: []\nroot: /x", "unknown key 'root'"),
        ("a.yaml", "12: a", "name and path must be strings, got 12"),
        ("a.yaml", "x: [a]", "name and path must be strings"),
        ("a.yaml", "x:", "name and path must be strings"),
        ("a.yaml", "- x", "must map names to folders"),
        ("a.yaml", "x: [", "a.yaml"),
        ("a.yaml", "? [1, 2]\n: a", "a.yaml"),
        ("a.yaml", "x: !!python/object/apply:os.getcwd []", "a.yaml"),
        ("a.json", "{", "a.json"),
        ("a.json", "[" * 100_000, "a.json"),
        ("a.yaml", "../x: a", "must not contain"),
        ("a.json", json.dumps({"a" * 129: "a"}), "1 to 128 characters"),
    ],
)
def test_bad_files(file, text, problem, tmp_path):
    with pytest.raises(MultiloraError) as error:
        Catalogue.read(written(tmp_path, file, text))
    assert error.value.code is ErrorCode.INVALID_ARG
    assert error.value.message.startswith("adapters: ")
    assert problem in error.value.message


def test_file_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(MultiloraError, match=r"^adapters: .*nowhere cannot be read: No such file"):
        Catalogue.read(str(tmp_path / "nowhere"))
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MultiloraError, match=r"^adapters: .*a\.yaml"):
        Catalogue.read(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize("name", ["a", "Ünïcode", "v1.2", "two words", "x" * 128, "base", "-", "a.b_c-d"])
def test_good_names(name):
    assert name_problem(name) == ""


@pytest.mark.parametrize(
    "name",
    ["", "x" * 129, "a/b", "a\\b", "..", "a..b", "/etc", "a\n", "a\0b", " a", "a ", "\ud800", "a:1", "a,b", "a@2"],
)
def test_bad_names(name):
    assert name_problem(name)


def test_unknown_name_has_vllm_backends_words():
    catalogue = Catalogue([("doll", Path("d")), ("sheep", Path("s"))])
    with pytest.raises(MultiloraError) as error:
        catalogue.path("x")
    assert error.value.message == "LoRA x is not supported, we currently support ['doll', 'sheep']"
    assert error.value.code is ErrorCode.INVALID_ARG


def test_unknown_name_among_many_is_cut():
    catalogue = Catalogue((f"n{i}", Path("x")) for i in range(60))
    message = catalogue.unknown("z" * 10_000).message
    assert message.endswith("'n48', 'n49'] ... and 10 more")
    assert len(message) < 1000
