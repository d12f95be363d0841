"""The programs on the drive: uploaded in chunks, kept in the media folder, loaded into DRAM.

    programs/index.json             {"programs": {"<id>": {"active": bool}}}
    programs/<id>.safetensors       as the host sent it

A file counts once the index names it; both are replaced by rename, so a crash leaves the old or the
new. A program takes its file's size of on-drive DRAM from the first chunk on. A load over an
existing program unloads that one first, so that two never need DRAM at once.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from csd_device.compute import Program, load_program
from csd_device.dram import Arena
from csd_device.errors import CommandError, DramExceeded
from csd_device.firmware.commands import LoadProgram
from csd_protocol.status import Status
from csd_protocol.units import format_size

PROGRAM_ID_MAX = 255
UPLOADS_MAX = 4
_INDEX = "index.json"


@dataclass(slots=True)
class StoredProgram:
    """A loaded program and whether commands may run it."""

    program: Program
    active: bool


@dataclass(slots=True)
class _Upload:
    data: npt.NDArray[np.uint8]  # [total bytes]
    received_bytes: int = 0


class ProgramStore:
    """Programs by identifier, 0 to 255."""

    def __init__(self, folder: Path, arena: Arena) -> None:
        """Loads what the folder holds; what cannot be loaded is named in `refused`."""
        self._folder = folder
        self._arena = arena
        self._stored: dict[int, StoredProgram] = {}
        self._uploads: dict[int, _Upload] = {}
        self.refused: list[CommandError] = []
        folder.mkdir(parents=True, exist_ok=True)
        for number, active in self._read_index().items():
            self._restore(number, active)

    def active(self, number: int) -> Program:
        """The program, ready to run. Raises CommandError: No Program, Program Not Activated."""
        stored = self._loaded(number)
        if not stored.active:
            raise CommandError(Status.PROGRAM_NOT_ACTIVATED, f"program {number} is not active")
        return stored.program

    def loaded(self) -> dict[int, StoredProgram]:
        """All programs by identifier, ascending."""
        return dict(sorted(self._stored.items()))

    def receive(self, command: LoadProgram) -> bool:
        """Takes one chunk; True when it was the last and the program is loaded, not yet active.

        Raises CommandError: Command Sequence Error for a chunk out of order, Program Too Big,
        Insufficient Program Resources with figures, Invalid Program Data or Type.
        """
        _check_number(command.program)
        if command.offset_bytes == 0:
            self._begin(command.program, command.total_bytes)
        upload = self._uploads.get(command.program)
        if upload is None or not _continues(upload, command):
            self._abandon(command.program)
            raise CommandError(
                Status.SEQUENCE_ERROR,
                f"program {command.program}: a chunk at byte {command.offset_bytes} of "
                f"{command.total_bytes} does not follow the last. Begin again at 0",
            )
        end = command.offset_bytes + len(command.chunk)
        upload.data[command.offset_bytes : end] = np.frombuffer(command.chunk, np.uint8)
        upload.received_bytes = end
        if end < upload.data.size:
            return False
        self._complete(command.program, upload)
        return True

    def set_active(self, number: int, active: bool) -> None:
        """Raises CommandError (No Program)."""
        stored = self._loaded(number)
        if stored.active != active:
            stored.active = active
            self._write_index()

    def unload(self, number: int) -> None:
        """Raises CommandError (No Program)."""
        self._loaded(number)
        self._drop(number)

    def _loaded(self, number: int) -> StoredProgram:
        _check_number(number)
        stored = self._stored.get(number)
        if stored is None:
            known = ", ".join(map(str, sorted(self._stored))) or "none"
            raise CommandError(Status.NO_PROGRAM, f"no program {number}; loaded: {known}")
        return stored

    def _begin(self, number: int, total_bytes: int) -> None:
        self._abandon(number)
        if number in self._stored:
            self._drop(number)
        if len(self._uploads) >= UPLOADS_MAX:
            raise CommandError(
                Status.INSUFFICIENT_PROGRAM_RESOURCES,
                f"{UPLOADS_MAX} programs are being loaded already",
            )
        self._reserve(number, total_bytes)
        self._uploads[number] = _Upload(np.empty(total_bytes, np.uint8))

    def _reserve(self, number: int, size_bytes: int) -> None:
        if size_bytes > self._arena.total_bytes:
            raise CommandError(
                Status.PROGRAM_TOO_BIG,
                f"program {number} of {format_size(size_bytes)}; on-drive DRAM is "
                f"{format_size(self._arena.total_bytes)} in all",
            )
        try:
            self._arena.allot(_allotment(number), size_bytes)
        except DramExceeded as error:
            raise CommandError(Status.INSUFFICIENT_PROGRAM_RESOURCES, error.detail) from error

    def _complete(self, number: int, upload: _Upload) -> None:
        try:
            program = load_program(upload.data)
        except CommandError:
            self._abandon(number)
            raise
        del self._uploads[number]
        try:
            _replace(self._path(number), upload.data)
        except CommandError:
            self._arena.free(_allotment(number))
            raise
        self._stored[number] = StoredProgram(program, active=False)
        self._write_index()

    def _abandon(self, number: int) -> None:
        """Gives an unfinished upload's DRAM back."""
        if self._uploads.pop(number, None) is not None:
            self._arena.free(_allotment(number))

    def _drop(self, number: int) -> None:
        del self._stored[number]
        self._arena.free(_allotment(number))
        self._write_index()
        self._path(number).unlink(missing_ok=True)

    def _restore(self, number: int, active: bool) -> None:
        try:
            data = np.fromfile(self._path(number), np.uint8)
            self._reserve(number, data.size)
        except OSError as error:
            self.refused.append(
                CommandError(Status.INVALID_PROGRAM_DATA, f"program {number}: {error}")
            )
            return
        except CommandError as error:
            self.refused.append(error)
            return
        try:
            self._stored[number] = StoredProgram(load_program(data), active)
        except CommandError as error:
            self._arena.free(_allotment(number))
            self.refused.append(error)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number}.safetensors"

    def _read_index(self) -> dict[int, bool]:
        """Activation by identifier; empty for an index that is not there or not readable."""
        try:
            programs = json.loads((self._folder / _INDEX).read_bytes())["programs"]
            return {int(number): bool(entry["active"]) for number, entry in programs.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self.refused.append(
                CommandError(Status.INVALID_PROGRAM_DATA, f"programs/{_INDEX}: {error!r}")
            )
            return {}

    def _write_index(self) -> None:
        entries = {str(number): {"active": item.active} for number, item in self.loaded().items()}
        text = json.dumps({"programs": entries}, indent=1).encode()
        _replace(self._folder / _INDEX, np.frombuffer(text, np.uint8))


def _allotment(number: int) -> str:
    return f"program.{number}"


def _check_number(number: int) -> None:
    if not 0 <= number <= PROGRAM_ID_MAX:
        raise CommandError(
            Status.INVALID_PROGRAM_INDEX, f"program {number}; identifiers go to {PROGRAM_ID_MAX}"
        )


def _continues(upload: _Upload, command: LoadProgram) -> bool:
    return (
        command.total_bytes == upload.data.size
        and command.offset_bytes == upload.received_bytes
        and 0 < len(command.chunk) <= upload.data.size - upload.received_bytes
    )


def _replace(path: Path, data: npt.NDArray[np.uint8]) -> None:
    """Writes the file so that a crash leaves the old or the new one. Raises CommandError."""
    partial = path.with_name(path.name + ".part")
    try:
        with partial.open("wb") as file:
            file.write(data.data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise CommandError(Status.WRITE_FAULT, f"{path}: {error}") from error
