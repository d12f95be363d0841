"""Where the drive keeps what it remembers of itself: the folder `logs` of the media folder.

    logs/life.csd       one sealed line: counters, and whether the drive was closed
    logs/records.csd    one sealed line an error or event, appended; bounded

A sealed line is the CRC32C of a JSON object in hexadecimal, a space, the object. `life.csd` is
replaced by rename, so a crash leaves the old or the new one. Records reach the system as they
happen; a line that is torn or damaged is left out when they are read. What cannot be read never
stops a drive from opening, and what cannot be written never fails a command: `damage` and
`write_error` say so instead.
"""

import json
import os
from pathlib import Path
from typing import Any

from csd_protocol.crc32c import crc32c

FOLDER_NAME = "logs"
LIFE_NAME, RECORDS_NAME = "life.csd", "records.csd"
RECORDS_MAX = 4096  # lines of the file, before it is written anew with those still wanted


class LogFolder:
    """Reads once when made, then writes."""

    def __init__(self, media_path: Path) -> None:
        self._folder = media_path / FOLDER_NAME
        self.damage: list[str] = []
        self.write_error: str | None = None
        self.life = self._read_life()
        self.records = self._read_records()
        self._record_count = len(self.records)
        self._file: int | None = None

    def save_life(self, life: dict[str, Any], durable: bool) -> None:
        """Replaces what was saved; `durable`: it then survives a loss of the machine's power."""
        try:
            self._replace(LIFE_NAME, _seal(life), durable)
        except OSError as error:
            self.write_error = str(error)

    @property
    def is_full(self) -> bool:
        """Whether the records should be written anew."""
        return self._record_count >= RECORDS_MAX

    def append(self, record: dict[str, Any]) -> None:
        """One record more."""
        try:
            if self._file is None:
                self._folder.mkdir(exist_ok=True)
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                self._file = os.open(self._folder / RECORDS_NAME, flags, 0o644)
            rest = memoryview(_seal(record))
            while rest:
                rest = rest[os.write(self._file, rest) :]
            self._record_count += 1
        except OSError as error:
            self.write_error = str(error)

    def rewrite(self, records: list[dict[str, Any]]) -> None:
        """These records in place of all."""
        self.close()
        try:
            self._replace(RECORDS_NAME, b"".join(map(_seal, records)), durable=True)
        except OSError as error:
            self.write_error = str(error)
        self._record_count = len(records)

    def close(self) -> None:
        """Nothing is open any more; the next record opens the file again."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _replace(self, name: str, data: bytes, durable: bool) -> None:
        """The file has the old content or `data`. Raises OSError."""
        self._folder.mkdir(exist_ok=True)
        path = self._folder / name
        fresh = path.with_name(name + ".new")
        with open(fresh, "wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(fresh, path)
        if durable:
            folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _read_life(self) -> dict[str, Any] | None:
        """None: there is none, or none that can be read."""
        data = self._read(LIFE_NAME)
        if data is None:
            return None
        life = _unseal(data)
        if life is None:
            self.damage.append(f"{LIFE_NAME} is damaged; the drive's counters start anew")
        return life

    def _read_records(self) -> list[dict[str, Any]]:
        lines = (self._read(RECORDS_NAME) or b"").splitlines()
        records = [record for record in map(_unseal, lines) if record is not None]
        if len(records) != len(lines):
            lost = len(lines) - len(records)
            self.damage.append(f"{RECORDS_NAME}: {lost} of {len(lines)} records are damaged")
        return records

    def _read(self, name: str) -> bytes | None:
        try:
            return (self._folder / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self.damage.append(f"{name}: {error}")
            return None


def _seal(value: dict[str, Any]) -> bytes:
    text = json.dumps(value, separators=(",", ":")).encode()
    return b"%08x %s\n" % (crc32c(text), text)


def _unseal(line: bytes) -> dict[str, Any] | None:
    """None for what is no whole line of ours."""
    code, _, text = line.strip().partition(b" ")
    try:
        if int(code, 16) != crc32c(text):
            return None
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
