"""A source's tokenizer; that of a GGUF file is converted once and kept."""

import shutil
import tempfile
from hashlib import sha256
from pathlib import Path

import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from host_client.driver.drive import cache_folder
from host_client.model.source import Source


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside a source's weights, or inside of them.

    A GGUF file's is made anew of every token's text, which takes seconds where reading the result
    takes a fifth of one: it is kept in the user's cache folder, for that file as it is.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if source.gguf_file is None:
        return _read(source.folder)
    kept = _kept(source.path)
    if kept.is_dir():
        try:
            return _read(kept)
        except (OSError, ValueError):  # no longer whole: it is made again
            shutil.rmtree(kept, ignore_errors=True)
    tokenizer = _read(source.folder, source.gguf_file)
    _keep(tokenizer, kept)
    return tokenizer


def _read(folder: Path, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
    return tokenizer


def _kept(path: Path) -> Path:
    """Where the tokenizer of this file is kept, as this transformers converts it."""
    found = path.stat()
    state = f"{found.st_size}-{found.st_mtime_ns}-{transformers.__version__}"
    return cache_folder() / "tokenizers" / f"{_digest(path)}-{state}"


def _digest(path: Path) -> str:
    return sha256(bytes(path)).hexdigest()[:16]


def _keep(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Whole or not at all, and nothing else of this file. A cache: it may fail.

    Where there is no room for it, say; of that the tokenizers library says nothing narrower than
    Exception.
    """
    states = f"{folder.name.split('-')[0]}-*"
    made = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for state in folder.parent.glob(states):
            shutil.rmtree(state, ignore_errors=True)
        made = tempfile.mkdtemp(dir=folder.parent)
        tokenizer.save_pretrained(made)
        Path(made).rename(folder)
    except Exception:  # noqa: BLE001
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
