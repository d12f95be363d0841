"""Files of a media folder on a power supply: `os`, as the FTL's modules see it.

Whatever the FTL keeps in files it writes with functions of `os`; this stands in for that module.
Every change of a file is an operation of the supply. A change since the file's last fsync may be
lost when power goes (of what was appended, any part of the end), and so may a rename since the last
fsync of its folder. Reading costs nothing and is never cut.
"""

import os
import pkgutil
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import csd_device.ftl
from csd_device.nand.faults.power_loss import PowerSupply


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
                path.write_bytes(self._left_of(path.read_bytes(), synced))
        self._synced.clear()
        while self._renames and self._supply.losses(1, rate)[0]:
            target, before, source, content = self._renames.pop()
            source.write_bytes(content)
            if before is None:
                target.unlink()
            else:
                target.write_bytes(before)
        self._renames.clear()

    def _left_of(self, changed: bytes, synced: bytes) -> bytes:
        if not changed.startswith(synced):
            return synced
        return changed[: len(synced) + self._supply.part_of(len(changed) - len(synced))]


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
    return files
