"""The documentation: its code runs and prints what it shows; the links, files and commands that it names exist."""

import contextlib
import io
import json
import re
from doctest import ELLIPSIS, OutputChecker
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

from experiments.config import CONFIGS

ROOT = Path(__file__).parents[1]
DOCS = [f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")]
PAGES = sorted(["README.md", "CONTRIBUTING.md", "results/README.md", *DOCS])
SLOW = {"docs/language-models.md"}
HEADERS = sorted(f"configs/{path.relative_to(CONFIGS)}" for path in CONFIGS.rglob("*.yaml"))
ROUNDING = re.compile(r"\d\.\d\de-\d\d")  # differs from machine to machine


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[tuple[str, str]]:
    """The blocks of Python on the page, each with the text block below it, or with an empty text."""
    return re.findall(r"```python\n(.*?)```(?:\n```text\n(.*?)```)?", read(page), re.DOTALL)


def same(shown: str, printed: str) -> bool:
    """Tell whether `shown` was printed.

    A line of three dots stands for any lines. A rounding error may be ten times the one that is shown, or 1e-6.
    """
    errors = [[float(x) for x in ROUNDING.findall(text)] for text in (shown, printed)]
    small = not errors[1] or max(errors[1]) <= max([1e-6, *(10 * x for x in errors[0])])
    shown, printed = (re.sub(r"\d\.\d\de[-+]\d\d", "~", text) for text in (shown, printed))
    return small and OutputChecker().check_output(shown, printed, ELLIPSIS)


def anchors(page: str) -> set[str]:
    """The names by which links can lead to a heading of the page."""
    headings = re.findall(r"^#+ (.+)$", read(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short():
    assert len(read("README.md").split()) <= 700


def test_some_pages_have_code():
    assert {page for page in PAGES if blocks(page)} >= {"README.md", "docs/growing-your-own.md", "docs/exactness.md"}


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] * (page in SLOW)) for page in PAGES if blocks(page)]
)
def test_every_block_prints_what_is_shown(page, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for code, shown in blocks(page):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, names)
        assert same(shown, printed.getvalue()), f"{code}\nprints\n{printed.getvalue()}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grow", "curves"])
def test_every_cell_of_a_notebook_runs_and_prints_what_is_shown(name, monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    monkeypatch.chdir(ROOT / "docs/notebooks")
    names: dict[str, object] = {}
    for cell in json.loads(read(f"docs/notebooks/{name}.ipynb"))["cells"]:
        if cell["cell_type"] == "code":
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec("".join(cell["source"]), names)
            shown = "".join(text for output in cell["outputs"] for text in output.get("text", []))
            assert same(shown, printed.getvalue()) or name == "curves", printed.getvalue()  # its curves change
            assert bool(shown) == bool(printed.getvalue())


def test_what_is_not_printed_is_not_accepted():
    line = "12 units; max_abs 2.00e-07\n"
    assert same(line, line) and same(line, line.replace("2.00", "1.23")) and same("12...\n", line)
    assert not same(line, line.replace("12", "13"))
    assert not same(line, line.replace("e-07", "e-05"))
    assert not same("", line)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", read(page)):
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(str(file.resolve().relative_to(ROOT))), f"{target}#{anchor}"


@pytest.mark.parametrize("page", [*PAGES, *HEADERS])
def test_every_command_that_is_named_exists(page):
    text = read(page)
    for name in re.findall(r"train\.py.* experiment=([a-z_]\w*)", text):
        assert (CONFIGS / "experiment" / f"{name}.yaml").exists(), name
    targets = re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE)
    assert set(re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE)) <= set(targets)
    for script in re.findall(r"python (?:-m )?(scripts[/.]\w+)", text):
        assert (ROOT / f"{script.replace('.', '/')}.py").exists(), script
