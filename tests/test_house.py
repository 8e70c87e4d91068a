"""The limits that keep the code readable, where no linter has a rule for them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("net2net", "experiments", "scripts")
LONGEST_FILE, LONGEST_FUNCTION = 400, 80


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def too_long(source: str, most: int) -> Iterator[str]:
    """The functions of more than `most` lines, docstring and decorators included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if (node.end_lineno or first) - first + 1 > most:
                yield node.name


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_and_functions_are_short(folder: str) -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in files(folder)}
    assert {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > LONGEST_FILE} == {}
    assert [name for path in lengths for name in too_long(path.read_text(), LONGEST_FUNCTION)] == []


def test_a_long_function_is_found() -> None:
    short = "@cached\ndef short():\n    return 1\n"
    source = f"{short}\n\ndef long():\n    '''First.\n\n    Second.\n    '''\n    return 2\n"
    assert list(too_long(source, 5)) == ["long"]
    assert list(too_long(source, 2)) == ["short", "long"]


def test_no_file_changes_where_python_looks_for_modules() -> None:
    found = [path for folder in FOLDERS for path in files(folder) if "sys.path.insert" in path.read_text()]
    assert found == []
