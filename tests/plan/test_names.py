"""Layers that new ones have renumbered are found without a hand-written rename, and no wrong pairing passes."""

from itertools import combinations, pairwise

import pytest
from checks import assert_same, grow, refused
from networks import Net, images, mlp, trunk
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from net2net import transfer
from net2net.plan.names import candidates
from net2net.testing import look_trained

pytestmark = pytest.mark.usefixtures("float64")


def photos() -> Tensor:
    return images(3, 3, 32, 32)


def vgg(name: str, norm: bool, slim: int = 32, seed: int = 0) -> nn.Module:
    """torchvision's at a fraction of the width."""
    features = make_layers([width if width == "M" else int(width) // slim for width in cfgs[name]], norm)
    classifier = mlp(512 // slim, 12, 5)
    model = Net(
        {"features": features, "classifier": classifier}, lambda net, x: net.classifier(net.features(x).flatten(1))
    )
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return look_trained(model, photos(), seed)


DEPTH = {"A": 8, "B": 10, "D": 13, "E": 16}


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("small", "large"), [*combinations(DEPTH, 2)])
def test_vgg_grows_into_every_deeper_one(small: str, large: str, norm: bool) -> None:
    teacher, student = vgg(small, norm, seed=1), vgg(large, norm, seed=2)
    record = transfer(teacher, student, photos())
    assert_same(teacher, student, photos())
    new = {name for name, o in record.origins.items() if o.how == "identity" and name.endswith("weight")}
    assert len(new) == (DEPTH[large] - DEPTH[small]) * (1 + norm)
    if norm and (small, large) == ("A", "B"):  # torchvision's vgg11_bn and vgg13_bn
        assert new == {f"features.{k}.weight" for k in (3, 4, 10, 11)}


@pytest.mark.parametrize("norm", [False, True])
def test_vgg_grows_wider_and_deeper_at_once(norm: bool) -> None:
    teacher, student = vgg("A", norm, seed=1), vgg("D", norm, slim=16, seed=2)
    transfer(teacher, student, photos())
    assert_same(teacher, student, photos())


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("wrong", [{}, {"features.3": "features.0", "features.0": ""}])
def test_a_wrong_pairing_is_refused(norm: bool, wrong: dict[str, str]) -> None:
    with refused(None):
        transfer(vgg("A", norm), vgg("B", norm), photos(), rename=wrong)


def test_a_wrong_pairing_that_fits_by_shape_is_refused() -> None:
    """Every layer has its counterpart's shape, and the new one stands in another place than the names say."""
    teacher, student = mlp(3, 4, 4, 4, 2), mlp(3, 4, 4, 4, 4, 2)
    transfer(teacher, student, images(6, 3))
    assert_same(teacher, student, images(6, 3))
    for new in ("2", "4", "6"):
        theirs = iter(("0", "2", "4", "6"))
        names = {mine: "" if mine == new else next(theirs) for mine in ("0", "2", "4", "6", "8")}
        transfer(teacher, student, images(6, 3), rename=names)
        assert_same(teacher, student, images(6, 3))
    with refused(None):
        transfer(teacher, student, images(6, 3), rename={"2": "4", "4": "2", "6": "", "8": "6"})


def test_blocks_with_names_of_their_own_keep_them() -> None:
    record = grow(trunk(4, False, 2), trunk(6, False, 5))
    assert record.origins["branches.1.weight"].teacher == "branches.1.weight"


def test_a_layer_in_front_of_the_others_is_found() -> None:
    """It pushes all of them back, a nn.Sequential that grows by itself among them."""

    def make(deeper: bool) -> nn.Module:
        new = [nn.Linear(3, 3)] if deeper else []
        inner = nn.Sequential(*(nn.Linear(6, 6) for _ in range(1 + deeper)))
        return nn.Sequential(*new, nn.Linear(3, 6), nn.ReLU(), inner, nn.Linear(6, 2))

    record = grow(make(False), make(True), images(6, 3))
    assert record.origins["1.weight"].teacher == "0.weight"


def test_candidates_are_prefixes_and_as_they_are_comes_first() -> None:
    teacher, student = mlp(3, 4, 2), mlp(3, 4, 4, 2)
    first, earliest, closest = candidates(teacher, student)
    assert first == {} and earliest == {"3": "", "4": ""} and {"2": "", "4": "2"}.items() <= closest.items()
    transfer(teacher, student, images(6, 3))
    assert_same(teacher, student, images(6, 3))


def test_a_layer_that_no_student_layer_can_be_is_refused() -> None:
    for student in (mlp(3, 4, 3, 2), nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Conv1d(4, 2, 1), nn.Tanh())):
        with refused(None, student):
            transfer(mlp(3, 4, 5, 2), student, images(6, 3))


@pytest.mark.parametrize(("small", "large"), [((3, 4, 4, 8, 2), (3, 4, 4, 4, 8, 8, 2)), ((3, 4, 2), (3, 4, 4, 4, 2))])
def test_candidates_pair_every_layer_of_the_teacher_once_and_in_order(small: tuple, large: tuple) -> None:
    for names in candidates(mlp(*small), mlp(*large))[1:]:
        every = {str(k): names.get(str(k), str(k)) for k in range(0, 2 * len(large) - 3, 2)}
        paired = [int(theirs) for theirs in every.values() if theirs]
        assert paired == list(range(0, 2 * len(small) - 3, 2)) and all(a < b for a, b in pairwise(paired))
