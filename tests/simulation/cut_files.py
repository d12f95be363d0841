"""Files of a media folder on a power supply: `os` as the FTL's modules see it, and `Path.open`.

Whatever the FTL keeps in files it writes with functions of `os` and with methods of Path; this
stands in for both. Every change of a file is an operation of the supply. A change since the file's
last fsync may be lost when power goes (of what was appended, any part of the end), and so may a
rename since the last fsync of its folder. Reading costs nothing and is never cut.
"""

import os
import pkgutil
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import pytest

import csd_device.ftl
from csd_device.nand.faults.power_loss import PowerSupply

_FLAGS = {
    "wb": os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
    "xb": os.O_WRONLY | os.O_CREAT | os.O_EXCL,
    "ab": os.O_WRONLY | os.O_CREAT | os.O_APPEND,
    "r+b": os.O_RDWR,
}


class CutStream:
    """An unbuffered file that was opened for writing."""

    def __init__(self, files: "CutFiles", file: int) -> None:
        self._files = files
        self._file = file

    def write(self, data: Any) -> int:
        rest = memoryview(data)
        while rest:
            rest = rest[self._files.write(self._file, rest) :]
        return len(data)

    def seek(self, offset: int) -> int:
        return os.lseek(self._file, offset, os.SEEK_SET)

    def tell(self) -> int:
        return os.lseek(self._file, 0, os.SEEK_CUR)

    def flush(self) -> None: ...

    def fileno(self) -> int:
        return self._file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close(self._file)


class CutFiles:
    """Passes on what it does not name. `close_all` is what the end of a process does."""

    def __init__(self, supply: PowerSupply) -> None:
        self._supply = supply
        self._paths: dict[int, Path] = {}  # of files and folders that are open
        self._synced: dict[Path, bytes] = {}  # of files that have changed since: what they had
        self._renames: list[tuple[Path, bytes | None, Path, bytes]] = []
        supply.plug(self._lose)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_TRUNC and Path(path).exists():
            self._change(Path(path))
        file = os.open(path, flags, mode)
        self._paths[file] = Path(path)
        return file

    def open_path(self, path: Path, mode: str = "r", *arguments: Any, **words: Any) -> Any:
        """Path.open; what writes has to be binary."""
        if mode.startswith("r") and "+" not in mode:
            return open(path, mode, *arguments, **words)
        return CutStream(self, self.open(path, _FLAGS[mode], 0o644))

    def close(self, file: int) -> None:
        self._paths.pop(file, None)
        os.close(file)

    def write(self, file: int, data: Any) -> int:
        whole = self._begin(file)
        done = os.write(file, data if whole else data[: self._supply.part_of(len(data))])
        return done if whole else self._off()

    def pwrite(self, file: int, data: Any, offset: int) -> int:
        whole = self._begin(file)
        part = data if whole else data[: self._supply.part_of(len(data))]
        done = os.pwrite(file, part, offset)
        return done if whole else self._off()

    def ftruncate(self, file: int, length: int) -> None:
        if not self._begin(file):
            self._off()
        os.ftruncate(file, length)

    def replace(self, old: Any, new: Any) -> None:
        if not self._supply.begin():
            self._off()
        source, target = Path(old), Path(new)
        before = target.read_bytes() if target.exists() else None
        self._renames.append((target, before, source, source.read_bytes()))
        os.replace(old, new)
        self._synced.pop(target, None)
        if source in self._synced:
            self._synced[target] = self._synced.pop(source)

    def fsync(self, file: int) -> None:
        if not self._supply.begin():
            self._off()
        os.fsync(file)
        path = self._paths[file]
        if path.is_dir():
            self._renames.clear()
        self._synced.pop(path, None)

    fdatasync = fsync

    def close_all(self) -> None:
        for file in list(self._paths):
            self.close(file)

    def _begin(self, file: int) -> bool:
        whole = self._supply.begin()
        self._change(self._paths[file])
        return whole

    def _change(self, path: Path) -> None:
        if path not in self._synced:
            self._synced[path] = path.read_bytes()

    def _off(self) -> int:
        self._supply.go_off()
        raise AssertionError("a supply that goes off raises")

    def _lose(self, rate: float) -> None:
        for path, synced in self._synced.items():
            if self._supply.losses(1, rate)[0]:
                _put(path, self._left_of(path.read_bytes(), synced))
        self._synced.clear()
        while self._renames and self._supply.losses(1, rate)[0]:
            target, before, source, content = self._renames.pop()
            _put(source, content)
            if before is None:
                target.unlink()
            else:
                _put(target, before)
        self._renames.clear()

    def _left_of(self, changed: bytes, synced: bytes) -> bytes:
        if not changed.startswith(synced):
            return synced
        return changed[: len(synced) + self._supply.part_of(len(changed) - len(synced))]


def _put(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)


def modules_with_files() -> list[ModuleType]:
    """The FTL's modules that use `os`."""
    package = csd_device.ftl
    names = (item.name for item in pkgutil.iter_modules(package.__path__, package.__name__ + "."))
    return [module for module in map(import_module, names) if hasattr(module, "os")]


def plug_files(patch: pytest.MonkeyPatch, supply: PowerSupply) -> CutFiles:
    """The FTL's files are on this supply until the patch is undone."""
    files = CutFiles(supply)
    for module in modules_with_files():
        patch.setattr(module, "os", files)
    patch.setattr(Path, "open", lambda path, *rest, **words: files.open_path(path, *rest, **words))
    patch.setattr(Path, "replace", lambda path, target: files.replace(path, target))
    return files
