# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multilora_backend.adapters.sources import Kind, Roots, Source, parse_source
from multilora_backend.errors import ErrorCode, MultiloraError

SHA256 = "0" * 63 + "a"


def refused(text: str, roots: Roots, base: Path = Path("/base"), code=ErrorCode.INVALID_ARG, sha256: str = "") -> str:
    with pytest.raises(MultiloraError) as error:
        parse_source(text, roots, base, sha256)
    assert error.value.code is code
    return error.value.message


@pytest.mark.parametrize(
    ("text", "kind", "location", "shown"),
    [
        ("sheep", Kind.FOLDER, "/base/sheep", "/base/sheep"),
        ("org/repo", Kind.FOLDER, "/base/org/repo", "/base/org/repo"),
        ("./a//b/../c/", Kind.FOLDER, "/base/a/c", "/base/a/c"),
        ("/abs/x y", Kind.FOLDER, "/abs/x y", "/abs/x y"),
        ("file:///abs/x%20y", Kind.FOLDER, "/abs/x y", "/abs/x y"),
        ("LOCAL:///abs", Kind.FOLDER, "/abs", "/abs"),
        ("hf:acme/lora", Kind.HUB, "acme/lora", "hf:acme/lora"),
        ("hf://acme/lora", Kind.HUB, "acme/lora", "hf:acme/lora"),
        ("hf:acme/lora/fr/v2@refs/pr/1", Kind.HUB, "acme/lora/fr/v2", "hf:acme/lora/fr/v2@refs/pr/1"),
        ("s3://bucket/Lora/x/", Kind.URL, "s3://bucket/Lora/x", "s3://bucket/Lora/x"),
        ("HTTPS://Host.Example:443/Lora/x", Kind.URL, "https://host.example/Lora/x", "https://host.example/Lora/x"),
        ("http://host:8080/x", Kind.URL, "http://host:8080/x", "http://host:8080/x"),
    ],
)
def test_spellings(text, kind, location, shown):
    roots = Roots((Path("/base"), Path("/abs")), ("hf://", "s3://bucket", "https://host.example", "http://host:8080"))
    source = parse_source(text, roots, Path("/base"), SHA256)
    assert (source.kind, source.location, source.text, source.sha256) == (kind, location, shown, SHA256)
    assert parse_source(source.text, roots, Path("/elsewhere"), SHA256) == source
    assert source.is_local == (kind is Kind.FOLDER)
    if source.is_local:
        assert source.path == Path(location)
        assert source.inside == roots.folders
    else:
        with pytest.raises(ValueError, match="is no folder"):
            _ = source.path


@pytest.mark.parametrize(
    "text",
    [
        "../x", "a/../../x", "/etc", "/base-evil/x", "file:///etc/passwd", "local:///etc",
        "hf:evil/x", "hf:acme-evil/x", "s3://bucket/lora-evil", "s3://bucket", "s3://other/lora/x", "s3a://bucket/lora/x",
        "https://host/a", "https://host.example:444/a/x", "https://host.example.evil/a/x", "http://host.example/a/x",
        "memory://x",
    ],
)  # fmt: skip
def test_outside_of_the_roots(text):
    roots = Roots((Path("/base"),), ("hf://acme", "s3://bucket/lora", "https://host.example/a"))
    assert refused(text, roots) == f"source: {text!r} is not below any of adapter_roots"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "1 to 2048"),
        ("x" * 2049, "1 to 2048"),
        ("a\0b", "printable"),
        ("a\nb", "printable"),
        ("hf:lora", "must be hf:owner"),
        ("hf:acme/../lora", "must be hf:owner"),
        ("hf:acme/lora@..", "must be hf:owner"),
        ("hf:acme/lora@a@b", "must be hf:owner"),
        ("hf:acme/lo ra", "must be hf:owner"),
        ("hf:acmé/lora", "must be hf:owner"),
        ("simplecache::https://h/x", "chained"),
        ("https://h/x::zip://y", "chained"),
        ("https://h/a/../b", "relative segments"),
        ("https://h/a/%2e%2E/b", "relative segments"),
        ("https://h/a/x%2fy", "relative segments"),
        ("https://h/a/x%5cy", "relative segments"),
        ("https://h/a//b", "relative segments"),
        ("https://h/a?token=1", "no query"),
        ("https://h/a#b", "no query"),
        ("https://h/a\\b", "backslash"),
    ],
)
def test_malformed(text, said):
    assert said in refused(text, Roots((Path("/"),), ("hf://", "https://"), any_folder=True))


