"""A GGUF file's tokenizer is converted once, and again when the file or what is kept is another."""

import os
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from host_client.cli import tokenizers
from host_client.cli.tokenizers import load_tokenizer
from host_client.driver.drive import cache_folder
from host_client.model.source import EXAMPLE_MODEL, Source, resolve_source

TEXT = "It's 12 o'clock.\n\n  Überall<|im_end|> \U0001f600"


@pytest.fixture(scope="module")
def converted() -> PreTrainedTokenizerBase:
    source = resolve_source(EXAMPLE_MODEL)
    return tokenizers._read(source.folder, source.gguf_file)


@pytest.fixture
def conversions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, converted: PreTrainedTokenizerBase
) -> list[Path]:
    """Which files were converted, for a cache folder that is empty at first."""
    found: list[Path] = []
    read = tokenizers._read

    def counted(folder: Path, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
        if gguf_file is None:
            return read(folder)
        found.append(folder / gguf_file)
        return converted

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tokenizers, "_read", counted)
    return found


@pytest.fixture
def source(tmp_path: Path) -> Source:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF")
    return resolve_source(path)


def _kept() -> list[Path]:
    return list((cache_folder() / "tokenizers").iterdir())


def test_what_is_kept_says_the_same(
    source: Source, conversions: list[Path], converted: PreTrainedTokenizerBase
) -> None:
    load_tokenizer(source)
    kept = load_tokenizer(source)
    assert conversions == [source.path]
    assert kept is not converted
    chat = [{"role": "user", "content": TEXT}]
    assert kept(TEXT).input_ids == converted(TEXT).input_ids
    assert kept.apply_chat_template(chat) == converted.apply_chat_template(chat)
    assert kept.decode(kept(TEXT).input_ids) == converted.decode(kept(TEXT).input_ids)
    assert kept.special_tokens_map == converted.special_tokens_map


def test_another_file_of_that_name_is_converted_and_the_old_one_forgotten(
    source: Source, conversions: list[Path]
) -> None:
    load_tokenizer(source)
    os.utime(source.path, ns=(1, 1))
    load_tokenizer(source)
    assert len(conversions) == 2
    assert len(_kept()) == 1


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_torn_ones_are_made_again(source: Source, conversions: list[Path], name: str) -> None:
    load_tokenizer(source)
    (folder,) = _kept()
    os.truncate(folder / name, 100)
    load_tokenizer(source)
    load_tokenizer(source)
    assert len(conversions) == 2


def test_without_a_cache_it_is_converted_each_time(
    source: Source, conversions: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file")
    load_tokenizer(source)
    load_tokenizer(source)
    assert len(conversions) == 2


@pytest.mark.parametrize(
    "owner, step, error",
    [
        (Path, "rename", OSError("no space left")),
        (PreTrainedTokenizerBase, "save_pretrained", Exception("No space left on device")),
    ],
)
def test_a_disk_that_is_full_leaves_no_halves(
    source: Source,
    conversions: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    step: str,
    error: Exception,
) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(owner, step, full)
    load_tokenizer(source)
    assert _kept() == []
