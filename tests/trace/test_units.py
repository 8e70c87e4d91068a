"""The label pass, on layouts where an index kept by hand goes wrong: exact, or refused with a reason."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import net2net

pytestmark = pytest.mark.usefixtures("float64")


class Net(nn.Module):
    """Two convolutions of `a` and `b` channels with batch norm, and a head; `body` and `head` say how they meet."""

    def __init__(self, a: int, b: int, reads: int, body) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, a, 3, padding=1, bias=False), nn.BatchNorm2d(a)
        self.second = nn.Conv2d(3, b, 3, padding=1)
        self.fc = nn.Linear(reads, 4)
        self.body = body
        with torch.no_grad():
            for tensor in (self.norm.running_mean, self.norm.bias):
                tensor.normal_(0, 0.3)
            for tensor in (self.norm.running_var, self.norm.weight):
                tensor.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(F.relu(self.norm(self.first(x))), F.relu(self.second(x))))


def shuffle(u: Tensor, v: Tensor) -> Tensor:
    x = torch.cat([u, v], 1)
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w).mean((2, 3))


def gated(u: Tensor, v: Tensor) -> Tensor:
    return (u * torch.sigmoid(v.mean((2, 3), keepdim=True))).mean((2, 3))


def halves(u: Tensor, v: Tensor) -> Tensor:
    a, b = u.chunk(2, 1)
    return (a * torch.sigmoid(b)).amax((2, 3))


def in_place(u: Tensor, v: Tensor) -> Tensor:
    u += v
    return F.relu_(u).flatten(2).mean(2)


# name -> (units that `fc` reads for a and b channels of 4 x 5 maps, how they get there)
LAYOUTS = {
    "flatten": (lambda a, b: 20 * (a + b), lambda u, v: torch.cat([u, v], 1).flatten(1)),
    "view": (lambda a, b: 20 * a, lambda u, v: u.view(u.shape[0], -1)),
    "channels last": (lambda a, b: 20 * a, lambda u, v: u.permute(0, 2, 3, 1).flatten(1)),
    "pooled and flat": (lambda a, b: 21 * a, lambda u, v: torch.cat([u.mean((2, 3)), u.flatten(1)], 1)),
    "twice": (lambda a, b: 2 * a + b, lambda u, v: torch.cat([u, v, u], 1).mean((2, 3))),
    "itself": (lambda a, b: 2 * a, lambda u, v: torch.cat([u, u], 1).mean((2, 3))),
    "two faces": (lambda a, b: 2 * a, lambda u, v: torch.cat([u, -u * u], 1).mean((2, 3))),
    "flip": (lambda a, b: a, lambda u, v: u.flip(1).mean((2, 3))),
    "roll": (lambda a, b: a, lambda u, v: u.roll(2, 1).mean((2, 3))),
    "slices": (lambda a, b: a, lambda u, v: torch.cat([u[:, ::2], u[:, 1::2]], 1).mean((2, 3))),
    "stack": (lambda a, b: 2 * a, lambda u, v: torch.stack([u, u * 0.5], 2).flatten(1, 2).mean((2, 3))),
    "as another": (lambda a, b: a, lambda u, v: u.flatten(2).reshape_as(u).type_as(v).mean((2, 3))),
    "spread as another": (lambda a, b: 20 * a, lambda u, v: u[:, :, :1, :1].expand_as(u).flatten(1).to(v)),
    "pools": (lambda a, b: a, lambda u, v: F.adaptive_avg_pool2d(F.max_pool2d(u, 3, 2, 1), 1).flatten(1)),
}
JOINED = {  # both convolutions are one stream: they are widened alike
    "sum": (lambda a, b: a, lambda u, v: (u + v).mean((2, 3))),
    "gate": (lambda a, b: a, gated),
    "in place": (lambda a, b: a, in_place),
    "residual of a concatenation": (
        lambda a, b: 2 * a,
        lambda u, v: (torch.cat([u, v], 1) + torch.cat([v, u], 1)).mean((2, 3)),
    ),
}


@pytest.mark.parametrize("split", ["equal", "uneven"])
@pytest.mark.parametrize(("name", "wide"), [(n, (7, 6)) for n in LAYOUTS] + [(n, (11, 11)) for n in JOINED])
def test_a_layout_is_exact(name: str, wide: tuple[int, int], split: str) -> None:
    reads, body = (LAYOUTS | JOINED)[name]
    narrow = (3, 4) if name in LAYOUTS else (3, 3)
    teacher, student = (Net(a, b, reads(a, b), body) for a, b in (narrow, wide))
    with torch.no_grad():
        teacher.norm.weight[0] = 2.0
    net2net.transfer(teacher, student, torch.randn(2, 3, 4, 5), split=split)
    assert net2net.equivalence(teacher, student, torch.randn(5, 3, 4, 5)).max_relative <= 1e-12


@pytest.mark.parametrize(
    ("body", "reads", "message"),
    [
        (
            lambda u, v: u.softmax(1).mean((2, 3)),
            lambda a, b: a,
            "first.weight cannot grow .* as softmax .* mixes them",
        ),
        (lambda u, v: torch.fft.fft(u, dim=1).real.mean((2, 3)), lambda a, b: a, "first.weight cannot grow .* fft"),
        (
            lambda u, v: F.group_norm(u, 1).mean((2, 3)),
            lambda a, b: a,
            "has 5 units and its teacher 3: .* equally often",
        ),
        (lambda u, v: u.sum(1).flatten(1), lambda a, b: 20, "first.weight cannot grow .* as sum .* mixes them"),
        (lambda u, v: u.mean(1).flatten(1), lambda a, b: 20, "The mean .* has 5 units and its teacher 3: .* equally"),
        (
            lambda u, v: u.mean((2, 3)) * torch.arange(1.0, 1 + u.shape[1]),
            lambda a, b: a,
            "first.weight cannot grow .* a constant of its own width",
        ),
    ],
)
def test_what_mixes_units_pins_them(body, reads, message: str) -> None:
    teacher, student = Net(3, 6, reads(3, 6), body), Net(5, 6, reads(5, 6), body)
    with pytest.raises(net2net.TransferError, match=message):
        net2net.transfer(teacher, student, torch.randn(2, 3, 4, 5))


def test_shuffled_halves_that_no_map_serves_are_refused_or_exact() -> None:
    """A channel shuffle ties the two widths: with both doubled in the teacher's order every map must still be exact."""
    teacher, student = Net(4, 4, 8, shuffle), Net(8, 8, 16, shuffle)
    net2net.transfer(teacher, student, torch.randn(2, 3, 4, 5))
    assert net2net.equivalence(teacher, student, torch.randn(5, 3, 4, 5)).max_relative <= 1e-12


