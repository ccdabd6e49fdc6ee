"""Small tensor files: what cannot be written is told in a line, and nothing half done stays."""

import errno

import pytest
import torch
from safetensors import SafetensorError

from p2pz import files
from p2pz.files import save_tensors


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (SafetensorError("Error while serializing: I/O error: Full (os error 28)"), "no space left on device$"),
        (SafetensorError("Error while serializing: IoError(Os { code: 28, kind: Full })"), "no space left on device$"),
        (SafetensorError("Error while serializing: something"), "Error while serializing: something$"),
        (OSError(errno.ENOSPC, "No space left on device", "secret"), "no space left on device$"),
    ],
)
@pytest.mark.parametrize("old", [b"old", None])
def test_a_full_disk(error, words, old, tmp_path, monkeypatch):
    def fail(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise error

    path = tmp_path / "full.safetensors"
    if old:
        path.write_bytes(old)
    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(ValueError, match=rf"^cannot write .*full\.safetensors: {words}"):
        save_tensors(path, "direction", {}, {})
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([old] if old else [])


@pytest.mark.parametrize(
    ("name", "card", "message"),
    [
        ("folder", {}, "folder: is a directory$"),
        ("no/a.safetensors", {}, r"no/a\.safetensors: no such file or directory$"),
        ("a.safetensors", {"prompt": "caf\udce9"}, r"a\.safetensors: this text is not valid Unicode .*: 'caf\\udce9'$"),
    ],
)
def test_what_cannot_be_written(name, card, message, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=f"^cannot write .*{message}"):
        save_tensors(tmp_path / name, "direction", {"states": torch.zeros(2)}, card)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"] and not any((tmp_path / "folder").iterdir())
