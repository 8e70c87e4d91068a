"""The step-ups of torchvision's classifiers: every pair can be built, and a fault cannot pass for a success."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.regnet import BlockParams

import net2net
from net2net.testing import look_trained
from scripts import zoo

QUICK = "mobilenet_v3_small -> mobilenet_v3_small x2.0"


def named(name: str) -> zoo.Pair:
    """The pair of that name."""
    return next(pair for pair in zoo.PAIRS if pair.name == name)


@pytest.fixture(scope="module")
def shapes() -> Iterator[Callable[[str], dict[str, torch.Size]]]:
    """The parameters' shapes of a network by name, built without memory."""
    original = BlockParams.from_init_params

    def on_the_cpu(**options: float) -> BlockParams:
        with torch.device("cpu"):  # it computes widths with tensors
            return original(**options)  # pyright: ignore[reportArgumentType]

    @cache
    def build(name: str) -> dict[str, torch.Size]:
        with torch.device("meta"):
            return {name: parameter.shape for name, parameter in zoo.build(name).named_parameters()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockParams, "from_init_params", on_the_cpu)
        yield build


def test_there_are_enough_pairs_and_no_two_of_one_name() -> None:
    names = [pair.name for pair in zoo.PAIRS]
    assert len(names) >= 45
    assert len(set(names)) == len(names)
    assert set(zoo.EXPLANATIONS) <= set(names)
    assert set(zoo.NETWORKS) <= {network for pair in zoo.PAIRS for network in (pair.teacher, pair.student)}


@pytest.mark.parametrize("pair", zoo.PAIRS, ids=lambda pair: pair.name)
def test_a_pair_is_a_step_up_of_its_kind(shapes: Callable[[str], dict[str, torch.Size]], pair: zoo.Pair) -> None:
    teacher, student = shapes(pair.teacher), shapes(pair.student)
    assert sum(shape.numel() for shape in student.values()) > sum(shape.numel() for shape in teacher.values())
    if pair.name != "regnet_y_400mf -> regnet_y_800mf":  # deeper in one stage, shallower in another
        assert (len(student) > len(teacher)) == (pair.kind != "width")
    if pair.kind == "width":
        assert list(student) == list(teacher)
        wider = zip(student.values(), teacher.values(), strict=True)
        assert all(mine >= theirs for pair in wider for mine, theirs in zip(*pair, strict=True))


@pytest.mark.parametrize("name", [QUICK, "shufflenet_v2_x0_5 -> shufflenet_v2_x1_0", "resnet18 -> resnet34"])
def test_a_quick_pair(name: str) -> None:
    row = zoo.measure(named(name))
    assert row.verdict in ("exact", "refused")
    assert row.alive > zoo.ALIVE
    assert (row.error is None) == (row.verdict == "refused") == bool(row.reason)


def broken(how: Callable[[nn.Module], object]) -> Callable[..., None]:
    """`transfer`, and then something happens to the student."""

    def transfer(teacher: nn.Module, student: nn.Module, example: Tensor) -> None:
        net2net.transfer(teacher, student, example)
        with torch.no_grad():
            how(student)

    return transfer


@pytest.mark.parametrize(
    "how",
    [
        lambda student: student.get_parameter("features.0.0.weight")[0, 0, 0, 0].mul_(1 + 1e-5),
        lambda student: student.get_parameter("features.4.block.2.fc1.bias").zero_(),
        lambda student: student.get_buffer("features.12.1.running_mean").zero_(),
        lambda student: student.get_parameter("classifier.3.weight").fill_(float("nan")),
    ],
    ids=["weight", "bias", "statistics", "nan"],
)
def test_a_student_that_was_perturbed_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: Callable[[nn.Module], object]
) -> None:
    monkeypatch.setattr(zoo, "transfer", broken(how))
    assert zoo.main(["--only", QUICK]) == 1
    assert capsys.readouterr().out.startswith("WRONG ")


