"""The zoo: every entry of its tables can be built, and a fault cannot pass for a success."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from checks import BAR
from torch import Tensor, nn
from torchvision.models.regnet import BlockParams

import net2net
from net2net.errors import Fault
from net2net.testing import look_trained
from scripts import zoo, zoo_models
from scripts.zoo_models import CELLS, GROWTHS, Growth, draw_inputs, merge
from scripts.zoo_networks import NETWORKS, PAIRS, ZOO, Network, Pair, build

QUICK = "mobilenet_v3_small -> mobilenet_v3_small x2.0"


def find(key: str) -> Pair:
    """The pair of that name."""
    return next(pair for pair in PAIRS if pair.key == key)


@cache
def shapes(name: str) -> dict[str, torch.Size]:
    """The parameters' shapes of a network by name, built without memory."""
    original = BlockParams.from_init_params

    def on_the_cpu(**options: float) -> BlockParams:
        with torch.device("cpu"):  # it computes widths with tensors
            return original(**options)

    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(BlockParams, "from_init_params", on_the_cpu)
        return {name: parameter.shape for name, parameter in build(name).named_parameters()}


def test_the_tables_are_complete_and_name_nothing_twice() -> None:
    keys = [pair.key for pair in PAIRS]
    assert len(keys) == 86 == len(set(keys))
    assert set(ZOO["explanations"]) <= set(keys)
    assert set(ZOO["networks"]) <= {network for pair in PAIRS for network in (pair.teacher, pair.student)}
    assert sorted(network.module for network in NETWORKS) == sorted(timm.list_modules())
    assert all(network.model in timm.list_models(module=network.module) for network in NETWORKS)


@pytest.mark.parametrize("family", sorted({pair.family for pair in PAIRS}))
def test_every_pair_is_a_step_up_of_its_kind(family: str) -> None:
    for pair in (pair for pair in PAIRS if pair.family == family):
        teacher, student = shapes(pair.teacher), shapes(pair.student)
        assert sum(shape.numel() for shape in student.values()) > sum(shape.numel() for shape in teacher.values())
        if pair.key != "regnet_y_400mf -> regnet_y_800mf":  # deeper in one stage, shallower in another
            assert (len(student) > len(teacher)) == (pair.grows != "width"), pair
        if pair.grows == "width":
            assert list(student) == list(teacher), pair
            wider = zip(student.values(), teacher.values(), strict=True)
            assert all(new >= old for shapes in wider for new, old in zip(*shapes, strict=True)), pair


SLOW = (
    *("resnet50 -> wide_resnet50_2", "resnet18 -> resnet34", "vgg11_bn -> vgg13_bn", "densenet121 -> densenet169"),
    *("mobilenet_v2 x0.5 -> mobilenet_v2", "mnasnet0_5 -> mnasnet0_75", "efficientnet_b0 -> efficientnet_b1"),
)


@pytest.mark.parametrize("key", [QUICK, *(pytest.param(key, marks=pytest.mark.slow) for key in SLOW)])
def test_a_pair_is_exact(key: str) -> None:
    result = zoo.measure_pair(find(key))
    assert result.verdict == "exact" and result.error <= BAR and result.alive > zoo.ALIVE and result.rounding > 0


@pytest.mark.system
def test_a_network_of_timm_is_measured_in_a_process_of_its_own() -> None:
    network = next(network for network in NETWORKS if network.model == "test_vit")
    result = zoo.measure_isolated(network)
    assert result.verdict == "exact" and result.wider == (6, 26) and result.sizes[1] > result.sizes[0]


@pytest.mark.system
def test_a_network_that_is_too_slow_or_dies_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    assert zoo.measure_isolated(Network("resnet", "no_such_network", 64)).verdict == "CRASHED"
    monkeypatch.setattr(zoo, "SECONDS", 0)
    assert zoo.measure_isolated(NETWORKS[0]).verdict == "SLOW"


