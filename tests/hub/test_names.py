"""What a model argument means, without any network."""

from __future__ import annotations

from pathlib import Path

import pytest

from qnext.errors import HubError
from qnext.hub import pull, resolve_model, shipped_model
from qnext.hub import pull as pull_function
from qnext.hub.names import ModelRef, parse_model


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", ModelRef("hf", "org/name")),
        ("Qwen/Qwen3-Next-80B-A3B-Instruct", ModelRef("hf", "Qwen/Qwen3-Next-80B-A3B-Instruct")),
        ("hf:org/name@abc", ModelRef("hf", "org/name", "abc")),
        ("org/name@refs/pr/3", ModelRef("hf", "org/name", "refs/pr/3")),
        ("modelscope:org/name", ModelRef("modelscope", "org/name")),
        ("kaggle:o/m/transformers/v", ModelRef("kaggle", "o/m/transformers/v")),
        ("kaggle:o/m/transformers/v/3", ModelRef("kaggle", "o/m/transformers/v", "3")),
        ("kaggle:o/m/transformers/v@3", ModelRef("kaggle", "o/m/transformers/v", "3")),
    ],
)
def test_hub_names(text, expected):
    assert parse_model(text) == expected


def test_revision_argument():
    assert parse_model("org/name", "v1").revision == "v1"
    assert parse_model("org/name@v1", "v1").revision == "v1"
    with pytest.raises(HubError, match="pins 'v1'"):
        parse_model("org/name@v1", "v2")


@pytest.mark.parametrize(
    "text",
    [
        "/no/such", "./org/name", "../org/name", "~/no-such-folder", "org/name/", "a\\b",
        "C:/models/x", "org/../name", "models/x.safetensors", ".", "..", "/", "a//b",
    ],
)  # fmt: skip
def test_an_absent_path_is_never_a_hub_name(text, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "is_dir", lambda self: False)
    with pytest.raises(HubError, match="no folder") as caught:
        parse_model(text)
    assert caught.value.hint


def test_an_absent_path_object_is_never_a_hub_name():
    with pytest.raises(HubError, match="no folder 'org/name'"):
        parse_model(Path("org/name"))


@pytest.mark.parametrize(
    "text",
    [
        "", "name", "a/b/c", "ftp:org/name", "hf:name", "org/na me", "org/-x", "org/name@", "@v1",
        "org/name@a b", "org/name@../x", "org/name@/x", "hf:/etc/passwd", "hf:../x/y",
        "kaggle:org/name", "kaggle:o/m/f/v/x", "kaggle:o/m/f/v/0", "kaggle:o/m/f/v/3@2",
        "kaggle:o/m/f/../3", "modelscope:org", "modelscope:a/b/c",
    ],
)  # fmt: skip
def test_malformed_names(text):
    with pytest.raises(HubError) as caught:
        parse_model(text)
    assert caught.value.hint


def test_an_existing_folder_is_used_as_it_is(tmp_path):
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    assert resolve_model(folder) == folder
    assert resolve_model(str(folder)) == folder
    assert resolve_model("org/name") == Path("org/name")


def test_pull_of_a_folder_counts_its_files(tmp_path):
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / "x.bin").write_bytes(b"12345")
    result = pull(tmp_path)
    assert (result.path, result.files, result.bytes) == (tmp_path, ("config.json",), 2)
    assert result.revision is None


def test_a_file_is_not_a_model(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with pytest.raises(HubError, match="is a file") as caught:
        resolve_model(path)
    assert str(tmp_path) in caught.value.hint


def test_shipped_model(tmp_path, monkeypatch):
    import sys

    module = sys.modules[pull_function.__module__]
    monkeypatch.setattr(module, "SHIPPED_FOLDER", tmp_path)
    with pytest.raises(HubError, match="not in this installation"):
        shipped_model()
    (tmp_path / "config.json").write_bytes(b"{}")
    assert shipped_model() == resolve_model(None) == tmp_path
