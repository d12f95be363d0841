"""fio job files: sections to jobs, in groups that run one after the other.

    parse_fio(text, source, seed) -> FioFile(groups, ignored)

Understood are the keys of `_KEYS`, with fio's units: `4k` is 4096 bytes, `30s` or `30` a runtime.
What only concerns the host's side (`ioengine`, `direct`, buffers' contents) is ignored and listed.
Any other key is refused: it would change what is measured. Random requests are drawn with
replacement, as with `norandommap`. https://fio.readthedocs.io/en/latest/fio_doc.html
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NoReturn, TypeVar

from csd_device.workload.patterns import Job, WorkloadRefused
from csd_protocol.units import GIB, KIB, MIB, NS_PER_MS, NS_PER_S, NS_PER_US, TIB

_SIZES = {"": 1, "b": 1, "k": KIB, "kb": KIB, "m": MIB, "mb": MIB, "g": GIB, "gb": GIB, "t": TIB}
_TIMES = {
    "": NS_PER_S,
    "us": NS_PER_US,
    "ms": NS_PER_MS,
    "s": NS_PER_S,
    "m": 60 * NS_PER_S,
    "h": 3600 * NS_PER_S,
}
_RW = {  # rw: (is random, share of reads; None: rwmixread says)
    "read": (False, 1.0),
    "write": (False, 0.0),
    "rw": (False, None),
    "readwrite": (False, None),
    "randread": (True, 1.0),
    "randwrite": (True, 0.0),
    "randrw": (True, None),
}
_OTHER_NAMES = {"readwrite": "rw", "blocksize": "bs", "randseed": "randseed"}
_KEYS = {
    "rw",
    "bs",
    "iodepth",
    "size",
    "io_size",
    "number_ios",
    "runtime",
    "time_based",
    "rwmixread",
    "rwmixwrite",
    "numjobs",
    "offset",
    "randseed",
    "random_distribution",
    "stonewall",
}
_IGNORED = {
    "allrandrepeat",
    "buffer_compress_percentage",
    "buffer_pattern",
    "direct",
    "filename",
    "group_reporting",
    "invalidate",
    "ioengine",
    "name",
    "norandommap",
    "randrepeat",
    "refill_buffers",
    "thread",
}
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)")
Options = dict[str, str]
T = TypeVar("T", int, float)


@dataclass(frozen=True, slots=True)
class FioFile:
    """Jobs of one group run together; groups one after the other."""

    groups: list[list[Job]]
    ignored: list[str]  # keys, in the order met


def parse_fio(text: str, source: str, seed: int) -> FioFile:
    """Raises WorkloadRefused naming section or line, key and reason."""
    sections, ignored = _sections(text, source)
    groups: list[list[Job]] = []
    for name, options in sections:
        if "stonewall" in options or not groups:
            groups.append([])
        jobs = _clones(_job(name, options, source), options, f"{source} [{name}]")
        taken = sum(map(len, groups))
        if "randseed" not in options:
            jobs = [replace(job, seed=seed + taken + at) for at, job in enumerate(jobs)]
        groups[-1] += jobs
    if not groups:
        raise WorkloadRefused(f"{source}: no job section")
    return FioFile([group for group in groups if group], ignored)


def _sections(text: str, source: str) -> tuple[list[tuple[str, Options]], list[str]]:
    """Job sections with what [global] said before them, and the keys that are ignored."""
    shared: Options = {}
    sections: list[tuple[str, Options]] = []
    current: Options | None = None
    ignored: dict[str, None] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line[0] in "#;":
            continue
        if line[0] == "[":
            name = line.strip("[]")
            current = shared if name == "global" else dict(shared)
            if name != "global":
                sections.append((name, current))
            continue
        key, _, value = (part.strip() for part in line.partition("="))
        key = _OTHER_NAMES.get(key, key)
        if current is None:
            raise WorkloadRefused(f"{source}:{number}: {key} stands before any section")
        if key in _IGNORED:
            ignored[key] = None
        elif key in _KEYS:
            current[key] = value
        else:
            raise WorkloadRefused(
                f"{source}:{number}: {key} is not understood, and would change what is measured; "
                f"understood are {', '.join(sorted(_KEYS))}"
            )
    return sections, list(ignored)


def _job(name: str, options: Options, source: str) -> Job:
    where = f"{source} [{name}]"
    is_random, share = _mix(options, where)
    size = _size(options.get("bs", "4k"), where, "bs")
    length = _size(options["size"], where, "size") if "size" in options else 0
    total = _size(options["io_size"], where, "io_size") if "io_size" in options else length
    requests = total // size or None
    if "number_ios" in options:
        stated = _whole(options["number_ios"], where, "number_ios")
        requests = min(stated, requests) if requests else stated
    runtime = _time(options["runtime"], where) if "runtime" in options else None
    if "time_based" in options:
        if runtime is None:
            _refuse(where, "time_based", "needs runtime")
        requests = None
    if requests is None and runtime is None:
        _refuse(where, "size", "is missing, as are io_size, number_ios and runtime: it has no end")
    return Job(
        name=name,
        read_share=share,
        is_random=is_random,
        size_bytes=size,
        depth=_whole(options.get("iodepth", "1"), where, "iodepth"),
        offset_bytes=_size(options.get("offset", "0"), where, "offset"),
        length_bytes=length,
        requests=requests,
        duration_ns=runtime,
        zipf_theta=_zipf_theta(options.get("random_distribution", "random"), where),
        seed=_whole(options.get("randseed", "1"), where, "randseed"),
    )


def _mix(options: Options, where: str) -> tuple[bool, float]:
    """Whether requests are random, and the share of reads."""
    kind = options.get("rw", "read")
    if kind not in _RW:
        _refuse(where, "rw", f"is {kind}; there are {', '.join(_RW)}")
    is_random, share = _RW[kind]
    if share is not None:
        return is_random, share
    if "rwmixwrite" in options:
        return is_random, 1 - _percent(options["rwmixwrite"], where, "rwmixwrite")
    return is_random, _percent(options.get("rwmixread", "50"), where, "rwmixread")


def _clones(job: Job, options: Options, where: str) -> list[Job]:
    count = _whole(options.get("numjobs", "1"), where, "numjobs")
    if count == 1:
        return [job]
    return [replace(job, name=f"{job.name}.{at}", seed=job.seed + at) for at in range(count)]


def _zipf_theta(text: str, where: str) -> float | None:
    kind, _, theta = text.partition(":")
    if kind == "random":
        return None
    if kind != "zipf":
        _refuse(where, "random_distribution", f"is {text}; random and zipf:theta are understood")
    return _converted(float, theta or "1.2", where, "random_distribution")


def _size(text: str, where: str, key: str) -> int:
    return _with_unit(text, _SIZES, where, key)


def _time(text: str, where: str) -> int:
    return _with_unit(text, _TIMES, where, "runtime")


def _with_unit(text: str, units: dict[str, int], where: str, key: str) -> int:
    match = _NUMBER.fullmatch(text.lower())
    if match is None or match[2] not in units:
        _refuse(where, key, f"is {text!r}; write a number and one of {', '.join(units)[2:]}")
    return int(float(match[1]) * units[match[2]])


def _percent(text: str, where: str, key: str) -> float:
    percent = _whole(text, where, key)
    if percent > 100:
        _refuse(where, key, f"is {percent} %")
    return percent / 100


def _whole(text: str, where: str, key: str) -> int:
    number = _converted(int, text, where, key)
    if number < 0:
        _refuse(where, key, f"is {number}")
    return number


def _converted(kind: Callable[[str], T], text: str, where: str, key: str) -> T:
    try:
        return kind(text)
    except ValueError:
        _refuse(where, key, f"is {text!r}, which is no number")


def _refuse(where: str, key: str, reason: str) -> NoReturn:
    raise WorkloadRefused(f"{where}: {key} {reason}")
