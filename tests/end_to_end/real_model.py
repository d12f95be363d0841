"""What the end-to-end tests run: the daemon and `csd` as processes, and plain transformers.

Every wait has a deadline, and nothing here or in the tests asserts how long something took.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest
import torch

MODEL = "smollm2-135m"
BUDGET = "45%"
NEW_TOKENS = 64
DEADLINE_S = 120.0
SCRIPTS = Path(sys.executable).parent
PRELOADED = Path(__file__).with_name("preloaded_csd.py")

PROMPTS = (
    "What is a solid-state drive, in three sentences?",
    "Write a short poem about the sea.",
    "def fibonacci(n):\n    ",
    "The capital of France is",
    "Explain why the sky is blue, to a child of seven years.",
)
RAW = (2, 3)  # of PROMPTS: as they are; the others through the chat template


def await_true(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"never came: {what}"
        threading.Event().wait(0.05)


# ---- the drive -------------------------------------------------------------------------------


class Device:
    """`csd-device serve` on a folder of media, at a socket that stays the same over restarts."""

    def __init__(self, media: Path, drive: str = "edge-gen5", *options: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="csd-e2e-"))
        self.media = media
        self.address = f"unix:{self.folder / 's'}"
        self.window = Path()
        self._command = [
            *(str(SCRIPTS / "csd-device"), "serve", "--drive", drive, "--media", str(media)),
            *("--listen", self.address, "--time", "virtual", *options),
        ]
        self.process = self._started()

    def _started(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready: "), line
        self.window = Path(line.rpartition(", window ")[2].strip())
        return process

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        self.end_process()
        self.process = self._started()

    def end_process(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(DEADLINE_S)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def leave_media(self) -> None:
        """Ends the daemon; the media stay, for copies."""
        self.end_process()
        self.window.unlink(missing_ok=True)  # a killed daemon leaves it to the next one
        shutil.rmtree(self.folder)

    def close(self) -> None:
        self.leave_media()
        shutil.rmtree(self.media)


def copy_media(source: Path, target: Path) -> Path:
    """A copy that stays sparse: the image is as long as the drive's flash is large."""
    subprocess.run(["cp", "-r", "--sparse=always", str(source), str(target)], check=True)
    return target


def flip_bit(image: Path, data: bytes) -> None:
    """In the only place of a sparse file where the first block's worth of `data` lies."""
    place, held, chunk_bytes = 0, image.open("r+b"), 64 << 20
    with held as file:
        while chunk := data_at(file.fileno(), place, chunk_bytes):
            start, read = chunk
            found = read.find(data[:1024])
            if found >= 0:
                file.seek(start + found)
                file.write(bytes([data[0] ^ 1]))
                return
            place = start + max(1, len(read) - len(data))
    pytest.fail("the unit is nowhere on the flash")


def data_at(descriptor: int, place: int, length: int) -> tuple[int, bytes] | None:
    """The next data of a sparse file: where it starts, and at most `length` bytes of it."""
    try:
        start = os.lseek(descriptor, place, os.SEEK_DATA)
    except OSError:  # ENXIO: nothing but a hole up to the end
        return None
    return start, os.pread(descriptor, length, start)


# ---- the command line ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Finished:
    """What a run of `csd` left behind."""

    status: int
    stdout: str
    stderr: str

    @property
    def answer(self) -> dict[str, Any]:
        """The one JSON object of a run that succeeded."""
        assert self.status == 0, self.stderr
        (line,) = self.stdout.splitlines()
        return json.loads(line)

    def refused(self, status: int) -> str:
        """The message of a run that was refused, on one line and without colours."""
        assert "Traceback" not in self.stderr, self.stderr
        assert self.status == status, (self.status, self.stderr)
        assert self.stdout == ""
        return " ".join(self.stderr.split())


@dataclass
class CommandLine:
    """Runs `csd` as processes of their own (see `preloaded_csd`), one after the other."""

    folder: Path
    server: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        self.server = subprocess.Popen(
            [sys.executable, str(PRELOADED)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *arguments: object, drive: Device | str | None = None) -> Finished:
        """`drive` goes to the run as $CSD_DRIVE."""
        address = drive.address if isinstance(drive, Device) else drive
        stdout, stderr = self.folder / "stdout", self.folder / "stderr"
        process = self._ask(
            {
                "start": [str(argument) for argument in arguments],
                "stdout": str(stdout),
                "stderr": str(stderr),
                "environment": {"CSD_DRIVE": address or "", "XDG_CACHE_HOME": str(self.folder)},
            }
        )
        status = self._ask({"wait": process})
        return Finished(status, stdout.read_text(), stderr.read_text())

    def _ask(self, request: dict[str, Any]) -> int:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def close(self) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(DEADLINE_S)


class Running:
    """The script `csd` at work, with its output on pipes; to be interrupted somehow."""

    def __init__(self, device: Device, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [str(SCRIPTS / "csd"), *arguments],
            env={**os.environ, "CSD_DRIVE": device.address},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @classmethod
    def generation(cls, device: Device) -> Self:
        """A long one."""
        asked = ("--prompt", PROMPTS[0], "--dram", BUDGET, "--max-new-tokens", "512")
        return cls(device, "generate", MODEL, *asked)

    def await_text(self) -> str:
        """The first words; from then on it is in the middle of its generation."""
        assert self.process.stdout is not None
        text = self.process.stdout.read(12)
        assert len(text) == 12, self.finished()
        assert self.process.poll() is None
        return text

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def finished(self) -> Finished:
        stdout, stderr = self.process.communicate(timeout=DEADLINE_S)
        return Finished(self.process.returncode, stdout, stderr)


# ---- plain transformers ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spoken:
    """What plain transformers generates. tokens [NEW_TOKENS]; logits float32 [NEW_TOKENS, V]."""

    prompt: torch.Tensor  # int64 [1, tokens]
    tokens: list[int]
    logits: torch.Tensor


@dataclass(frozen=True, slots=True)
class Reference:
    """The dense model's answers to PROMPTS, and its 16-bit weights as a sharded folder."""

    spoken: tuple[Spoken, ...]
    folder: Path


def speak(model: Any, prompt: torch.Tensor) -> Spoken:
    """Greedy, exactly NEW_TOKENS tokens."""
    with torch.inference_mode():
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    tokens = output.sequences[0, prompt.shape[1] :].tolist()
    return Spoken(prompt, tokens, torch.cat(output.logits))


# ---- the packed model ------------------------------------------------------------------------


def generate(csd: CommandLine, device: Device, *options: str) -> dict[str, Any]:
    asked = ("--prompt", PROMPTS[0], "--dram", BUDGET, "--max-new-tokens", "16", "--json")
    return csd("generate", MODEL, *asked, *options, drive=device).answer