def test_a_different_layout_in_the_student_is_refused() -> None:
    """Both read every unit as often, in another order: only the numbers tell."""
    teacher = Net(3, 4, 60, lambda u, v: u.flatten(1))
    student = Net(5, 4, 100, lambda u, v: u.permute(0, 1, 3, 2).flatten(1))
    with pytest.raises(net2net.TransferError, match="does not compute"):
        net2net.transfer(teacher, student, torch.randn(2, 3, 4, 5))


def test_halves_of_one_layer_that_gate_each_other_stay_together() -> None:
    """A gate unites unit j with unit j + half: the first n of the student are not the first n of the teacher."""
    teacher, student = Net(4, 3, 2, halves), Net(8, 3, 4, halves)
    net2net.transfer(teacher, student, torch.randn(2, 3, 4, 5))
    assert net2net.equivalence(teacher, student, torch.randn(5, 3, 4, 5)).max_relative <= 1e-12


class Shared(nn.Module):
    """One layer, called twice, as in a recurrent network; and depthwise filters, which follow their producer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.again = nn.Conv2d(width, width, 1)
        self.fc = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(torch.relu(self.depthwise(torch.relu(self.stem(x)))))
        return self.fc(self.again(torch.tanh(x)).mean((2, 3)))


@pytest.mark.parametrize("width", [6, 7, 35])
def test_shared_layers_and_depthwise_filters(width: int) -> None:
    teacher, student = Shared(5), Shared(width)
    net2net.transfer(teacher, student, torch.randn(2, 3, 6, 7), split="uneven")
    assert net2net.equivalence(teacher, student, torch.randn(3, 3, 6, 7)).max_relative <= 1e-12


class Grouped(nn.Module):
    """A grouped convolution, whose copies would have to stay in their group."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, width, 1), nn.Conv2d(width, width, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.grouped(self.stem(x)).mean((2, 3))[:, :2]


