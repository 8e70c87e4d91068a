"""One small network of every architecture in timm, made wider: python scripts/timm_sweep.py [--only GLOB] [--list].

Writes results/timm.md. With --only, the modules whose name matches are measured and printed, and nothing is written.
"""

import argparse
import fnmatch
import json
import multiprocessing
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm  # pyright: ignore[reportMissingImports] (the extra "zoo")
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from experiments.machine import describe as hardware  # noqa: E402 (the checkout is not installed)
from net2net import TransferError, describe, equivalence, widen  # noqa: E402
from net2net.testing import look_trained  # noqa: E402
from scripts import zoo  # noqa: E402

PAGE = ROOT / "results" / "timm.md"
FACTOR = 1.5
SECONDS = 120  # of one core, so that other work on the machine does not count
GIBIBYTES = 16
SIZES = (64, 96, 128, 160, 192, 224)


@dataclass(frozen=True)
class Subject:
    """A network of timm: the module that defines it, its name, the images' width, and what its constructor is told."""

    module: str
    model: str
    pixels: int
    options: dict[str, Any] = field(default_factory=dict)


SUBJECTS = [
    Subject("beit", "beit_base_patch16_224", 64, {"img_size": 64}),
    Subject("byoanet", "halonet_h1", 256),
    Subject("byobnet", "test_byobnet", 64),
    Subject("cait", "cait_xxs24_224", 64, {"img_size": 64}),
    Subject("coat", "coat_tiny", 64, {"img_size": 64}),
    Subject("convit", "convit_tiny", 64, {"img_size": 64}),
    Subject("convmixer", "convmixer_768_32", 64),
    Subject("convnext", "test_convnext", 64),
    Subject("cpubone", "cpubone_nano", 64),
    Subject("crossvit", "crossvit_tiny_240", 64),
    Subject("csatv2", "csatv2", 64),
    Subject("cspnet", "cs3darknet_focus_s", 64),
    Subject("cspnext", "cspnext_tiny", 64),
    Subject("davit", "davit_tiny", 64),
    Subject("deepseek_vit", "deepseek_vit_412m", 224, {"depth": 2, "num_classes": 10}),
    Subject("deit", "deit_tiny_patch16_224", 64, {"img_size": 64}),
    Subject("densenet", "densenet121", 64),
    Subject("dla", "dla46x_c", 64),
    Subject("dpn", "dpn48b", 64),
    Subject("edgenext", "edgenext_xx_small", 64),
    Subject("efficientformer", "efficientformer_l1", 224),
    Subject("efficientformer_v2", "efficientformerv2_s0", 64, {"img_size": 64}),
    Subject("efficientnet", "test_efficientnet", 64),
    Subject("efficientvim", "efficientvim_m1", 64),
    Subject("efficientvit_mit", "efficientvit_b0", 64),
    Subject("efficientvit_msra", "efficientvit_m0", 64),
    Subject("eva", "vit_tiny_patch16_dinov3_qkvb", 64, {"num_classes": 10}),
    Subject("fasternet", "fasternet_t0", 64),
    Subject("fastvit", "fastvit_t8", 64),
    Subject("focalnet", "focalnet_tiny_srf", 64),
    Subject("gcvit", "gcvit_xxtiny", 64, {"img_size": 64}),
    Subject("gemma4_vit", "gemma4_vit_167m", 64, {"depth": 2, "position_embedding_size": 64, "num_classes": 10}),
    Subject("ghostnet", "ghostnet_050", 64),
    Subject("hardcorenas", "hardcorenas_b", 64),
    Subject("hgnet", "hgnetv2_b0", 64),
    Subject("hiera", "hiera_tiny_224", 64, {"img_size": 64}),
    Subject("hieradet_sam2", "sam2_hiera_tiny", 64, {"num_classes": 10}),
    Subject("hrnet", "hrnet_w18_small", 64),
    Subject("iformer", "iformer_t", 64),
    Subject("inception_next", "inception_next_atto", 64),
    Subject("inception_resnet_v2", "inception_resnet_v2", 96),
    Subject("inception_v3", "inception_v3", 96),
    Subject("inception_v4", "inception_v4", 96),
    Subject("lcnetv2", "lcnetv2_small", 64),
    Subject("levit", "levit_128s", 96, {"img_size": 96}),
    Subject("lowformer", "lowformer_b0", 64),
    Subject("mambaout", "test_mambaout", 64),
    Subject("maxxvit", "test_coatnet", 64, {"img_size": 64}),
    Subject("metaformer", "poolformerv2_s12", 64),
    Subject("mlp_mixer", "gmlp_ti16_224", 64, {"img_size": 64}),
    Subject("mobilenetv3", "mobilenetv3_small_050", 64),
    Subject("mobilenetv5", "mobilenetv5_base", 64),
    Subject("mobilevit", "mobilevit_xxs", 64),
    Subject("mvitv2", "mvitv2_tiny", 64, {"img_size": 64}),
    Subject("naflexvit", "naflexvit_base_patch16_parfac_gap", 64),
    Subject("nasnet", "nasnetalarge", 64),
    Subject("nest", "nest_tiny", 64, {"img_size": 64}),
    Subject("nextvit", "nextvit_small", 64),
    Subject("nfnet", "test_nfnet", 64),
    Subject("pit", "pit_ti_224", 64, {"img_size": 64}),
    Subject("pnasnet", "pnasnet5large", 64),
    Subject("pvt_v2", "pvt_v2_b0", 64),
    Subject("qwen3_vit", "qwen3_vit_88m", 64, {"num_classes": 10}),
    Subject("rdnet", "rdnet_tiny", 64),
    Subject("regnet", "regnetx_002", 64),
    Subject("repghost", "repghostnet_050", 64),
    Subject("repvit", "repvit_m1", 64),
    Subject("res2net", "res2next50", 64),
    Subject("resnest", "resnest14d", 64),
    Subject("resnet", "test_resnet", 64),
    Subject("resnetv2", "resnetv2_18", 64),
    Subject("rexnet", "rexnet_100", 64),
    Subject("selecsls", "selecsls42", 64),
    Subject("senet", "legacy_seresnet18", 64),
    Subject("sequencer", "sequencer2d_s", 64),
    Subject("shvit", "shvit_s1", 96),
    Subject("sknet", "skresnet18", 64),
    Subject("starnet", "starnet_s050", 64),
    Subject("swiftformer", "swiftformer_xs", 64),
    Subject("swin_transformer", "swin_tiny_patch4_window7_224", 64, {"img_size": 64}),
    Subject("swin_transformer_v2", "swinv2_tiny_window8_256", 64, {"img_size": 64}),
    Subject("swin_transformer_v2_cr", "swinv2_cr_tiny_224", 64, {"img_size": 64}),
    Subject("tiny_vit", "tiny_vit_5m_224", 64),
    Subject("tnt", "tnt_s_legacy_patch16_224", 64, {"img_size": 64}),
    Subject("tresnet", "tresnet_m", 64),
    Subject("twins", "twins_svt_small", 64),
    Subject("vgg", "vgg11", 64),
    Subject("visformer", "visformer_tiny", 64, {"img_size": 64}),
    Subject("vision_transformer", "test_vit", 64),
    Subject("vision_transformer_hybrid", "vit_tiny_r_s16_p8_224", 64, {"img_size": 64}),
    Subject("vision_transformer_relpos", "test_vit_relpos", 64, {"img_size": 64}),
    Subject("vision_transformer_sam", "samvit_base_patch16_224", 64, {"img_size": 64}),
    Subject("vitamin", "vitamin_small_224", 64, {"img_size": 64}),
    Subject("volo", "volo_d1_224", 64, {"img_size": 64}),
    Subject("vovnet", "ese_vovnet19b_slim_dw", 64),
    Subject("xception", "legacy_xception", 64),
    Subject("xception_aligned", "xception41p", 64),
    Subject("xcit", "xcit_nano_12_p8_224", 64),
]

