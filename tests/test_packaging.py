"""The files that install the project agree with each other, and they name no machine."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import net2net

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
LOCK = (ROOT / "requirements.lock").read_text()
INSTALLERS = (
    "pyproject.toml",
    "requirements.lock",
    "environment.yml",
    "Makefile",
    ".ci/run",
    "CITATION.cff",
    "CHANGELOG.md",
    "Dockerfile",
    "apptainer.def",
    *(f".github/workflows/{name}.yml" for name in ("ci", "nightly", "docs", "release")),
)


def pins(lock: str) -> dict[str, str]:
    """Return the version of every package that the lock pins with a hash."""
    pinned = re.findall(r"^([\w.-]+)==([^ ;]+)[^\n]*\\\n +--hash=sha256:[0-9a-f]{64}", lock, re.MULTILINE)
    return {canonicalize_name(name): version for name, version in pinned}


def direct_dependencies() -> list[Requirement]:
    """Return the requirements in pyproject.toml, with the extras for development, without the package itself."""
    project = PYPROJECT["project"]
    extras = {name: texts for name, texts in project["optional-dependencies"].items() if name not in ("zoo", "models")}
    texts = [*project["dependencies"], *chain(*extras.values())]
    return [r for r in map(Requirement, texts) if r.name != project["name"]]


def test_a_pin_counts_only_with_its_hash():
    hashed = "a-b==1.0 ; sys_platform == 'linux' \\\n    --hash=sha256:" + "0" * 64 + "\n"
    assert pins(hashed + "bare==2.0\n") == {"a-b": "1.0"}


def test_everything_in_the_lock_has_a_hash():
    assert set(pins(LOCK)) == {canonicalize_name(n) for n in re.findall(r"^([\w.-]+)==", LOCK, re.MULTILINE)}
    for line in LOCK.splitlines():
        assert re.match(r"#|    #|    --hash=sha256:|[\w.-]+==", line), f"{line!r} pins nothing"


CONSTRAINTS = [Requirement(text) for text in PYPROJECT["tool"]["uv"]["constraint-dependencies"]]


@pytest.mark.parametrize("requirement", [*direct_dependencies(), *CONSTRAINTS], ids=str)
def test_direct_dependency_is_pinned_as_it_is_asked_for(requirement):
    assert requirement.name in pins(LOCK), f"{requirement.name} is not in requirements.lock: run make lock"
    assert requirement.specifier.contains(pins(LOCK)[requirement.name], prereleases=True), "run make lock"


def test_conda_environment_is_the_lock():
    python, pip, from_pip = ENVIRONMENT["dependencies"]
    assert ENVIRONMENT["name"] == PYPROJECT["project"]["name"]
    assert ENVIRONMENT["channels"] == ["conda-forge"]
    assert pip == "pip"
    # `-e .` cannot stand here: pip refuses it beside hashes.
    assert from_pip == {"pip": ["-r requirements.lock"]}
    name, minor = python.split("=")
    assert name == "python"
    assert minor in SpecifierSet(PYPROJECT["project"]["requires-python"])
    assert minor == PYPROJECT["tool"]["basedpyright"]["pythonVersion"]
    assert f"py{minor.replace('.', '')}" == PYPROJECT["tool"]["ruff"]["target-version"]
    assert f"--python-version {minor} " in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("name", INSTALLERS)
def test_names_no_host_and_no_machine_path(name):
    text = (ROOT / name).read_text()
    assert not re.search(r"\w+://|--(extra-)?index-url|/(home|root|Users|opt|mnt)/", text)


def test_ci_is_executable():
    assert os.access(ROOT / ".ci/run", os.X_OK), "chmod +x .ci/run"


def test_version_is_the_same_everywhere():
    number = net2net.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == number
    assert f"\n## {number}" in (ROOT / "CHANGELOG.md").read_text()


def test_make_lists_its_targets():
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    # The MAKEFLAGS of an outer `make test` would change what the inner one prints.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    done = subprocess.run([make], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert [line.split()[1] for line in done.stdout.splitlines()] == phony.split()


def test_workflows_run_what_a_person_runs():
    makefile = (ROOT / "Makefile").read_text()
    minor = PYPROJECT["project"]["requires-python"].removeprefix(">=")
    workflows = sorted((ROOT / ".github/workflows").glob("*.yml"))
    assert {f".github/workflows/{path.name}" for path in workflows} <= set(INSTALLERS)
    for path in workflows:
        steps = [step for job in yaml.safe_load(path.read_text())["jobs"].values() for step in job["steps"]]
        versions = {step["with"]["python-version"] for step in steps if "python-version" in step.get("with", {})}
        assert versions == {minor}, path
        for target in re.findall(r"make ([\w-]+)", " ".join(step.get("run", "") for step in steps)):
            assert f"\n{target}: " in makefile, f"{path}: there is no make {target}"


def test_editable_install_finds_the_whole_checkout():
    # setuptools then writes one path file with the root; else it would map net2net alone.
    assert PYPROJECT["tool"]["setuptools"]["package-dir"] == {"": "."}


def test_containers_install_the_lock_and_run_the_demo():
    dockerfile, apptainer = ((ROOT / name).read_text() for name in ("Dockerfile", "apptainer.def"))
    minor = PYPROJECT["project"]["requires-python"].removeprefix(">=")
    for text, first in ((dockerfile, "FROM"), (apptainer, "From:")):
        assert f"\n{first} python:{minor}-" in text and "make" in text and "pip install" not in text
    assert re.search(r"^RUN make setup$", dockerfile, re.MULTILINE) and "make -C /net2net setup" in apptainer
    assert dockerfile.endswith('CMD ["make", "demo"]\n')
    for line in re.findall(r"^COPY (.*) \S+$", dockerfile, re.MULTILINE):
        assert all((ROOT / name).exists() for name in line.split())
    # make setup needs no file that is copied after it
    needed = {"Makefile", "requirements.lock", "pyproject.toml", PYPROJECT["project"]["readme"], "LICENSE"}
    assert needed <= set(dockerfile.partition("RUN make setup")[0].split())
    demo = re.search(r"^demo:.*\n\t\$\(RUN\) train.py (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert demo and f"set -- {demo[1]};" in apptainer


@pytest.mark.slow
def test_a_source_distribution_tests_itself(tmp_path):
    # Build a copy, because a build leaves folders behind, and what git ignores may lie beside the sources.
    left_out = (".git", ".venv", "runs*", "wandb", "build", "dist", "_build", "*.egg-info", "*_cache", ".hypothesis")
    shutil.copytree(ROOT, tmp_path / "source", ignore=shutil.ignore_patterns("__pycache__", *left_out), symlinks=True)
    build = "from setuptools.build_meta import build_sdist; print(build_sdist('..'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=tmp_path / "source", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "source")
    with tarfile.open(tmp_path / f"net2net-{net2net.__version__}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / f"net2net-{net2net.__version__}"
    files = ["test_record.py", "test_house.py", "grow/test_extend.py", "experiments/test_settings.py"]
    # First on the path, before the checkout's net2net, which is installed.
    environment = os.environ | {"PYTHONPATH": str(unpacked)}
    where = "import net2net, experiments; print(net2net.__file__, experiments.__file__)"
    found = subprocess.run([sys.executable, "-c", where], cwd=unpacked, env=environment, capture_output=True, text=True)
    assert found.stdout.count(str(unpacked)) == 2
    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *(f"tests/{file}" for file in files)]
    done = subprocess.run(tests, cwd=unpacked, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"\n\d\d+ passed", done.stdout)


def test_wheel_holds_net2net_alone_and_asks_for_torch_alone(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    # Build a copy, because a build leaves folders behind. Copy the neighbours too: they have to stay out of the wheel.
    for folder in ("net2net", "experiments", "scripts", "configs", "tests"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE", "train.py"):
        shutil.copy(ROOT / file, source)

    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", tmp_path]
    wheel_of = [sys.executable, "-m", "pip", "wheel", *options, source]
    done = subprocess.run(wheel_of, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = archive.namelist()
        (metadata,) = (f for f in files if f.endswith(".dist-info/METADATA"))
        header = Parser().parsestr(archive.read(metadata).decode())
    number = net2net.__version__
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "net2net").rglob("*.py")}
    assert modules <= set(files)
    assert {f.split("/")[0] for f in files} == {"net2net", f"net2net-{number}.dist-info"}
    assert {f"net2net-{number}.dist-info/{file}" for file in ("licenses/LICENSE", "entry_points.txt")} <= set(files)
    assert header["Version"] == number
    required = [Requirement(r) for r in header.get_all("Requires-Dist", [])]
    assert [r.name for r in required if r.marker is None] == ["torch"]
    assert set(header.get_all("Provides-Extra", [])) == {"experiments", "dev", "docs", "models", "zoo"}
