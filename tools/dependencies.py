"""The project's dependencies, from pyproject.toml: what an image needs, and the lock.

    python tools/dependencies.py list device test     requirements of these extras, one a line
    python tools/dependencies.py lock                 requirements.lock, from what is installed here

`list` needs only the standard library: an image installs its dependencies with it before the code
is there, so that a change of code does not install them again. `lock` walks the installed
distributions from the `dev` extra down and pins what it meets; run it (`make lock`) in an
environment in which the tests pass. The lock serves as requirements and as constraints alike.
"""

import argparse
import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = """\
# Every version the tests pass with, written by `make lock` from an environment in which they did.
# No index is named: pip's own settings say where packages, and a CPU build of torch, come from.
"""


def project() -> dict[str, object]:
    table: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def requirements_of(extras: Iterable[str]) -> list[str]:
    """Base requirements and those of `extras`, own extras unfolded. KeyError: no such extra."""
    table = project()
    optional: dict[str, list[str]] = table["optional-dependencies"]  # type: ignore[assignment]
    found: list[str] = list(table["dependencies"])  # type: ignore[call-overload]
    waiting = list(extras)
    while waiting:
        for requirement in optional[waiting.pop()]:
            if requirement.startswith(f"{table['name']}["):
                waiting += requirement.split("[")[1].rstrip("]").split(",")
            else:
                found.append(requirement)
    return sorted(set(found))


def installed_closure(roots: Iterable[str]) -> dict[str, str]:
    """Canonical name -> public version of all that `roots` need, as installed here.

    Raises importlib.metadata.PackageNotFoundError for a requirement that is not installed.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    from packaging.version import Version

    pins: dict[str, str] = {}
    waiting = [Requirement(text) for text in roots]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        if (name, frozenset(wanted.extras)) in seen:
            continue
        seen.add((name, frozenset(wanted.extras)))
        distribution = metadata.distribution(name)
        # Without the local part (2.13.0+cpu): the same release from any index fits.
        pins[name] = Version(distribution.version).public
        for text in distribution.requires or []:
            child = Requirement(text)
            environments = [{"extra": extra} for extra in (wanted.extras or {""})]
            if child.marker is None or any(map(child.marker.evaluate, environments)):
                waiting.append(child)
    return pins


def lock_text() -> str:
    """The lock: roots keep their own markers, so that it installs where a root does not apply."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    roots = requirements_of(["dev"])
    markers = {canonicalize_name(r.name): r.marker for r in map(Requirement, roots) if r.marker}
    lines = [
        f"{name}=={version}" + (f"; {markers[name]}" if name in markers else "")
        for name, version in sorted(installed_closure(roots).items())
    ]
    return HEADER + "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list").add_argument("extras", nargs="*")
    verbs.add_parser("lock")
    arguments = parser.parse_args()
    if arguments.verb == "list":
        sys.stdout.write("\n".join(requirements_of(arguments.extras)) + "\n")
    else:
        (ROOT / "requirements.lock").write_text(lock_text())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
