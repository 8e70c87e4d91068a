"""Grow the networks of other libraries, and measure whether they still compute the same.

    python scripts/zoo.py                 torchvision's classifiers, every step-up of zoo.yaml: results/zoo.md
    python scripts/zoo.py --page timm     every network of timm.yaml, made wider: results/timm.md
    python scripts/zoo.py --page models   those of models.yaml, grown in every way (extra "models"): results/models.md

--list prints what would be measured. --only GLOB measures what matches, and writes no page. --jobs 8 measures eight
cases at a time, where each has a process of its own: timm's and the others, not torchvision's.
"""

import argparse
import fnmatch
import math
import multiprocessing
import resource
import signal
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from multiprocessing.connection import Connection
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
import torchvision
from torch import Tensor, nn

from experiments import files
from experiments.machine import describe
from net2net import TransferError, transfer, widen
from net2net.equivalence import compare
from net2net.errors import Fault
from net2net.network import in_mode
from net2net.testing import look_trained
from scripts import zoo_models
from scripts.zoo_models import GROWTHS, PACKAGES, PRELOADED, Growth, models_page
from scripts.zoo_networks import (
    NETWORKS,
    PAIRS,
    PIXELS,
    ZOO,
    Network,
    Pair,
    build,
    build_timm,
    count_parameters,
    images,
)

RESULTS = Path(__file__).resolve().parents[1] / "results"
SUPPORT = RESULTS.parent / "docs" / "support.md"
EXACT = 1e-10  # the largest relative error that counts as rounding, in float64
ALIVE = 0.01  # an output that varies less than this between images would hide an error in the features
FACTOR = 1.5  # by which networks of timm grow
SECONDS = 120  # a growth in a process of its own may take so long on one core: other work does not count
GIBIBYTES = 16  # and so much memory
FACTS = {"exact": EXACT, "seconds": SECONDS, "gibibytes": GIBIBYTES, "hardware": describe(torch.device("cpu"))}
CASES: dict[str, Sequence[Pair | Network | Growth]] = {"zoo": PAIRS, "timm": NETWORKS, "models": GROWTHS}


@dataclass(frozen=True)
class Result:
    """What one growth gave."""

    case: Pair | Network | Growth
    seconds: float = 0.0
    sizes: tuple[int, int] = (0, 0)  # parameters before and after
    wider: tuple[int, int] = (0, 0)  # how many layers have more units than before, and how many there are
    alive: float = 0.0  # how much the output varies between images, relative to its size
    rounding: float = 0.0  # by how much it changes if every value of the images is the next number
    error: float | None = None  # largest relative difference between before and after
    reason: str | None = None  # why there is no error
    fault: str | None = None  # CRASHED or SLOW

    @property
    def verdict(self) -> str:
        """exact, refused, or a fault: WRONG, CRASHED, SLOW, or DEAD for a network that cannot prove anything."""
        if self.fault or self.reason:
            return self.fault or "refused"
        if not self.alive > ALIVE:
            return "DEAD"
        return "exact" if self.error is not None and self.error <= EXACT else "WRONG"

    def __str__(self) -> str:
        error = "" if self.error is None else f"{self.error:8.1e}"
        return f"{self.verdict:8} {error:8} {self.seconds:6.1f} s  {self.case}  {self.reason or ''}".rstrip()


@torch.no_grad()
def variation(model: nn.Module, images: Tensor) -> float:
    """Return the output's standard deviation between images, relative to its mean size."""
    output = model(images)
    return (output.std(0).mean() / output.abs().mean()).item()


@torch.no_grad()
def rounding(model: nn.Module, images: Tensor) -> float:
    """Return the relative change of the output if every value of the images is the next number, up or down."""
    signs = torch.randn(images.shape, generator=torch.Generator().manual_seed(4)).sign()
    return compare(model(images), model(torch.nextafter(images, images + signs))).max_relative


