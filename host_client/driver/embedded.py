"""A daemon of the host's own: started, awaited and ended with it.

The daemon's standard input is a pipe whose other end this process holds, so that however this
process ends, also by kill -9, the daemon sees the end of file and stops cleanly.
"""

import atexit
import fcntl
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, Self

from host_client.driver.errors import DriveUnavailable

_STOP_TIMEOUT_S = 20.0
_SAID_LINES_MAX = 12


class Daemon:
    """`csd-device serve` as a child process, listening on a socket in a folder of its own."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        self.address = _socket_address(folder)
        self.pid = process.pid
        self._process = process
        self._folder = folder
        self._window: Path | None = None
        atexit.register(self.stop)

    @classmethod
    def start(cls, media: Path, drive: str, time: str, start_timeout_s: float) -> Self:
        """Returns once it serves. Raises DriveUnavailable with what it said when it does not."""
        media.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="csd-"))
        with (folder / "stderr").open("wb") as said:
            process = subprocess.Popen(
                _command_line(folder, media, drive, time),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                start_new_session=True,  # a Ctrl-C in the terminal is the host's to handle
            )
        daemon = cls(process, folder)
        try:
            daemon._await_ready(start_timeout_s)
        except DriveUnavailable:
            daemon.stop()
            raise
        return daemon

    def stop(self) -> None:
        """Asks it to stop and waits; kills it when it does not. Again: does nothing."""
        atexit.unregister(self.stop)
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._window is not None:
            _remove_orphan(self._window)

    def _await_ready(self, timeout_s: float) -> None:
        """Its first line says that it serves; the end of its output that it will not."""
        lines: list[bytes] = []
        assert self._process.stdout is not None
        reader = threading.Thread(
            target=_read_line, args=(self._process.stdout, lines), daemon=True, name="csd-daemon"
        )
        reader.start()
        reader.join(timeout_s)
        if not lines:
            self._process.kill()
            self._process.wait()
            raise DriveUnavailable(f"the daemon was not ready within {timeout_s:g} s{self._said()}")
        if not lines[0]:
            self._process.wait()
            raise DriveUnavailable(f"the daemon did not start{self._said()}")
        self._window = Path(lines[0].decode().rpartition(", window ")[2].strip())

    def _said(self) -> str:
        text = (self._folder / "stderr").read_text(errors="replace").strip()
        lines = text.splitlines()[-_SAID_LINES_MAX:]
        return ": " + "\n".join(lines) if lines else ""


def _socket_address(folder: Path) -> str:
    return f"unix:{folder / 'csd.sock'}"


def _command_line(folder: Path, media: Path, drive: str, time: str) -> list[str]:
    return [
        *(sys.executable, "-m", "csd_device.service", "serve"),
        *("--drive", drive, "--media", str(media), "--time", time),
        *("--listen", _socket_address(folder), "--stop-with-stdin"),
    ]


def _remove_orphan(window: Path) -> None:
    """Removes the window of a daemon that was killed; one that a daemon holds locked stays."""
    try:
        with window.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            window.unlink(missing_ok=True)
    except (FileNotFoundError, BlockingIOError):
        return


def _read_line(pipe: IO[bytes], lines: list[bytes]) -> None:
    lines.append(pipe.readline())
