"""Every configuration composes, says what it claims, and describes networks that the transfer can carry."""

import re
from pathlib import Path

import pytest
import torch
from conftest import cases, composed

from experiments import command, flops, start
from experiments.analysis.curves import PER_RUN
from experiments.config import check, flatten, steps
from experiments.models import build

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs/experiment").glob("*.yaml"))
SCALES = sorted(path.stem for path in (ROOT / "configs/scale").glob("*.yaml"))
OF_ONE_SIZE = [
    name for name in EXPERIMENTS if re.search(r"(?m)^scale:", (ROOT / f"configs/experiment/{name}.yaml").read_text())
]
SCALED = [(name, scale) for name in EXPERIMENTS if name not in OF_ONE_SIZE for scale in SCALES]


@pytest.mark.parametrize(
    ("experiment", "scale"),
    [*((name, None) for name in EXPERIMENTS), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SCALED)],
)
def test_every_case_of_every_experiment_composes_as_its_header_says_and_at_every_scale(experiment, scale):
    text = (ROOT / f"configs/experiment/{experiment}.yaml").read_text()
    line = re.search(r"^# Command +python train\.py (.+)$", text, re.M)
    assert line
    configs = cases(*line[1].split()) if scale is None else cases(f"experiment={experiment}", f"scale={scale}")
    for config in configs:
        check(config)
        assert config.experiment == experiment
        assert config.claim and "\n" not in config.claim
        with torch.device("meta"):
            sizes = [
                sum(p.numel() for p in build(config.model | spec, 10, 3).parameters())
                for spec in (config.teacher, *config.students.values())
            ]
        assert sizes[0] < min(sizes[1:])
    names = [config.name for config in configs]
    assert len(set(names)) == len(names)


def test_the_template_of_an_experiment_composes(tmp_path):
    (template,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(template.replace("NAME", "mine").replace("# cases", "cases"))
    (config,) = cases("experiment=mine", f"hydra.searchpath=[file://{tmp_path}]")
    check(config)
    assert (config.name, config.growth.noise, config.data.name) == ("mine/loud", 0.05, "digits")


def test_every_open_question_that_is_named_is_in_the_paper_notes():
    known = set(re.findall(r"^\*\*(O\d+)\b", (ROOT / "docs/reproduction.md").read_text(), re.M))
    assert known
    patterns = ("experiments/**/*.py", "net2net/**/*.py", "configs/experiment/*.yaml")
    for path in [path for pattern in patterns for path in ROOT.glob(pattern)]:
        assert set(re.findall(r"\bO\d+\b", path.read_text())) <= known, path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "scale"),
    [*((name, "cpu") for name in EXPERIMENTS if name != "design_space_imagenet"), ("wider_inception", "imagenet")],
)
def test_every_student_can_be_filled_from_its_teacher(experiment, scale):
    configs = cases(f"experiment={experiment}", *([] if experiment in OF_ONE_SIZE else [f"scale={scale}"]))
    done: list[object] = []
    for config in configs:
        if "slim" in config.model:
            config.model["slim"] = 0.03
        config.growth.calibrate = min(config.growth.calibrate, 8)
        # Cases that differ in how they train grow alike.
        what = (config.teacher, config.students, config.growth)
        if what in done:
            continue
        done.append(what)
        size = min(config.data.size, 64)  # smaller pictures than ImageNet's do as well
        teacher = start.make_network(config, None, 10, 3)

        def images(count: int, size: int = size) -> torch.Tensor:
            return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))

        pairs = [(arm, student) for student in config.students for arm in ("net2net", "random_pad")]
        for arm, student in pairs:
            record = start.fill(arm, teacher, start.make_network(config, student, 10, 3), config, images)
            assert record is not None
            if arm == "net2net" and not config.growth.noise:
                assert record.measured is not None and record.measured.max_relative < 1e-4


@pytest.mark.slow
def test_the_ways_to_spend_the_compute_of_a_schedule_cost_the_same():
    spent: dict[str, float] = {}
    for config in cases("experiment=when_to_grow"):
        epochs = steps(config.schedule.epochs, 351)
        arm = config.arms[0]  # the others cost as much
        large, small = (
            flops.count(build(config.model | spec, 10, 3), 3, 32)[1]
            for spec in (*config.students.values(), config.teacher)
        )
        own = small if arm == "teacher_continued" else large
        before = 0 if arm == "random_init" else small * steps(config.schedule.teacher_epochs or "", 351)
        spent[config.case or ""] = own * epochs + before
    whole = spent.pop("start")
    assert spent.pop("start_half") == pytest.approx(whole / 2, rel=0.01)
    assert spent.pop("start_double") == pytest.approx(whole * 2, rel=0.01)
    assert len(spent) >= 9 and "never" in spent
    assert list(spent.values()) == pytest.approx([whole] * len(spent), rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", OF_ONE_SIZE)
def test_an_experiment_with_a_scale_of_its_own_is_the_same_on_every_machine(monkeypatch, experiment):
    assert {"quickstart", "when_to_grow", "baseline"} <= set(OF_ONE_SIZE)
    found = []
    for scale in ("cpu", "gpu"):  # what a machine may choose
        monkeypatch.setattr(command, "default_scale", lambda scale=scale: scale)
        found.append(cases(f"experiment={experiment}"))
        for config in found[-1]:
            config.inception, config.speedrun = {}, {}  # what a scale makes of networks that these do not ask for
    assert all(one == found[0] for one in found)


def test_sizes_that_a_scale_gives_to_others_are_no_settings_of_a_run():
    config = composed("experiment=wider_inception", "scale=cpu")
    sizes = flatten({"inception": config.inception, "speedrun": config.speedrun})
    assert sizes and sizes.keys() <= PER_RUN


def test_the_scale_follows_the_machine_unless_it_is_named(monkeypatch):
    monkeypatch.setattr(command, "default_scale", lambda: "gpu")
    assert composed("experiment=wider_inception").scale == "gpu"
    assert composed("experiment=wider_inception", "scale=cpu").scale == "cpu"
