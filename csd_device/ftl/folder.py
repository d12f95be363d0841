"""The folder that is a drive's media: one daemon at a time, one geometry for good.

drive.csd/
    lock                flock of the daemon that has it open; its process id
    header.json         format version, geometry, capacity
    nand.img            the cells, sparse
    patterns.img        sectors that are made and not stored (csd_device.nand.patterns)
    patterns.map        where those are, sparse
    mapping.checkpoint  mapping and superblocks (csd_device.ftl.journal)
    mapping.journal     what changed since
"""

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from csd_device.config import DriveConfig
from csd_device.errors import DriveRefused

FORMAT = "csd-media"
FORMAT_VERSION = 2
HEADER_NAME = "header.json"
NAND_NAME = "nand.img"


class MediaFolder:
    """An open, locked media folder whose header agrees with the configuration."""

    def __init__(self, path: Path, lock_file: int) -> None:
        """Use `open`."""
        self.path = path
        self._lock_file = lock_file

    @classmethod
    def open(cls, path: Path, config: DriveConfig) -> Self:
        """Makes the folder, or checks the one that is there.

        Raises DriveRefused: not a folder, held by another process (named), another format
        version, geometry or capacity (both named), no media folder at all.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock_file = _lock(path)
        except OSError as error:
            raise DriveRefused(f"media folder {path} cannot be opened: {error}") from error
        try:
            _check_header(path, config)
        except DriveRefused:
            os.close(lock_file)
            raise
        return cls(path, lock_file)

    @property
    def nand_path(self) -> Path:
        return self.path / NAND_NAME

    def close(self) -> None:
        """Gives the lock back."""
        os.close(self._lock_file)


def replace_file(path: Path, parts: Iterable[bytes]) -> None:
    """The file has the old content or these parts, whatever happens; durable on return."""
    fresh = path.with_name(path.name + ".new")
    file = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        for part in parts:
            write_all(file, part)
        os.fsync(file)
    finally:
        os.close(file)
    os.replace(fresh, path)
    sync_folder(path.parent)


def write_all(file: int, data: bytes) -> None:
    """write(2) until all is written."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]


def sync_folder(path: Path) -> None:
    """Makes names that were created or replaced in a folder durable."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _lock(path: Path) -> int:
    file = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(file, 32, 0).decode(errors="replace").strip()
        os.close(file)
        raise DriveRefused(
            f"media folder {path} is in use by process {holder or '(unknown)'}: "
            "stop that daemon or use another folder"
        ) from None
    os.ftruncate(file, 0)
    os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
    return file


def _header_of(config: DriveConfig) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "geometry": config.geometry.model_dump(),
        "capacity_sectors": config.capacity_sectors,
    }


def _check_header(path: Path, config: DriveConfig) -> None:
    expected = _header_of(config)
    found = _read_header(path)
    if found is None:
        replace_file(path / HEADER_NAME, [json.dumps(expected, indent=2).encode()])
        return
    remedies = {
        "version": "Remove the folder and pack the models again, or use the version that made it",
        "geometry": "Use the drive it was made with, or another folder",
    }
    for field, title in (("version", "format version"), ("geometry", "geometry")):
        if found.get(field) != expected[field]:
            raise DriveRefused(
                f"media folder {path} was made with {title} {found.get(field)}; "
                f"this drive has {expected[field]}. {remedies[field]}"
            )
    if found != expected:
        raise DriveRefused(
            f"media folder {path} has {found.get('capacity_sectors')} logical blocks; "
            f"this drive has {expected['capacity_sectors']} (over-provisioning differs)"
        )


def _read_header(path: Path) -> dict[str, Any] | None:
    """The header, None in a new folder. Raises DriveRefused for what is no media folder."""
    try:
        found = json.loads((path / HEADER_NAME).read_bytes())
    except FileNotFoundError:
        others = sorted({item.name for item in path.iterdir()} - {"lock", HEADER_NAME + ".new"})
        if others:
            raise DriveRefused(
                f"{path} is no media folder: it has {others[0]!r} but no {HEADER_NAME}"
            ) from None
        return None
    except (OSError, ValueError) as error:
        raise DriveRefused(f"{path / HEADER_NAME} cannot be read: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise DriveRefused(f"{path / HEADER_NAME} is no header of a media folder")
    return found
