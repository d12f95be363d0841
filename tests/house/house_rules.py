"""The house's rules about source text: each takes files or text and names what breaks it.

Every rule returns a list of findings, empty when the rule holds, so that a test can show both: that
the tree keeps it, and that a planted fault is found.
"""

import ast
import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("csd_protocol", "csd_device", "host_client")
GENERATED = ROOT / "csd_protocol" / "csd"
COLUMNS_MAX = 100
FUNCTION_LINES_MAX = 70
FUNCTION_LINES_MEDIAN_MAX = 12
NAMES_THAT_SAY_NOTHING = {"utils", "util", "common", "helpers", "helper", "manager", "misc"}
UNSAFE_LOADERS = {"pickle", "cPickle", "dill", "marshal", "shelve", "cloudpickle", "joblib"}


def python_files(*folders: str) -> list[Path]:
    """Our own sources below `folders` of the tree, generated ones left out."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(path for path in found if GENERATED not in path.parents)


def functions_of(source: str) -> Iterator[tuple[str, int, int]]:
    """Name, first line and count of lines of each function, its docstring and decorators left out.

    A function inside another counts for itself and in the outer one.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            documented = ast.get_docstring(node, clean=False) is not None
            docstring_lines = 0
            if documented:
                text = node.body[0]
                docstring_lines = (text.end_lineno or text.lineno) - text.lineno + 1
            lines = (node.end_lineno or node.lineno) - node.lineno + 1 - docstring_lines
            yield node.name, node.lineno, lines


def long_functions(name: str, source: str) -> list[str]:
    return [
        f"{name}:{line}: {function} has {lines} lines; at most {FUNCTION_LINES_MAX}"
        for function, line, lines in functions_of(source)
        if lines > FUNCTION_LINES_MAX
    ]


def function_lines_median(sources: Iterable[str]) -> float:
    return median(lines for source in sources for _, _, lines in functions_of(source))


def wide_lines(name: str, source: str) -> list[str]:
    return [
        f"{name}:{number}: {len(line)} columns; at most {COLUMNS_MAX}"
        for number, line in enumerate(source.splitlines(), start=1)
        if len(line) > COLUMNS_MAX
    ]


def imported_modules(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node.lineno


def unsafe_loading(name: str, source: str) -> list[str]:
    """Imports of pickle and its kin, torch.load, and numpy's allow_pickle=True."""
    tree = ast.parse(source)
    found = [
        f"{name}:{line}: imports {module}"
        for module, line in imported_modules(tree)
        if module.split(".")[0] in UNSAFE_LOADERS
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) in {"torch.load", "torch.save"}:
                found.append(f"{name}:{node.lineno}: {ast.unparse(node.func)} pickles")
            found += [
                f"{name}:{node.lineno}: allow_pickle"
                for word in node.keywords
                if word.arg == "allow_pickle" and ast.unparse(word.value) != "False"
            ]
    return found


def ambient_dice(name: str, source: str) -> list[str]:
    """Calls of numpy.random: a generator has to be an argument, so that a seed replays a run."""
    return [
        f"{name}:{node.lineno}: {ast.unparse(node.func)} throws dice of its own"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and re.match(r"(np|numpy)\.random\.", ast.unparse(node.func))
    ]


def names_that_say_nothing(paths: Iterable[Path]) -> list[str]:
    return [str(path) for path in paths if path.stem in NAMES_THAT_SAY_NOTHING]


# ---- documents -------------------------------------------------------------------------------

_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def heading_anchors(text: str) -> set[str]:
    """The anchors that a Markdown text's headings get, as forges make them."""
    without_code = _FENCE.sub("", text)
    headings = re.findall(r"^#+\s+(.*?)\s*#*$", without_code, re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-")
        for heading in headings
    }


def broken_links(path: Path, text: str) -> list[str]:
    """Links to files that are not there, or to headings that the file does not have."""
    found = []
    for match in _LINK.finditer(_FENCE.sub("", text)):
        link = match[1] or match[2]
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        file = (path.parent / target) if target else path
        if not file.exists():
            found.append(f"{path.name}: {link} leads nowhere")
        elif anchor and file.suffix == ".md":
            body = text if file == path else file.read_text()
            if anchor not in heading_anchors(body):
                found.append(f"{path.name}: {link}: no such heading")
    return found


def shell_commands(text: str) -> list[list[str]]:
    """The words of each command in a document's shell blocks; comments and variables left out."""
    commands = []
    for language, block in _FENCE.findall(text):
        if language not in {"", "sh", "bash", "shell", "console"}:
            continue
        for line in block.replace("\\\n", " ").splitlines():
            words = line.split("#")[0].removeprefix("$ ").split()
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            if words:
                commands.append(words)
    return commands


def make_targets() -> set[str]:
    text = (ROOT / "Makefile").read_text()
    return set(re.findall(r"^([a-z][a-z-]*):", text, re.MULTILINE))


def import_contracts() -> dict[str, str]:
    """Identifier and name of each import-linter contract in pyproject.toml."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = table["tool"]["importlinter"]["contracts"]
    return {contract["id"]: contract["name"] for contract in contracts}