# What the constructor is told where the smallest network of a module is still too large for a minute.
OPTIONS: dict[str, dict[str, Any]] = {
    "deepseek_vit_412m": {"depth": 2},
    "gemma4_vit_167m": {"depth": 2, "position_embedding_size": 64},
}


# -- the choice ---------------------------------------------------------------------------------------------------


def choose(modules: Sequence[str]) -> Iterator[Subject]:
    """The smallest network of every module, on images as small as it takes: what SUBJECTS holds, one by one."""
    for module in modules:
        yield _fitted(module, smallest(module))


def smallest(module: str) -> str:
    """The network with the fewest parameters of a module of timm; of several the one with the shortest name."""
    with torch.device("meta"):
        sizes = {name: zoo.parameters(timm.create_model(name)) for name in timm.list_models(module=module)}
    return min(sizes, key=lambda name: (sizes[name], len(name), name))


def _fitted(module: str, name: str) -> Subject:
    """On the smallest images on which every weight has almost as much effect as on large ones.

    A stage of one position, say, has no use for its queries and keys: errors in them would not show.
    """
    published = timm.get_pretrained_cfg(name)
    assert published is not None
    options = OPTIONS.get(name, {}) | ({} if published.num_classes else {"num_classes": 10})
    made_for = Subject(module, name, published.input_size[-1], options)
    large = _effect(Subject(module, name, SIZES[-1], options)) or _effect(made_for)
    for pixels in (size for size in SIZES if size < made_for.pixels):
        for extra in ({}, {"img_size": pixels}):
            subject = Subject(module, name, pixels, options | extra)
            if (effect := _effect(subject)) and all(effect[name] >= 0.6 * part for name, part in large.items()):
                return subject
    return made_for


