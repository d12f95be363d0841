"""Sizes, names and habits of the source; each rule is shown to catch a planted fault."""

from pathlib import Path

import house_rules
import pytest

OURS = house_rules.python_files(*house_rules.PACKAGES)
EVERYTHING = house_rules.python_files(
    *house_rules.PACKAGES, "benchmarks", "tests", "tools", "proto"
)


def relative(path: Path) -> str:
    return str(path.relative_to(house_rules.ROOT))


def read_all(paths: list[Path]) -> list[tuple[str, str]]:
    return [(relative(path), path.read_text()) for path in paths]


def test_there_are_sources_to_look_at() -> None:
    packages = {relative(path).split("/")[0] for path in OURS}
    assert packages == set(house_rules.PACKAGES)


@pytest.mark.parametrize(
    "rule",
    [house_rules.long_functions, house_rules.wide_lines, house_rules.unsafe_loading],
    ids=lambda rule: rule.__name__,
)
def test_all_sources_keep(rule) -> None:
    assert [found for name, text in read_all(EVERYTHING) for found in rule(name, text)] == []


def test_functions_are_short_on_the_whole() -> None:
    lines = house_rules.function_lines_median(text for _, text in read_all(OURS))
    assert lines <= house_rules.FUNCTION_LINES_MEDIAN_MAX


def test_nothing_beneath_the_service_throws_dice() -> None:
    beneath = [
        (name, text)
        for name, text in read_all(house_rules.python_files("csd_protocol", "csd_device"))
        if not name.startswith("csd_device/service/")
    ]
    assert [found for item in beneath for found in house_rules.ambient_dice(*item)] == []


def test_file_names_name_a_concept() -> None:
    assert house_rules.names_that_say_nothing(EVERYTHING) == []


def test_each_package_is_marked_as_typed() -> None:
    for package in house_rules.PACKAGES:
        assert (house_rules.ROOT / package / "py.typed").is_file()


# ---- planted faults --------------------------------------------------------------------------


def function_of(lines: int) -> str:
    return "def f():\n" + "    x = 1\n" * (lines - 1)


def test_a_long_function_is_caught_and_its_docstring_does_not_count() -> None:
    most = house_rules.FUNCTION_LINES_MAX
    assert house_rules.long_functions("a.py", function_of(most)) == []
    (found,) = house_rules.long_functions("a.py", "\n" + function_of(most + 1))
    assert found.startswith("a.py:2: f has 71 lines")
    documented = function_of(most).replace(":\n", ':\n    """One.\n\n    Two.\n    """\n', 1)
    assert house_rules.long_functions("a.py", documented) == []


def test_a_median_over_long_functions_is_long() -> None:
    sources = [function_of(3), function_of(40), function_of(50)]
    assert house_rules.function_lines_median(sources) == 40


def test_a_wide_line_is_caught() -> None:
    assert house_rules.wide_lines("a.py", "x" * 100 + "\n") == []
    assert len(house_rules.wide_lines("a.py", "x" * 101 + "\n")) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from dill import loads",
        "import torch\ntorch.load('x')",
        "import numpy\nnumpy.load('x', allow_pickle=True)",
    ],
)
def test_pickle_is_caught(source: str) -> None:
    assert len(house_rules.unsafe_loading("a.py", source)) == 1


def test_a_generator_of_ones_own_is_caught_but_not_one_that_was_given() -> None:
    planted = "import numpy as np\nx = np.random.default_rng(1).random()"
    assert house_rules.ambient_dice("a.py", planted)
    given = (
        "import numpy as np\ndef f(dice: np.random.Generator) -> float:\n    return dice.random()"
    )
    assert house_rules.ambient_dice("a.py", given) == []


def test_a_name_that_says_nothing_is_caught() -> None:
    assert house_rules.names_that_say_nothing([Path("a/utils.py"), Path("a/arena.py")]) == [
        "a/utils.py"
    ]
