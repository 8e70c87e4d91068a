"""The document on growing one's own network: its blocks run in order, and print what it shows."""

import contextlib
import io
import re
from doctest import ELLIPSIS, OutputChecker
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "growing-your-own.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```(?:\n```text\n(.*?)```)?", TEXT, re.DOTALL)
ROUNDING = re.compile(r"\d\.\d\de-\d\d")  # differs from machine to machine


def same(shown: str, printed: str) -> bool:
    """Whether this was printed, lines of three dots apart; rounding errors may be ten times what is shown, or 1e-6."""
    errors = [[float(x) for x in ROUNDING.findall(text)] for text in (shown, printed)]
    small = not errors[1] or max(errors[1]) <= max([1e-6, *(10 * x for x in errors[0])])
    shown, printed = (re.sub(r"\d\.\d\de[-+]\d\d", "~", text) for text in (shown, printed))
    return small and OutputChecker().check_output(shown, printed, ELLIPSIS)


def test_every_block_prints_what_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    torch.manual_seed(0)
    names: dict[str, object] = {}
    assert len(BLOCKS) > 5
    for code, shown in BLOCKS:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, names)
        assert same(shown, printed.getvalue()), f"{code}\nprints\n{printed.getvalue()}"


def test_what_is_not_printed_is_not_accepted() -> None:
    line = "12 units; max |difference| 2.00e-07\n"
    assert same(line, line) and same(line, line.replace("2.00", "1.23")) and same("12...\n", line)
    assert not same(line, line.replace("12", "13"))
    assert not same(line, line.replace("e-07", "e-05"))
    assert not same("", line)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(((?!http)[^)#]+)", TEXT):
        assert (ROOT / "docs" / target).exists(), target