def _effect(subject: Subject) -> dict[str, float]:
    """For every layer what part of its units has an effect on the output; nothing if it takes no such images."""
    try:
        model = build(subject)
        model(_images(subject, 2, seed=2)).square().sum().backward()
    except Exception:  # each network has its own way to say that an image is too small
        return {}
    weights = {name: weight for name, weight in model.named_parameters() if weight.dim() > 1}
    used = {name: weight.grad.flatten(1).any(1) for name, weight in weights.items() if weight.grad is not None}
    return {name: used[name].double().mean().item() if name in used else 0.0 for name in weights}


# -- a measurement ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What one network gave.

    `sizes` are the parameters before and after, `wider` how many of its layers have more units than before, and how
    many layers there are; `alive` is how much the output varies between images, as a part of its size. `error` and
    `reason` are None where there is none.
    """

    subject: Subject
    seconds: float
    sizes: tuple[int, int] = (0, 0)
    wider: tuple[int, int] = (0, 0)
    alive: float = 0.0
    error: float | None = None
    reason: str | None = None
    fault: str | None = None

    @property
    def verdict(self) -> str:
        """exact, refused, or a fault: WRONG, CRASHED, SLOW, and DEAD for a network that could prove nothing."""
        if self.fault is not None:
            return self.fault
        if self.reason is not None:
            return "refused"
        return zoo.judged(self.alive, self.error)

    def __str__(self) -> str:
        error = "" if self.error is None else f"{self.error:8.1e}"
        grown = f"{self.wider[0]:3} of {self.wider[1]:3} layers wider"
        head = f"{self.verdict:8} {error:8} {self.seconds:6.1f} s  {grown}  {self.subject.module}: {self.subject.model}"
        return f"{head}  {self.reason or ''}".rstrip()


def build(subject: Subject) -> nn.Module:
    """The network, freshly drawn, made to look trained, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _wake(timm.create_model(subject.model, **subject.options).double())
    return look_trained(model, _images(subject, 8, seed=1))