def test_a_grouped_convolution_keeps_its_width() -> None:
    net2net.transfer(Grouped(4), Grouped(4), torch.randn(2, 3, 5, 5))
    with pytest.raises(net2net.TransferError, match=r"cannot grow from 4 to 8 units: it is the network.s output"):
        net2net.transfer(Grouped(4), Grouped(8), torch.randn(2, 3, 5, 5))


class Residual(nn.Module):
    """A trunk and a branch; `extra` stands on the trunk before the sum, so it must be an identity and not silent."""

    def __init__(self, width: int, extra: bool, branches: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.extra = nn.Conv2d(width, width, 3, padding=1) if extra else nn.Identity()
        self.branches = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(branches))
        self.fc = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.extra(torch.relu(self.stem(x)))
        for branch in self.branches:
            x = x + torch.tanh(branch(x))
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("width", [4, 9])
def test_a_new_layer_on_the_trunk_is_an_identity_and_a_new_branch_is_silent(width: int) -> None:
    teacher, student = Residual(4, False, 1), Residual(width, True, 3)
    record = net2net.transfer(teacher, student, torch.randn(2, 3, 6, 6), split="uneven")
    assert net2net.equivalence(teacher, student, torch.randn(3, 3, 6, 6)).max_relative <= 1e-12
    how = {name: origin.how for name, origin in record.origins.items()}
    assert how["extra.weight"] == "identity" and how["branches.0.weight"] == "shared"
    assert how["branches.1.weight"] == how["branches.2.weight"] == "silent"
    assert not student.branches[2].weight.any()


def test_several_inputs_and_a_dict_of_outputs() -> None:
    class Pair(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.left, self.right, self.out = nn.Linear(3, width), nn.Linear(2, width), nn.Linear(width, 4)

        def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
            hidden = torch.relu(self.left(a)) * torch.sigmoid(self.right(b))
            return {
                "logits": self.out(hidden),
                "size": hidden.detach().mean(0, keepdim=True)
                * 0
                @ hidden.new_ones(1).reshape(1, 1).expand(hidden.shape[1], 1),
            }

    teacher, student = Pair(5), Pair(5)
    example = (torch.randn(4, 3), torch.randn(4, 2))
    net2net.transfer(teacher, student, example)
    assert net2net.equivalence(teacher, student, example).max_relative == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_exact_to_its_rounding(dtype: torch.dtype) -> None:
    teacher, student = (nn.Sequential(nn.Linear(6, n), nn.ReLU(), nn.Linear(n, 3)).to(dtype) for n in (7, 23))
    net2net.transfer(teacher, student, torch.randn(4, 6, dtype=dtype))
    measured = net2net.equivalence(teacher, student, torch.randn(16, 6, dtype=dtype))
    assert measured.max_relative < 8 * torch.finfo(dtype).eps


def test_growth_again_and_again() -> None:
    widths = [5, 6, 9, 63]
    networks = [nn.Sequential(nn.Linear(4, n), nn.ReLU(), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, 3)) for n in widths]
    for teacher, student in pairwise(networks):
        net2net.transfer(teacher, student, torch.randn(2, 4), split="uneven")
    assert net2net.equivalence(networks[0], networks[-1], torch.randn(9, 4)).max_relative <= 1e-12


def test_the_same_generator_gives_the_same_student_and_another_seed_another() -> None:
    teacher = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    students = []
    for seed in (0, 0, 1):
        student = nn.Sequential(nn.Linear(4, 17), nn.ReLU(), nn.Linear(17, 3))
        net2net.transfer(teacher, student, torch.randn(2, 4), generator=torch.Generator().manual_seed(seed))
        students.append(student[0].weight)
    assert torch.equal(students[0], students[1]) and not torch.equal(students[0], students[2])
