"""Text that every Python installation carries: its language reference, `pydoc_data.topics`.

Topics are dealt out alternately, so what quality is judged on was never seen in calibration.
"""

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

CALIBRATION_WINDOW = 256  # tokens
CALIBRATED_TOKENS = 6144  # of them, where nothing else is asked for


class Split(Enum):
    CALIBRATION = 0
    HELD_OUT = 1


def default_text(split: Split) -> str:
    """Half of the language reference, topics in alphabetical order."""
    texts = [topics[name] for name in sorted(topics)]
    dealt = texts[split.value :: 2]
    if split is Split.HELD_OUT:  # some topics have the very text of another one
        calibrated = set(texts[Split.CALIBRATION.value :: 2])
        dealt = [text for text in dealt if text not in calibrated]
    return "\n\n".join(dealt)


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
