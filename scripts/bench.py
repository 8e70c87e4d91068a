"""Speed and memory, with the bars that they have to meet: python scripts/bench.py [part ...]

startup   questions that need no torch
training  the real loop against a bare forward/backward/step loop on one fixed batch
loader    photographs from disk against torchvision's reference pipeline, and what the paper's network consumes
growth    `net2net.transfer` against loading the student's weights and one forward pass of each network
memory    what `net2net.transfer` needs on top of the two networks
map       finding the mapping alone, for a vision transformer of 632M parameters on the meta device

What is compared runs in turn in one process, so that a noisy machine slows both; a ratio is the median over the rounds.
The last three run on the CPU. `--rounds 8 --steps 150` sets how long it takes.
"""

import argparse
import copy
import ctypes
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision import models

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import net2net
from net2net.network import Inputs
from net2net.plan.plan import make_plan
from net2net.trace.tracer import trace
from scripts.bench_training import print_loader, print_loop, print_startup
from scripts.measure import seconds, verdict

Make = Callable[[], nn.Module]
MB = 2**20


# -- growth -------------------------------------------------------------------------------------------------------


def growth(make_teacher: Make, make_student: Make, images: Tensor, rounds: int) -> list[tuple[float, float]]:
    """For every round the seconds of loading the student and one forward pass of each, and of a transfer."""
    teacher, student = make_teacher().eval(), make_student().eval()
    state = copy.deepcopy(student.state_dict())

    @torch.no_grad()
    def plain() -> None:
        student.load_state_dict(state)
        teacher(images)
        student(images)

    def grown() -> None:
        net2net.transfer(teacher, student, images)

    plain()
    grown()
    return [(seconds(plain), seconds(grown)) for _ in range(rounds)]


@dataclass(frozen=True)
class Memory:
    """MB: the two networks, the largest tensor of both, and what work needs on top of them while it runs.

    `passes` is one forward pass of each network on the example and on the inputs that a transfer draws for its check,
    `writing` the student's weights alone (`net2net.replay`), `transfer` all of it.
    """

    networks: float
    largest: float
    passes: float
    writing: float
    transfer: float

    @property
    def own(self) -> float:
        """What a transfer needs beyond its forward passes, whose activations are the networks' and not its own."""
        return max(self.writing, self.transfer - self.passes)


def memory(make_teacher: Make, make_student: Make, size: int) -> Memory | None:
    """Measured in a process of its own, on one image; None where the system does not tell (it takes Linux's /proc)."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(_memory, make_teacher, make_student, size).result()


def _memory(make_teacher: Make, make_student: Make, size: int) -> Memory | None:
    if not Path("/proc/self/clear_refs").exists():
        return None
    torch.set_num_threads(1)  # threads have buffers of their own
    teacher, student = make_teacher().eval(), make_student().eval()
    inputs = Inputs.of(torch.randn(1, 3, size, size))

    @torch.no_grad()
    def passes() -> None:
        for each in (inputs, inputs.others()):
            teacher(*each.args)
            student(*each.args)

    def grown() -> net2net.Transfer:
        return net2net.transfer(teacher, student, inputs.args)

    passes()
    record = grown()  # the first run loads libraries
    tensors = [t.nbytes for model in (teacher, student) for t in model.state_dict().values()]
    return Memory(
        sum(tensors) / MB,
        max(tensors) / MB,
        _peak(passes),
        _peak(lambda: net2net.replay(record, teacher, student)),
        _peak(grown),
    )


def _peak(work: Callable[[], object]) -> float:
    """By how many MB the process grows, at most, while it works."""
    ctypes.CDLL(None).malloc_trim(0)  # what is free already must not hide what is needed
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def transformer(width: int, heads: int, layers: int) -> models.VisionTransformer:
    """A vision transformer on the meta device: it has shapes and no weights."""
    with torch.device("meta"):
        return models.VisionTransformer(224, 14, layers, heads, width, 4 * width)


def mapped(teacher: nn.Module, student: nn.Module, images: Tensor) -> None:
    """All that precedes the first weight: both networks traced, every unit given the one that it copies."""
    inputs = Inputs.of(images)
    make_plan(trace(teacher, inputs), trace(student, inputs), None, torch.Generator())


def print_growth(rounds: int) -> None:
    """resnet50 -> wide_resnet50_2, float32."""
    measured = growth(models.resnet50, models.wide_resnet50_2, torch.randn(8, 3, 224, 224), rounds)
    plain, grown = (statistics.median(values) for values in zip(*measured, strict=True))
    print(f"resnet50 -> wide_resnet50_2, 8 images of 224 x 224, CPU, {torch.get_num_threads()} threads:")
    print(f"load_state_dict and a forward pass of each {plain:.2f} s, transfer {grown:.2f} s")
    print(f"ratio {verdict(statistics.median(b / a for a, b in measured), 3.0)} (median of {rounds})")


def print_memory() -> None:
    """The same pair, on one small image: the activations of larger ones would hide what is measured."""
    size = 64
    found = memory(models.resnet50, models.wide_resnet50_2, size)
    if found is None:
        print("memory: not measured, it takes Linux's /proc")
        return
    print(f"resnet50 -> wide_resnet50_2, one image of {size} x {size}: both networks {found.networks:.0f} MB")
    print(
        f"on top of them transfer {found.transfer:.0f} MB, its forward passes alone (activations) {found.passes:.0f} MB"
    )
    own = verdict(found.own, found.largest, " MB")
    print(f"the rest, or writing the weights if that is more, {own} (the largest tensor)")


def print_map() -> None:
    """As large as ViT-L/14 -> ViT-H/14, in shape."""
    teacher, student = transformer(1024, 16, 24), transformer(1280, 20, 32)
    millions = [sum(p.numel() for p in model.parameters()) / 1e6 for model in (teacher, student)]
    spent = seconds(lambda: mapped(teacher, student, torch.randn(1, 3, 224, 224, device="meta")))
    print(f"vision transformers of {millions[0]:.0f}M and {millions[1]:.0f}M parameters, on the meta device:")
    print(f"the map alone {verdict(spent, 20.0, ' s')}")


def main() -> None:
    """Print what is asked for, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="the parts above; default: all")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--slim", type=float, default=None, help="width of the network; default: as the scale's")
    parser.add_argument("--photos", help="folder with train/CLASS/*.JPEG and val/CLASS/*.JPEG, for the loader")
    options = parser.parse_args()
    parts: dict[str, Callable[[], None]] = {
        "startup": print_startup,
        "training": lambda: print_loop(options.steps, options.slim),
        "loader": lambda: print_loader(options.rounds, options.photos),
        "growth": lambda: print_growth(options.rounds),
        "memory": print_memory,
        "map": print_map,
    }
    if unknown := set(options.what) - parts.keys():
        parser.error(f"there is no {', '.join(sorted(unknown))}: there are {', '.join(parts)}")
    if options.photos and not (Path(options.photos) / "train").is_dir():
        parser.error(f"{options.photos} holds no folder train: --photos takes a tree of train/CLASS/*.jpg")
    for name in options.what or parts:
        parts[name]()


if __name__ == "__main__":
    main()
