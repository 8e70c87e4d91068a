"""What the README shows works: its example runs, its commands and files exist."""

import re
from pathlib import Path

import pytest

import net2net
from experiments import command

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("float64")
def test_the_example_runs_and_is_exact() -> None:
    """With random weights in place of a download."""
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert 'weights="DEFAULT"' in code
    names: dict[str, object] = {}
    exec(code.replace('weights="DEFAULT"', "").replace("224", "64"), names)
    for grown in ("student", "wider", "deeper"):
        teacher, student, images = (names[name] for name in ("teacher", grown, "images"))
        assert net2net.equivalence(teacher, student, images).max_relative < 1e-10  # pyright: ignore[reportArgumentType]


def test_every_experiment_and_file_that_is_named_exists() -> None:
    for name in re.findall(r"experiment=(\w+)", TEXT):
        assert (command.CONFIGS / "experiment" / f"{name}.yaml").exists(), name
    for target in re.findall(r"\]\(((?!http)[^)#]+)", TEXT):
        assert (ROOT / target).exists(), target
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"^make (\w+)", TEXT, re.MULTILINE)) <= set(targets)
    for script in re.findall(r"python (\w[\w/]*\.py)", TEXT):
        assert (ROOT / script).exists(), script