def test_a_crash_from_inside_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(zoo, "transfer", broken(lambda student: student.get_parameter("nothing")))
    assert zoo.main(["--only", QUICK]) == 1
    assert "AttributeError: " in capsys.readouterr().out


def test_a_dead_teacher_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def dead(model: nn.Module, *_: object, **__: object) -> nn.Module:
        with torch.no_grad():
            model.get_parameter("classifier.3.weight").zero_()
        return model.eval()

    monkeypatch.setattr(zoo, "look_trained", dead)
    monkeypatch.setattr(zoo, "transfer", lambda teacher, student, example: None)
    row = zoo.measure(named(QUICK))
    assert row.error is not None
    assert row.verdict == "DEAD"


def test_every_part_of_a_teacher_that_looks_trained_has_a_say() -> None:
    torch.manual_seed(0)
    model = look_trained(zoo.build("efficientnet_b0").double(), torch.randn(8, 3, 64, 64).double())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    output = model(torch.randn(2, 3, 64, 64).double())
    (output * torch.randn_like(output)).sum().backward()
    assert not model.training
    for name, parameter in model.named_parameters():
        assert parameter.std() > 1e-3, name
        assert parameter.grad is not None
        assert (parameter.grad * parameter).norm() > 1e-4 * output.norm(), name
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def row(name: str, error: float | None = 1e-15, reason: str | None = None) -> zoo.Row:
    """A made-up measurement."""
    return zoo.Row(named(name), (1_260_000, 2_000_000), 0.5, 2e-15, 1.23, error, reason)


def test_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = "convnext_small -> convnext_base"
    rows = [row("resnet18 -> resnet34"), row("inception_v3 -> inception_v3, 7x7 x1.5", 1e-9), row(refused, None, "No.")]
    monkeypatch.setattr(zoo, "EXPLANATIONS", {refused: "Mathematics."})
    page = zoo.page(rows)
    for line in (
        "- **Result:** 3 pairs: 1 exact, 1 refused, **1 WRONG**",
        "| ResNet | resnet18 | resnet34 | depth | 1.3 → 2.0 | 0.5 | 2e-15 | 1.0e-15 | 1.2 | exact |",
        "| Inception | inception_v3 (96 pixels) | inception_v3, 7x7 x1.5 | width "
        "| 1.3 → 2.0 | 0.5 | 2e-15 | 1.0e-09 | 1.2 | WRONG |",
        "| ConvNeXt | convnext_small | convnext_base | width | 1.3 → 2.0 | 0.5 | 2e-15 | – | 1.2 | refused |",
        "- **convnext_small → convnext_base:** Mathematics. In its own words: “No.”",
        "- inception_v3, 7x7 x1.5: `inception_v3(channels_7x7=1.5)`",
    ):
        assert f"\n{line}\n" in page
    monkeypatch.setattr(zoo, "EXPLANATIONS", {})
    assert "*Not explained.*" in zoo.page(rows)
    assert "0 wrong\n" in zoo.page(rows[:1])
    assert "## Refusals" not in zoo.page(rows[:1])
    assert "1 CRASHED" in zoo.page([replace(rows[2], crashed=True)])


def test_only_a_full_run_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(zoo, "ROOT", tmp_path)
    monkeypatch.setattr(zoo, "PAGE", tmp_path / "results" / "zoo.md")
    monkeypatch.setattr(zoo, "measure", lambda pair: row(pair.name))
    assert zoo.main(["--only", "resnet*"]) == 0
    assert not list(tmp_path.iterdir())
    assert zoo.main([]) == 0
    assert zoo.PAGE.read_text() == zoo.page([row(pair.name) for pair in zoo.PAIRS])
    assert capsys.readouterr().out.endswith(f"{len(zoo.PAIRS)} exact\nwritten to results/zoo.md\n")


def test_the_list_and_a_name_that_is_not_on_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert zoo.main(["--list", "--only", "swin_v2_t -> *"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "swin_v2_t -> swin_v2_s"
    assert zoo.main(["--only", "alexnet*"]) == 1
    assert capsys.readouterr().err == "No pair is called alexnet*: see --list.\n"