@torch.no_grad()
def _wake(model: nn.Module) -> nn.Module:
    """Weights, tables and tokens that are drawn so small, or so even, that hardly anything comes of them, grow."""
    for weight in model.parameters():
        fan = weight[0].numel() if weight.dim() > 1 else 0
        if fan and weight.std() < 0.5 / fan**0.5:
            weight += torch.randn_like(weight) / fan**0.5
    return model


def measure(subject: Subject) -> Row:
    """Widen the network by FACTOR wherever it is free and compare on images that the growth has not seen."""
    model = build(subject)
    example, fresh = (_images(subject, 2, seed) for seed in (2, 3))
    row = partial(Row, subject, alive=zoo.spread(model, fresh))
    started = time.process_time()
    try:
        grown = widen(model, example, FACTOR)
        seconds = time.process_time() - started
        sizes, wider = _growth(model, grown)
        if sizes[0] == sizes[1]:
            return row(seconds, sizes, wider, reason=_held(model, example))
        return row(seconds, sizes, wider, error=equivalence(model, grown, fresh).max_relative)
    except TransferError as refusal:
        return row(time.process_time() - started, *_growth(model, model), reason=zoo.shorten(str(refusal)))
    except Exception as error:  # which ought never to come from inside: it is counted, and the table goes on
        reason = zoo.shorten(f"{type(error).__name__}: {error}")
        return row(time.process_time() - started, *_growth(model, model), reason=reason, fault="CRASHED")


def _images(subject: Subject, count: int, seed: int) -> Tensor:
    return zoo.images(count, subject.pixels, seed)


def _growth(model: nn.Module, grown: nn.Module) -> tuple[tuple[int, int], tuple[int, int]]:
    """The parameters before and after; how many layers have more units than before, and how many there are."""
    before, after = ({n: len(w) for n, w in m.named_parameters() if w.dim() > 1 < len(w)} for m in (model, grown))
    wider = sum(after[name] > units for name, units in before.items())
    return (zoo.parameters(model), zoo.parameters(grown)), (wider, len(before))


def _held(model: nn.Module, example: Tensor) -> str:
    """What keeps the widths of a network as they are, the most frequent reason first."""
    reasons = Counter(group.state for group in describe(model, example).groups)
    return zoo.shorten("Nothing grew. " + "; ".join(f"{reason} ({n})" for reason, n in reasons.most_common()))


# -- one process each ---------------------------------------------------------------------------------------------


