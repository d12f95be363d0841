"""Where figures of quality come from: what it takes to get them again. No dice take part."""

import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from platform import python_version

import torch
from pydantic import BaseModel

from host_client.calibrate.text import Split, text_name

_PACKAGES = ("flash-csd", "numpy", "torch", "transformers")


class Provenance(BaseModel):
    """Through a drive nothing is calibrated here: its programs were, when they were built."""

    measured: str  # `in the lab` or `through a drive`
    held_out_text: str
    held_out_sha256: str  # of the token ids, int64
    calibration_text: str | None
    calibration_tokens: int
    arithmetic: str  # factors of matrix products
    resident_share: float | None  # of FFN units, held by the host; None: as its plan has it
    dram: str | None  # the host's budget
    versions: dict[str, str]


def provenance_of(
    held_out: torch.Tensor,
    seen: torch.Tensor | None = None,
    files: Sequence[str] = (),
    arithmetic: str = "float32",
    resident_share: float | None = None,
    dram: str | None = None,
) -> Provenance:
    """held_out, seen: token ids; `files` that were calibrated on in place of Python's own text."""
    calibrated = ", ".join(files) or text_name(Split.CALIBRATION)
    return Provenance(
        measured="in the lab" if dram is None else "through a drive",
        held_out_text=text_name(Split.HELD_OUT),
        held_out_sha256=hashlib.sha256(held_out.numpy().tobytes()).hexdigest(),
        calibration_text=None if seen is None else calibrated,
        calibration_tokens=0 if seen is None else seen.numel(),
        arithmetic=arithmetic,
        resident_share=resident_share,
        dram=dram,
        versions={"python": python_version()} | {name: version(name) for name in _PACKAGES},
    )
