# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import pytest

from multilora_backend.adapters.cache import fetch
from multilora_backend.adapters.catalogue import Catalogue, name_problem
from multilora_backend.adapters.peft import fingerprint
from multilora_backend.adapters.sources import Roots
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


def test_what_a_file_may_say_of_an_adapter(tmp_path):
    sha256 = "0123456789abcdef" * 4
    file = written(
        tmp_path,
        "a.yaml",
        f"""
        plain: weights
        hub: hf:acme/lora@v2
        all: {{source: "s3://bucket/x", pinned: true, tenants: [gold, "silver-*"], sha256: {sha256}}}
        """,
    )
    roots = Roots.for_operator("hf:acme, s3://bucket", file)
    folders(tmp_path, "weights/adapter_config.json")
    plain, hub, full = Catalogue.read(file, roots).entries
    assert (plain.source.path, plain.pinned, plain.tenants) == (tmp_path / "weights", False, ())
    assert plain.fingerprint == fingerprint(tmp_path / "weights")
    assert (hub.source.text, hub.fingerprint) == ("hf:acme/lora@v2", None)
    assert (full.name, full.source.text, full.source.sha256) == ("all", "s3://bucket/x", sha256)
    assert (full.pinned, full.tenants) == (True, ("gold", "silver-*"))


def test_a_folder_outside_of_the_roots_is_an_error_for_a_file(tmp_path):
    file = written(tmp_path, "a.yaml", "x: /elsewhere/x")
    assert Catalogue.read(file).names() == ["x"]
    with pytest.raises(MultiloraError, match=r"'x': source: '/elsewhere/x' is not below any of adapter_roots"):
        Catalogue.read(file, Roots.for_operator("/srv", file))


def test_links_of_a_folder_are_listed_and_confined(tmp_path):
    folders(tmp_path, "adapters/a/adapter_config.json", "elsewhere/adapter_config.json")
    (tmp_path / "adapters" / "b").symlink_to("../elsewhere")
    (tmp_path / "adapters" / "dangling").symlink_to("nowhere")
    catalogue = Catalogue.read(str(tmp_path / "adapters"))
    assert catalogue.names() == ["a", "b"]
    assert {entry.source.inside for entry in catalogue.entries} == {(tmp_path / "adapters",)}
    with pytest.raises(MultiloraError, match="outside of adapter_roots"):
        fetch(catalogue.entries[1].source, tmp_path, 10**9)


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
        ("a.yaml", "adapters:\n- {name: x, path: a, rank: 3}", "unknown key 'rank'"),
        ("a.yaml", "adapters: [x]", "must have a name and a source"),
        ("a.yaml", "adapters: []\nroot: /x", "unknown key 'root'"),
        ("a.yaml", "12: a", "12: name and source must be strings"),
        ("a.yaml", "x: [a]", "name and source must be strings"),
        ("a.yaml", "x:", "name and source must be strings"),
        ("a.yaml", "- x", "must map names to sources"),
        ("a.yaml", "x: [", "a.yaml"),
        ("a.yaml", "? [1, 2]\n: a", "a.yaml"),
        ("a.yaml", "x: !!python/object/apply:os.getcwd []", "a.yaml"),
        ("a.json", "{", "a.json"),
        ("a.json", "[" * 100_000, "a.json"),
        ("a.yaml", "../x: a", "must not contain"),
        ("a.yaml", "x: {pinned: true}", "'x': needs a source"),
        ("a.yaml", "x: {path: a, source: b}", "'x': needs a source"),
        ("a.yaml", "x: {source: a, pinned: 1}", "'x': pinned must be true or false, got 1"),
        ("a.yaml", "x: {source: a, tenants: t}", "'x': tenants must be a list of different names, got 't'"),
        ("a.yaml", "x: {source: a, tenants: [t, t]}", "'x': tenants must be a list of different names"),
        ("a.yaml", "x: {source: a, sha256: 12}", "'x': sha256 must be a string, got 12"),
        ("a.yaml", "x: {source: a, sha256: abc}", "'x': sha256: must be 64 hexadecimal digits"),
        ("a.yaml", "x: hf:acme/lora", "'x': source: 'hf:acme/lora' is not below any of adapter_roots"),
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