def isolated(subject: Subject) -> Row:
    """`measure` in a process of its own, which may take SECONDS and GIBIBYTES: nothing that it does harms the next."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm", "torchvision"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(subject, theirs))
    process.start()
    theirs.close()
    try:
        if ours.poll(10 * SECONDS):  # asleep, or of no share in the machine
            return ours.recv()
        return Row(subject, 0.0, reason=f"It gives no result within {10 * SECONDS} s.", fault="SLOW")
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGXCPU:
            return Row(subject, SECONDS, reason=f"It takes longer than {SECONDS} s.", fault="SLOW")
        reason = f"The process ended without a result, with exit code {process.exitcode}."
        return Row(subject, 0.0, reason=reason, fault="CRASHED")
    finally:
        process.kill()
        process.join()


def _send(subject: Subject, connection: Connection) -> None:
    torch.set_num_threads(1)  # sums in a fixed order
    resource.setrlimit(resource.RLIMIT_AS, (GIBIBYTES << 30, GIBIBYTES << 30))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 10))
    with patch.object(Tensor, "float", Tensor.double):  # some networks compute parts in single precision
        connection.send(measure(subject))


# -- the page -----------------------------------------------------------------------------------------------------


def page(rows: Sequence[Row]) -> str:
    """The results as markdown."""
    once = Counter(row.subject.module for row in rows) == Counter(timm.list_modules())
    lines = [
        "# timm",
        "",
        "The smallest network, by parameters, of every module of timm that defines an architecture, each widened by",
        f"`net2net.widen(model, example, {FACTOR})`: all free hidden widths grow by half, the model's own forward pass",
        "stays. Each network was made to look trained (no constant biases, scales or heads, batch-norm statistics of",
        "images, disturbed) in float64, grown, and compared with what it had been on 2 images that the growth had not",
        "seen. The images are the smallest on which no parameter loses its effect.",
        "",
        f"- **Result:** {len(rows)} networks: {zoo.counted(row.verdict for row in rows)}",
        f"- **Modules:** {'all' if once else '**not all**'} {len(timm.list_modules())} of `timm.list_modules()`, "
        "one network each",
        f"- **Exact:** largest |before - after| at most {zoo.EXACT:.0e} of the largest |output|",
        "- **Layers wider:** weights with more units than before, of all weights with more axes than one",
        "- **Alive:** standard deviation of the output between the images over its mean size; under "
        f"{zoo.ALIVE:.0e} nothing counts",
        "- **Seconds:** of one core for `net2net.widen`, its check included",
        f"- **Limits:** {SECONDS} s of one core, the making of the network included, and {GIBIBYTES} GiB a network",
        f"- **Versions:** torch {torch.__version__}, timm {timm.__version__}",
        f"- **Hardware:** {hardware(torch.device('cpu'))}",
        "- **Command:** `python scripts/timm_sweep.py`",
        "",
        "| Module | Network | Pixels | Layers wider | Parameters, M | Alive | Error | Seconds | Verdict |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
        *map(_line, rows),
        "",
    ]
    unproved = [row for row in rows if row.reason is not None]
    if unproved:
        lines += ["## Not grown", ""]
        lines += [f"- **{row.subject.model}** ({row.verdict}): “{row.reason}”" for row in unproved]
        lines += [""]
    return "\n".join(lines)


def _line(row: Row) -> str:
    subject = row.subject
    options = ", ".join(f"{key}={value}" for key, value in subject.options.items() if key != "img_size")
    network = f"{subject.model} ({options})" if options else subject.model
    millions = " → ".join(f"{size / 1e6:.1f}" for size in row.sizes)
    error = "–" if row.error is None else f"{row.error:.1e}"
    cells = [subject.module, network, str(subject.pixels), f"{row.wider[0]} of {row.wider[1]}", millions]
    return f"| {' | '.join([*cells, f'{row.alive:.2g}', error, f'{row.seconds:.1f}', row.verdict])} |"


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a line a network and write the page; returns 1 if one came out wrong, dead, slow or crashed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", metavar="GLOB", help="measure the modules whose name matches; write nothing")
    parser.add_argument("--list", action="store_true", help="print the modules and their networks")
    parser.add_argument("--choose", action="store_true", help="print the lines of SUBJECTS anew, for this timm")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.choose:
        for subject in choose(fnmatch.filter(timm.list_modules(), options.only or "*")):
            extra = f", {json.dumps(subject.options)}" if subject.options else ""
            print(f'    Subject("{subject.module}", "{subject.model}", {subject.pixels}{extra}),', flush=True)
        return 0
    subjects = [subject for subject in SUBJECTS if fnmatch.fnmatchcase(subject.module, options.only or "*")]
    if not subjects:
        print(f"No module is called {options.only}: see --list.", file=sys.stderr)
        return 1
    if options.list:
        print("\n".join(f"{subject.module}: {subject.model}" for subject in subjects))
        return 0
    rows = []
    for subject in subjects:
        rows.append(isolated(subject))
        print(rows[-1], flush=True)
    return zoo.conclude([row.verdict for row in rows], PAGE, None if options.only else page(rows))


if __name__ == "__main__":
    sys.exit(main())