def measure_pair(pair: Pair) -> Result:
    """Grow the teacher into the student and compare the two on images that the growth has not seen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = look_trained(build(pair.teacher).double(), images(8, pair.pixels, seed=1))
        student = look_trained(build(pair.student).double(), seed=1)

    def grow(example: Tensor) -> nn.Module:
        transfer(teacher, student, example)
        return student

    return _measure_on_images(pair, teacher, student, grow)


def measure_network(network: Network) -> Result:
    """Widen all free widths by FACTOR and compare the network with itself before, on images it has not seen."""
    model = build_timm(network)
    return _measure_on_images(network, model, model, lambda example: widen(model, example, FACTOR))


def measure_growth(growth: Growth) -> Result:
    """Grow a network as its cell says, and compare the two on every probe."""
    model, probes = zoo_models.build_model(growth), zoo_models.list_probes(growth)
    with in_mode(model, training=False):
        results = [model(**zoo_models.draw_inputs(growth, seed)) for seed in (3, 5)]
    result = _measure(growth, model, model, lambda: zoo_models.grow(growth, model), probes)
    with suppress(TransferError):  # outputs of other shapes, or empty ones, prove nothing
        result = replace(result, alive=compare(*results).max_relative)
    return result


def _measure_on_images(
    case: Pair | Network, before: nn.Module, after: nn.Module, grow: Callable[[Tensor], nn.Module]
) -> Result:
    """Measure on two images that the growth has not seen."""
    example, fresh = (images(2, case.pixels, seed) for seed in (2, 3))
    found = {"alive": variation(before, fresh)}
    if isinstance(case, Pair):
        found["rounding"] = rounding(before, fresh)
    return replace(_measure(case, before, after, lambda: grow(example), [lambda model: model(fresh)]), **found)


def _measure(
    case: Pair | Network | Growth,
    before: nn.Module,
    after: nn.Module,
    grow: Callable[[], nn.Module],
    probes: Sequence[Callable[[nn.Module], Any]],
) -> Result:
    """Grow `before`, for which `after` stands while nothing has grown, and compare what the probes make of both."""
    with in_mode(before, training=False):
        expected = [probe(before) for probe in probes]
    found: dict[str, Any] = {}
    started = time.process_time()
    try:
        after = grow()
        found["seconds"] = time.process_time() - started
        with in_mode(after, training=False):
            errors = [compare(out, probe(after)).max_relative for probe, out in zip(probes, expected, strict=True)]
        found["error"] = max(errors, key=lambda error: (math.isnan(error), error))
    except TransferError as refusal:
        found["reason"] = str(refusal)
        if isinstance(refusal, Fault):
            found["fault"] = "CRASHED"
    except Exception as error:  # a fault of net2net's, which is counted, and the table goes on
        found |= {"reason": f"{type(error).__name__}: {error}", "fault": "CRASHED"}
    found.setdefault("seconds", time.process_time() - started)
    if "reason" in found:
        found["reason"] = textwrap.shorten(found["reason"], 400, placeholder=" …")
    old, new = ({n: len(w) for n, w in m.named_parameters() if w.dim() > 1 < len(w)} for m in (before, after))
    wider = sum(new.get(name, 0) > units for name, units in old.items())
    if isinstance(case, Network) and not wider and "error" in found:
        found |= {"error": None, "reason": "No layer grew."}
    return Result(case, sizes=(count_parameters(before), count_parameters(after)), wider=(wider, len(old)), **found)


def measure_isolated(case: Network | Growth) -> Result:
    """Grow in a process of its own, limited to SECONDS and GIBIBYTES."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm", "torchvision", *(PRELOADED if isinstance(case, Growth) else ())])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(case, sender))
    process.start()
    sender.close()
    try:
        if receiver.poll(10 * SECONDS):  # it may sleep, or get no share of the machine
            return receiver.recv()
        return Result(case, reason=f"There was no result within {10 * SECONDS} s.", fault="SLOW")
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGXCPU:
            return Result(case, SECONDS, reason=f"It took longer than {SECONDS} s.", fault="SLOW")
        reason = f"The process ended without a result, with exit code {process.exitcode}."
        return Result(case, reason=reason, fault="CRASHED")
    finally:
        process.kill()
        process.join()


def _send(case: Network | Growth, sender: Connection) -> None:
    """Measure within the limits, and send the result."""
    torch.set_num_threads(1)
    if isinstance(case, Growth):
        torch.set_default_dtype(torch.double)
    resource.setrlimit(resource.RLIMIT_AS, (GIBIBYTES << 30, GIBIBYTES << 30))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 10))
    # Some networks compute parts in single precision.
    with patch.object(Tensor, "float", Tensor.double), patch.multiple(torch, float32=torch.double, float=torch.double):
        sender.send(measure_growth(case) if isinstance(case, Growth) else measure_network(case))


def summarise(results: Iterable[Result]) -> str:
    """Count the verdicts, for a page; faults are bold."""
    count = Counter(result.verdict for result in results)
    faults = "".join(f", **{count[fault]} {fault}**" for fault in ("CRASHED", "SLOW", "DEAD") if count[fault])
    wrong = f"{count['WRONG']} wrong" if not count["WRONG"] else f"**{count['WRONG']} WRONG**"
    return f"{count['exact']} exact, {count['refused']} refused, {wrong}{faults}"


def zoo_page(results: Sequence[Result]) -> str:
    """Write the page of torchvision's step-ups, as markdown."""
    page = _fill_page("zoo", results, _pair_row)
    if refused := [result for result in results if result.reason]:
        page += "\n".join(["\n## Refusals\n", ZOO["principle"], "", *map(_refusal, refused), ""])
    pairs = [result.case for result in results if isinstance(result.case, Pair)]
    names = dict.fromkeys(name for pair in pairs for name in (pair.teacher, pair.student))
    if built := [f"- {name}: `{_expression(ZOO['networks'][name])}`" for name in names if name in ZOO["networks"]]:
        heading = "\n## Networks that torchvision has no name for, or that are built for small images\n"
        page += "\n".join([heading, *built, ""])
    return page


