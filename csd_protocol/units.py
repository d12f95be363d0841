"""Units of measure: sizes and rates as people write them."""

import re

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
NS_PER_US, NS_PER_MS, NS_PER_S = 1_000, 1_000_000, 1_000_000_000

_FACTORS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": KIB,
    "MIB": MIB,
    "GIB": GIB,
    "TIB": TIB,
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_size(text: str | int) -> int:
    """Bytes from `5GiB`, `1.5 MB`, `4096` or an int. Raises ValueError naming what was wrong."""
    if isinstance(text, int):
        return text
    match = _SIZE.fullmatch(text)
    factor = _FACTORS.get(match[2].upper()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is not a size: write a number and B, KB, KiB, MB, MiB, GB, GiB")
    return int(float(match[1]) * factor)


def format_size(size_bytes: float) -> str:
    """A size for people, in binary units: `5.0 GiB`."""
    for suffix, factor in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(size_bytes) >= factor:
            return f"{size_bytes / factor:.1f} {suffix}"
    return f"{size_bytes:.0f} B"


def format_ns(duration_ns: float) -> str:
    """A duration for people: `1.5 ms`."""
    for suffix, factor in (("s", NS_PER_S), ("ms", NS_PER_MS), ("us", NS_PER_US)):
        if abs(duration_ns) >= factor:
            return f"{duration_ns / factor:.2f} {suffix}"
    return f"{duration_ns:.0f} ns"