@pytest.mark.parametrize(
    ("verdict", "change"),
    [
        ("WRONG", lambda student: student.get_parameter("features.0.0.weight")[0, 0, 0, 0].mul_(1 + 1e-5)),
        ("WRONG", lambda student: student.get_parameter("features.4.block.2.fc1.bias").zero_()),
        ("WRONG", lambda student: student.get_buffer("features.12.1.running_mean").zero_()),
        ("WRONG", lambda student: student.get_parameter("classifier.3.weight").fill_(float("nan"))),
        ("CRASHED", lambda student: student.get_parameter("nothing")),
    ],
    ids=["weight", "bias", "statistics", "nan", "crash"],
)
def test_a_fault_is_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verdict: str, change: Callable
) -> None:
    def transfer(teacher: nn.Module, student: nn.Module, example: Tensor) -> None:
        net2net.transfer(teacher, student, example)
        with torch.no_grad():
            change(student)

    monkeypatch.setattr(zoo, "transfer", transfer)
    assert zoo.main(["--only", QUICK]) == 1
    shown = capsys.readouterr().out
    assert shown.startswith(f"{verdict} ") and (verdict != "CRASHED" or "AttributeError: " in shown)


def test_a_fault_in_one_attempt_is_no_refusal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def transfer(teacher: nn.Module, student: nn.Module, example: Tensor) -> None:
        raise Fault("An attempt stopped.")

    monkeypatch.setattr(zoo, "transfer", transfer)
    assert zoo.main(["--only", QUICK]) == 1
    assert capsys.readouterr().out.startswith("CRASHED ")


def test_a_dead_teacher_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def die(model: nn.Module, *_: object, **__: object) -> nn.Module:
        nn.init.zeros_(model.get_parameter("classifier.3.weight"))
        return model.eval()

    monkeypatch.setattr(zoo, "look_trained", die)
    monkeypatch.setattr(zoo, "transfer", lambda teacher, student, example: None)
    result = zoo.measure_pair(find(QUICK))
    assert result.error is not None and result.verdict == "DEAD"


def test_every_part_of_a_network_that_looks_trained_matters() -> None:
    torch.manual_seed(0)
    model = look_trained(build("efficientnet_b0").double(), torch.randn(8, 3, 64, 64).double())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    output = model(torch.randn(2, 3, 64, 64).double())
    (output * torch.randn_like(output)).sum().backward()
    assert not model.training
    for name, parameter in model.named_parameters():
        assert parameter.std() > 1e-3, name
        assert parameter.grad is not None
        assert (parameter.grad * parameter).norm() > 1e-4 * output.norm(), name
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def result(case: Pair | Network | Growth, error: float | None = 1e-15, reason: str | None = None) -> zoo.Result:
    """A made-up measurement."""
    return zoo.Result(case, 1.23, (1_260_000, 2_000_000), (3, 4), 0.5, 2e-15, error, reason)


def test_the_page_of_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = "convnext_small -> convnext_base"
    results = [
        result(find("resnet18 -> resnet34")),
        result(find("inception_v3 -> inception_v3, 7x7 x1.5"), 1e-9),
        result(find(refused), None, "No."),
    ]
    monkeypatch.setitem(ZOO, "explanations", {refused: "Mathematics."})
    page = zoo.zoo_page(results)
    for line in (
        "- **Result:** 3 pairs: 1 exact, 1 refused, **1 WRONG**",
        "| ResNet | resnet18 | resnet34 | depth | 1.3 → 2.0 | 0.5 | 2e-15 | 1.0e-15 | 1.2 | exact |",
        "- **convnext_small → convnext_base:** Mathematics. The message: “No.”",
        "- inception_v3, 7x7 x1.5: `inception_v3(channels_7x7=1.5)`",
    ):
        assert f"\n{line}\n" in page
    assert "| inception_v3 (96 pixels) |" in page
    monkeypatch.setitem(ZOO, "explanations", {})
    assert "*Not explained.*" in zoo.zoo_page(results)
    assert "0 wrong\n" in zoo.zoo_page(results[:1])
    assert "## Refusals" not in zoo.zoo_page(results[:1])
    assert "1 CRASHED" in zoo.zoo_page([replace(results[2], fault="CRASHED")])


def test_the_page_of_timm() -> None:
    deepseek, refused = (next(n for n in NETWORKS if n.module == name) for name in ("deepseek_vit", "mlp_mixer"))
    page = zoo.timm_page([result(deepseek), result(refused, None, "No.")])
    for line in (
        "- **Result:** 2 networks: 1 exact, 1 refused, 0 wrong",
        "| deepseek_vit | deepseek_vit_412m (depth=2, num_classes=10) | 224 | 3 of 4 | 1.3 → 2.0 | 0.5 | 1.0e-15 | 1.2 "
        "| exact |",
        "- **gmlp_ti16_224** (refused): “No.”",
    ):
        assert f"\n{line}\n" in page
    assert "**not all** 98 of" in page
    assert "- **Modules:** all 98 of" in zoo.timm_page([result(network) for network in NETWORKS])