def timm_page(results: Sequence[Result]) -> str:
    """Write the page of timm's networks, as markdown."""
    page = _fill_page("timm", results, _network_row)
    failed = [result for result in results if result.reason]
    lines = [f"- **{str(result.case).split()[-1]}** ({result.verdict}): “{result.reason}”" for result in failed]
    return page + ("\n".join(["\n## Not grown\n", *lines, ""]) if failed else "")


def _models_page(results: Sequence[Result]) -> str:
    """Write the page of other libraries' networks, as markdown."""
    return models_page(results, summarise, FACTS, {name: version(name) for name in ("torch", *PACKAGES)})


def _fill_page(name: str, results: Sequence[Result], row: Callable[[Result], str]) -> str:
    """Fill the text of a page (zoo_page.md, timm_page.md) with what was measured, and its table."""
    modules = timm.list_modules()
    is_complete = Counter(result.case.key for result in results) == Counter(modules)
    return (
        Path(__file__)
        .with_name(f"{name}_page.md")
        .read_text()
        .format(
            **{"count": len(results), "result": summarise(results), "table": "\n".join(map(row, results))},
            **FACTS,
            **{"alive": ALIVE, "pixels": PIXELS, "factor": FACTOR},
            **{"complete": "all" if is_complete else "**not all**", "modules": len(modules)},
            **{"torch": torch.__version__, "torchvision": torchvision.__version__, "timm": timm.__version__},
        )
    )


def _pair_row(result: Result) -> str:
    pair = result.case
    assert isinstance(pair, Pair)
    teacher = pair.teacher if pair.pixels == PIXELS else f"{pair.teacher} ({pair.pixels} pixels)"
    return _row(result, [pair.family, teacher, pair.student, pair.grows], [f"{result.rounding:.0e}"])


def _network_row(result: Result) -> str:
    network = result.case
    assert isinstance(network, Network)
    options = ", ".join(f"{key}={value}" for key, value in network.options.items() if key != "img_size")
    name = f"{network.model} ({options})" if options else network.model
    wider = f"{result.wider[0]} of {result.wider[1]}"
    return _row(result, [network.module, name, str(network.pixels), wider], [])


def _row(result: Result, names: list[str], between: list[str]) -> str:
    """Write a row of a table: names, sizes, alive, what lies `between`, and error, seconds, verdict."""
    millions = " → ".join(f"{size / 1e6:.1f}" for size in result.sizes)
    error = "–" if result.error is None else f"{result.error:.1e}"
    cells = [*names, millions, f"{result.alive:.2g}", *between, error, f"{result.seconds:.1f}", result.verdict]
    return f"| {' | '.join(cells)} |"


def _refusal(result: Result) -> str:
    explanation = ZOO["explanations"].get(result.case.key, "*Not explained.*")
    return f"- **{result.case.key.replace('->', '→')}:** {explanation} The message: “{result.reason}”"


def _expression(spec: dict[str, Any]) -> str:
    """Write the call that builds a network."""
    arguments = (f"{key}={value!r}" for key, value in spec.items() if key != "_target_")
    return f"{spec['_target_'].rsplit('.', 1)[1]}({', '.join(arguments)})"


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a line for each case, and write the page; return 1 if there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", choices=list(CASES), default="zoo", help="which table to measure (default: zoo)")
    parser.add_argument("--only", metavar="GLOB", default="*", help="measure what matches, and write no page")
    parser.add_argument("--jobs", type=int, default=1, help="how many cases are measured at a time (default: 1)")
    parser.add_argument("--list", action="store_true", help="print what would be measured")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # sums in a fixed order
    cases = [case for case in CASES[options.page] if fnmatch.fnmatchcase(case.key, options.only)]
    if not cases:
        print(f"Nothing in {options.page}.yaml is called {options.only}: see --list.", file=sys.stderr)
        return 1
    if options.list:
        print("\n".join(map(str, cases)))
        return 0
    results: list[Result] = []
    with ThreadPool(1 if options.page == "zoo" else options.jobs) as pool:
        for result in pool.imap(
            lambda case: measure_pair(case) if isinstance(case, Pair) else measure_isolated(case), cases
        ):
            results.append(result)
            print(result, flush=True)
    count = Counter(result.verdict for result in results)
    print(", ".join(f"{number} {verdict}" for verdict, number in count.items()))
    if options.only == "*":
        page = RESULTS / f"{options.page}.md"
        write = {"zoo": zoo_page, "timm": timm_page, "models": _models_page}[options.page]
        files.write(page, write(results).encode())
        print(f"written to results/{page.name}")
        if options.page == "models" and files.fill_block(SUPPORT, "support", zoo_models.support_block(results)):
            print(f"written to docs/{SUPPORT.name}")
    return 0 if set(count) <= {"exact", "refused"} else 1


if __name__ == "__main__":
    sys.exit(main())
