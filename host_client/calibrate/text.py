"""Text that every Python installation carries: its language reference, `pydoc_data.topics`.

Topics are dealt out alternately, and what several of them quote is left to calibration, so what
quality is judged on was never seen there.
"""

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from platform import python_version
from pydoc_data.topics import topics
from typing import Any

import torch

CALIBRATION_WINDOW = 256  # tokens
CALIBRATED_TOKENS = 6144  # of them, where nothing else is asked for
_BREAK = "\n\n"


class Split(Enum):
    CALIBRATION = 0
    HELD_OUT = 1


def default_text(split: Split) -> str:
    """Half of the language reference, topics in alphabetical order.

    No paragraph of the held-out half stands in the other one.
    """
    texts = [topics[name] for name in sorted(topics)]
    dealt = texts[split.value :: 2]
    if split is Split.HELD_OUT:  # some topics have passages, or the very text, of another one
        seen = {part for text in texts[Split.CALIBRATION.value :: 2] for part in _paragraphs(text)}
        dealt = [_BREAK.join(p for p in _paragraphs(text) if p not in seen) for text in dealt]
        dealt = [text for text in dealt if text]
    return _BREAK.join(dealt)


def _paragraphs(text: str) -> list[str]:
    return text.strip("\n").split(_BREAK)


def text_name(split: Split) -> str:
    """What `default_text` is, for reports."""
    half = "first" if split is Split.CALIBRATION else "second"
    return f"Python {python_version()}'s language reference, the {half} of every two topics"


def token_windows(tokenizer: Any, text: str, tokens: int, window: int) -> list[torch.Tensor]:
    """The first `tokens` tokens of `text` in windows: int64 [1, up to window] each.

    Raises ValueError when the text is shorter than that.
    """
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0, :tokens]
    if ids.numel() < tokens:
        raise ValueError(f"the text has {ids.numel()} tokens; {tokens} were asked for")
    return [part.unsqueeze(0) for part in ids.split(window) if part.numel() > 1]


def calibration_windows(tokenizer: Any, tokens: int, files: Sequence[Path] = ()) -> torch.Tensor:
    """Whole windows of the user's files, or of the calibration half: int64 [windows, tokens].

    Raises ValueError when the text is shorter than that.
    """
    text = "\n\n".join(file.read_text(errors="replace") for file in files)
    return _whole_windows(tokenizer, text or default_text(Split.CALIBRATION), tokens)


def held_out_windows(tokenizer: Any, tokens: int) -> torch.Tensor:
    """Whole windows of the other half."""
    return _whole_windows(tokenizer, default_text(Split.HELD_OUT), tokens)


def _whole_windows(tokenizer: Any, text: str, tokens: int) -> torch.Tensor:
    window = min(CALIBRATION_WINDOW, tokens)
    return torch.cat(token_windows(tokenizer, text, tokens - tokens % window, window))