@pytest.mark.parametrize(
    "text", ["x.zip", "/base/x.tar.gz", "hf:acme/lora/x.7z", "s3://b/x.TAR/", "zip://x", "tar://x"]
)
def test_archives_are_not_unpacked(text):
    assert "archives are not unpacked" in refused(text, Roots(any_folder=True), code=ErrorCode.UNSUPPORTED)


def test_schemes_that_nothing_reads():
    assert refused("gopher://x/y", Roots(), code=ErrorCode.UNSUPPORTED).endswith("can read gopher:// URLs")


def test_secrets_are_not_repeated():
    message = refused("https://me:secret@host/x", Roots((), ("https://host",)))
    assert "user name or password" in message
    assert "secret" not in message


@pytest.mark.parametrize("sha256", ["0" * 63, "0" * 65, "A" * 64, "x"])
def test_checksums_that_are_none(sha256):
    assert refused("x", Roots(any_folder=True), sha256=sha256).startswith("sha256: must be 64 hexadecimal digits")


def test_links_are_followed_before_roots_are_compared(tmp_path):
    (tmp_path / "allowed").mkdir()
    (tmp_path / "other" / "x").mkdir(parents=True)
    (tmp_path / "way in").symlink_to("allowed")
    (tmp_path / "allowed" / "way out").symlink_to("../other")
    roots = Roots.parse(str(tmp_path / "way in"))
    assert roots.folders == (tmp_path / "allowed",)
    assert parse_source(str(tmp_path / "way in" / "x"), roots, tmp_path).location == str(tmp_path / "way in" / "x")
    refused(str(tmp_path / "allowed" / "way out" / "x"), roots)


def test_roots_are_read_in_any_order(tmp_path):
    roots = Roots.parse(f" hf:acme/ ,{tmp_path}/., S3://b/x/,, hf:, https://H:443, file:///nowhere ")
    assert roots == Roots((tmp_path, Path("/nowhere")), ("hf://acme", "s3://b/x", "hf://", "https://h"))
    assert Roots.parse("") == Roots()


@pytest.mark.parametrize(
    "text", ["relative", "./x", "acme/lora", "s3://b/../x", "https://u:p@h", "gopher://x", "zip://x"]
)
def test_roots_that_are_none(text):
    with pytest.raises(MultiloraError, match=r"^adapter_roots: "):
        Roots.parse(f"/ok, {text}")


def test_whose_roots(tmp_path):
    folder, file, outside = tmp_path / "adapters", tmp_path / "conf" / "a.yaml", tmp_path / "outside"
    for path in (folder, file.parent, outside):
        path.mkdir()
    file.touch()

    def allowed(roots: Roots, *paths: Path) -> list[bool]:
        return [roots.admits_folder(path / "x") for path in paths]

    places = (folder, file.parent, outside)
    assert allowed(Roots.for_operator("", str(folder)), *places) == [True, False, False]
    assert allowed(Roots.for_operator("", str(file)), *places) == [True, True, True]
    assert allowed(Roots.for_operator(str(outside), str(file)), *places) == [False, True, True]
    assert allowed(Roots.for_operator("hf:acme", str(file)), *places) == [False, True, False]
    assert allowed(Roots.for_clients("", str(folder)), *places) == [True, False, False]
    assert allowed(Roots.for_clients("", str(file)), *places) == [False, False, False]
    assert allowed(Roots.for_clients(str(outside), str(file)), *places) == [False, False, True]
    # Nothing is taken from a network that the operator has not named.
    refused("hf:acme/lora", Roots.for_operator("", str(file)))
    # Where any folder is allowed, links still may not leave the one that is named.
    assert parse_source(str(outside), Roots.for_operator("", str(file)), tmp_path).inside == ()
    assert Source.of_folder(folder, (tmp_path,)).inside == (tmp_path,)


segments = st.sampled_from(["a", "b", "..", ".", "", "lora", "lora-evil", "%2e%2e", "x%2f..", "A"])


@given(st.lists(segments, max_size=6), st.sampled_from(["https://h", "s3://b", ""]))
def test_whatever_is_allowed_lies_below_a_root(parts, head):
    roots = Roots((Path("/srv/lora"),), ("https://h/lora", "s3://b/lora"))
    text = "/".join([head, *parts]) or "."
    try:
        source = parse_source(text, roots, Path("/srv/lora"))
    except MultiloraError:
        return
    first, *below = source.location.removeprefix("/srv").removeprefix("https://h").removeprefix("s3://b")[1:].split("/")
    assert first == "lora"
    assert all(part not in ("", ".", "..") for part in below)
    assert source.is_local or "%2" not in source.location
    assert not source.is_local or source.path.resolve().is_relative_to("/srv/lora")
