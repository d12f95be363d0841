"""A memory limit that the kernel keeps: a control group of one's own, version 2 or 1.

A `Cgroup` is a folder beside or below the one that this process is in. A process counts from its
first instruction only if it starts inside, so `command` wraps a command line that does. What the
kernel charges to a group is what its processes touch first: anonymous memory, and pages of files
that nobody had brought in before. The drive's window is charged to the daemon, which touches all of
it when it opens; reading it charges the reader nothing.

A group is named after the process that made it. What such a process leaves behind when it is killed
is removed by the next one that makes a group.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from csd_protocol.units import format_size
from host_client.runtime.refusals import RequestRefused

PREFIX = "csd-"
VARIABLE = "CSD_CGROUP"  # in the environment of a process that was started in one
_ENTER = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
_REMEDY = (
    "Run as root where the memory controller is mounted, or in a scope that it is delegated to: "
    "systemd-run --user --scope -p Delegate=yes csd ..."
)


class NoCgroup(RequestRefused):
    """No control group that limits memory can be had here; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class _Version:
    """What the kernel calls the files of a group."""

    limit: str
    peak: str
    usage: str
    kills: str  # lines of names and counts, `oom_kill` among them
    cached: str  # the line of memory.stat with what is page cache
    no_swap: tuple[tuple[str, str | None], ...]  # files, and what to write; None: the limit


_V1 = _Version(
    limit="memory.limit_in_bytes",
    peak="memory.max_usage_in_bytes",
    usage="memory.usage_in_bytes",
    kills="memory.oom_control",
    cached="cache",
    no_swap=(("memory.swappiness", "0"), ("memory.memsw.limit_in_bytes", None)),
)
_V2 = _Version(
    limit="memory.max",
    peak="memory.peak",
    usage="memory.current",
    kills="memory.events",
    cached="file",
    no_swap=(("memory.swap.max", "0"),),
)


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """Where groups that limit memory are, and which of them this process is in."""

    version: _Version
    mount: Path
    own: Path

    @classmethod
    def find(cls, proc: Path = Path("/proc/self")) -> Self:
        """Raises NoCgroup where none is mounted."""
        for line in (proc / "mountinfo").read_text().splitlines():
            fields, _, rest = line.partition(" - ")
            kind, _, options = rest.split(" ", 2)
            root, mount = fields.split()[3:5]
            if kind == "cgroup" and "memory" in options.split(","):
                return cls(_V1, Path(mount), _own(proc, mount, root, "memory"))
            controllers = Path(mount) / "cgroup.controllers"
            if kind == "cgroup2" and "memory" in _words(controllers):
                return cls(_V2, Path(mount), _own(proc, mount, root, ""))
        raise NoCgroup(f"no cgroup filesystem with a memory controller is mounted. {_REMEDY}")

    def parents(self) -> Iterator[Path]:
        """Groups that another may be made in: the own one and those above it."""
        yield self.own
        if self.version is _V2:  # a group with processes of its own may not limit others in it
            yield from (path for path in self.own.parents if path.is_relative_to(self.mount))


class Cgroup:
    """A group that exists. Limits and counts are bytes."""

    def __init__(self, folder: Path, version: _Version) -> None:
        self.folder = folder
        self._version = version

    @classmethod
    @contextmanager
    def made(cls, hierarchy: Hierarchy, name: str = "") -> Iterator[Self]:
        """A new group for other processes, removed behind them. Raises NoCgroup."""
        reasons = []
        for parent in hierarchy.parents():
            group = cls(parent / f"{PREFIX}{os.getpid()}{name}", hierarchy.version)
            try:
                _remove_orphans(parent)
                group.folder.mkdir()
            except OSError as error:
                reasons.append(f"{parent}: {error.strerror}")
                continue
            try:
                why = group._cannot_limit()
                if why is None:
                    yield group
                    return
                reasons.append(f"{parent}: {why}")
            finally:
                group._remove()
        raise NoCgroup(f"no control group can be made ({'; '.join(reasons)}). {_REMEDY}")

    @classmethod
    def entered(cls, hierarchy: Hierarchy) -> Self:
        """The group that this process was started in by `command`. Raises NoCgroup."""
        folder = os.environ.get(VARIABLE)
        if folder != str(hierarchy.own):
            raise NoCgroup(f"this process is in {hierarchy.own}, and should be in {folder}")
        return cls(hierarchy.own, hierarchy.version)

    def command(self, words: list[str]) -> list[str]:
        """A command line that is in this group from its first instruction on."""
        return ["/bin/sh", "-c", _ENTER, str(self.folder), *words]

    def limit(self, size_bytes: int) -> None:
        """At most so much memory and no swap from here on. Raises NoCgroup."""
        try:
            self._write(self._version.limit, str(size_bytes))
            for name, value in self._version.no_swap:
                with suppress(FileNotFoundError):  # no swap is counted, or there is none
                    self._write(name, value or str(size_bytes))
        except OSError as error:
            raise NoCgroup(
                f"{self.folder} cannot be limited to {format_size(size_bytes)} "
                f"({format_size(self.usage_bytes)} are in use): {error.strerror}"
            ) from error

    @property
    def usage_bytes(self) -> int:
        return int(self._read(self._version.usage))

    @property
    def kept_bytes(self) -> int:
        """What is in use without page cache, the first that the kernel takes back."""
        return max(0, self.usage_bytes - self._counted("memory.stat", self._version.cached))

    @property
    def peak_bytes(self) -> int:
        """The most that was in use at once since the group was made."""
        return int(self._read(self._version.peak))

    @property
    def kills(self) -> int:
        """How many of its processes the kernel ended for want of memory."""
        return self._counted(self._version.kills, "oom_kill")

    def _cannot_limit(self) -> str | None:
        """Why not; None: it can. Has the controller passed on to it where that takes asking."""
        if not (self.folder / self._version.limit).exists():
            try:
                (self.folder.parent / "cgroup.subtree_control").write_text("+memory")
            except OSError as error:
                return f"its memory controller is not passed on: {error.strerror}"
        if not (self.folder / self._version.peak).exists():
            return f"there is no {self._version.peak}; Linux 5.19 or newer has it"
        return None

    def _counted(self, name: str, what: str) -> int:
        """The count in the line of that file that begins with `what`; 0: there is none."""
        lines = (line.split() for line in self._read(name).splitlines())
        return sum(int(words[1]) for words in lines if words[0] == what)

    def _read(self, name: str) -> str:
        return (self.folder / name).read_text()

    def _write(self, name: str, value: str) -> None:
        (self.folder / name).write_text(value)

    def _remove(self) -> None:
        with suppress(OSError):  # a process in it lives on: the next run removes it
            self.folder.rmdir()


def _own(proc: Path, mount: str, root: str, controller: str) -> Path:
    """The folder of this process's group. `root`: what part of the hierarchy is mounted."""
    for line in (proc / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            inside = os.path.relpath(path, root) if Path(path).is_relative_to(root) else "."
            return Path(mount) / inside
    raise NoCgroup(f"{proc / 'cgroup'} does not name this process's group. {_REMEDY}")


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _remove_orphans(parent: Path) -> None:
    """Removes groups whose makers are gone, as far as nobody is in them."""
    for folder in parent.glob(f"{PREFIX}[0-9]*"):
        maker = folder.name.removeprefix(PREFIX).partition("-")[0]
        if not Path("/proc", maker).exists():
            with suppress(OSError):
                folder.rmdir()