def test_the_table_of_other_libraries() -> None:
    assert len({growth.key for growth in GROWTHS}) == len(GROWTHS)
    assert len({(growth.library, growth.model) for growth in GROWTHS}) >= 60
    assert {growth.cell for growth in GROWTHS} == set(CELLS)
    for growth in GROWTHS:
        given, longer = (draw_inputs(growth, 0, length) for length in (zoo_models.LENGTH, 13))
        assert given.keys() == longer.keys()
        if "lengths" in growth.entry.get("probes", []):
            assert any(given[name].shape != longer[name].shape for name in given), growth
    assert merge({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 4}, "d": None, "e": None}) == {
        "a": {"b": 4, "c": 2},
        "e": None,
    }


DOZEN = (
    *("transformers LlamaForCausalLM: stream x1.5", "transformers Gemma2ForCausalLM: stream x2"),
    *("transformers MixtralForCausalLM: mlp x2", "transformers GPT2LMHeadModel: stream x2"),
    *("transformers BertForMaskedLM: to heads", "transformers T5ForConditionalGeneration: to layers"),
    *("transformers ViTForImageClassification: deepen", "transformers DebertaV2ForSequenceClassification: to hidden"),
    *("diffusers UNet2DModel: free x2", "torch_geometric GCN: to hidden"),
    *("segmentation_models_pytorch FPN: mlp x2", "x_transformers Decoder: stream x1.5"),
)


@pytest.mark.system
@pytest.mark.parametrize("key", DOZEN)
def test_a_network_of_another_library_grows(key: str) -> None:
    growth = next(growth for growth in GROWTHS if growth.key == key)
    if find_spec(growth.library.partition(".")[0]) is None:
        pytest.skip(f"{growth.library} is not installed: it is of the extra 'models'")
    found = zoo.measure_isolated(growth)
    assert found.verdict == "exact" and found.sizes[1] > found.sizes[0], str(found)


def test_the_page_of_other_libraries() -> None:
    llama = [growth for growth in GROWTHS if growth.model == "LlamaForCausalLM"]
    results = [result(growth) for growth in llama[:2]] + [result(llama[2], None, "No.")]
    page = zoo_models.models_page(results, zoo.summarise, zoo.FACTS, {"torch": "2"})
    for line in (
        "- **Result:** 3 growths of 1 networks: 2 exact, 1 refused, 0 wrong",
        "- **transformers:** 3 growths: 2 exact, 1 refused, 0 wrong",
        f"- **LlamaForCausalLM, {llama[2].cell}:** “No.”",
        "- **Versions:** torch 2",
    ):
        assert f"\n{line}\n" in page
    assert "| transformers | LlamaForCausalLM | 1e-15 | 1e-15 | refused | – |" in page
    support = zoo_models.support_block(results)
    assert "| Language models | 1 of 1 | 1 of 1 | 0 of 1 | – | – | – | – | – | – | – |" in support


@pytest.mark.parametrize(("page", "measure"), [("zoo", "measure_pair"), ("timm", "measure_isolated")])
def test_only_a_complete_run_writes_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], page: str, measure: str
) -> None:
    monkeypatch.setattr(zoo, "RESULTS", tmp_path)
    monkeypatch.setattr(zoo, measure, result)
    assert zoo.main(["--page", page, "--only", "resnet*"]) == 0
    assert not list(tmp_path.iterdir())
    assert zoo.main(["--page", page]) == 0
    write = zoo.zoo_page if page == "zoo" else zoo.timm_page
    assert (tmp_path / f"{page}.md").read_text() == write([result(case) for case in zoo.CASES[page]])
    assert capsys.readouterr().out.endswith(f"{len(zoo.CASES[page])} exact\nwritten to results/{page}.md\n")


def test_the_list_and_a_name_that_is_not_on_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert zoo.main(["--list", "--only", "swin_v2_t -> *"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "swin_v2_t -> swin_v2_s"
    assert zoo.main(["--page", "timm", "--list", "--only", "vgg"]) == 0
    assert capsys.readouterr().out == "vgg: vgg11\n"
    assert zoo.main(["--only", "alexnet*"]) == 1
    assert capsys.readouterr().err == "Nothing in zoo.yaml is called alexnet*: see --list.\n"
