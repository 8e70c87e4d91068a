"""The networks of other libraries that zoo.py grows: the table models.yaml, and how its entries are built and grown."""

import copy
import importlib
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from net2net import deepen, transfer, widen
from net2net.testing import look_trained
from scripts.zoo_networks import disturb_constants

TABLE = yaml.safe_load(Path(__file__).with_name("models.yaml").read_text())
PACKAGES = ("torchvision", "transformers", "diffusers", "segmentation_models_pytorch")
PACKAGES += ("torch_geometric", "x_transformers")
# What every growth needs is imported once.
PRELOADED = (*PACKAGES, "transformers.models.llama.modeling_llama", "diffusers.models.unets.unet_2d")
LENGTH = 9  # what the inputs of the table have where another length serves as well
WIDER = {"mlp x2": ("mlp", 2.0), "stream x2": ("stream", 2.0), "stream x1.5": ("stream", 1.5), "saved": ("mlp", 2.0)}
CELLS = ("free x2", *WIDER, "deepen", "to layers", "to hidden", "to heads", "vocabulary")
WORDS = re.compile("CausalLM|LMHead|MaskedLM|ConditionalGeneration")  # classes with a vocabulary among their outputs
SUPPORT = {  # what docs/support.md calls each cell
    **{"free x2": "all that is free, × 2", "mlp x2": "inner layers, × 2", "stream x2": "stream, × 2"},
    **{"stream x1.5": "stream, × 1.5", "deepen": "a layer behind a module", "to layers": "more blocks"},
    **{"to hidden": "hidden size", "to heads": "more heads", "vocabulary": "vocabulary"},
    **{"saved": "saved and loaded"},
}


@dataclass(frozen=True)
class Growth:
    """One way to grow a network of another library."""

    library: str
    model: str
    cell: str  # one of CELLS
    entry: dict[str, Any]  # its entry of models.yaml

    @property
    def key(self) -> str:
        """What --only matches."""
        return f"{self.library.partition('.')[0]} {self.model}: {self.cell}"

    def __str__(self) -> str:
        return self.key


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return `old` with the entries of `new`, deep; None takes away what `old` has."""
    merged = dict(old)
    for key, value in new.items():
        if value is None and key in old:
            del merged[key]
        else:
            merged[key] = (
                merge(old[key], value) if isinstance(value, dict) and isinstance(old.get(key), dict) else value
            )
    return merged


def _list_growths() -> Iterator[Growth]:
    for family in TABLE["networks"]:
        shared = {key: value for key, value in family.items() if key not in ("models", "library", "draw")}
        for model, own in family["models"].items():
            entry = merge(shared, {key: value for key, value in own.items() if key != "draw"})
            entry["draw"] = own.get("draw", family["draw"])
            if isinstance(entry["draw"], str):
                entry["draw"] = TABLE["draw"][entry["draw"]]
            needs = {cell: entry.get(what) for cell, (what, _) in WIDER.items()} | {"deepen": entry.get("deepen")}
            needs |= {cell: entry.get("larger", {}).get(cell[3:]) for cell in CELLS if cell.startswith("to ")}
            needs["vocabulary"] = WORDS.search(model)
            saves = family["library"] in ("transformers", "diffusers")
            for cell in CELLS:
                if cell == "free x2" or (needs[cell] and (saves or cell != "saved")):
                    yield Growth(family["library"], model, cell, entry)


GROWTHS = list(_list_growths())


def build_model(growth: Growth, changes: dict[str, Any] | None = None, seed: int = 0) -> nn.Module:
    """Build the network in float64, with other options as `changes` say, and make it look trained."""
    options = merge(growth.entry.get("options", {}), changes or {})
    owner, name = importlib.import_module(growth.library), growth.entry.get("build", growth.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        make = getattr(owner, name)
        if config := getattr(make, "config_class", None):
            model = make(config(**options))
        else:
            model = make(**{key: _instantiate(value) for key, value in options.items()})
        model = disturb_constants(model.double().eval())
    return look_trained(model, seed=seed)


def _instantiate(value: Any) -> Any:
    return instantiate(value, _convert_="all") if isinstance(value, dict) else value


def draw_inputs(growth: Growth, seed: int, length: int = LENGTH) -> dict[str, Any]:
    """Draw the inputs of a network, with `length` in place of LENGTH."""
    generator = torch.Generator().manual_seed(seed)

    def draw(spec: dict[str, Any]) -> Any:
        if count := spec.get("list"):
            return [draw({key: value for key, value in spec.items() if key != "list"}) for _ in range(count)]
        shape = [length if size == LENGTH else size for size in spec["shape"]]
        if "below" in spec:
            return torch.randint(min(3, spec["below"] - 1), spec["below"], shape, generator=generator)
        return torch.randn(shape, generator=generator, dtype=torch.double)

    return {name: draw(spec) for name, spec in growth.entry["draw"].items()}


def grow(growth: Growth, model: nn.Module) -> nn.Module:
    """Grow a network as the cell says."""
    example, entry = draw_inputs(growth, seed=2), growth.entry
    options: dict[str, Any] = {"outputs": entry.get("outputs")}
    if growth.cell == "free x2":
        return widen(model, example, 2.0, **options)
    if growth.cell == "deepen":
        return deepen(model, example, entry["deepen"], **options)
    if growth.cell == "vocabulary":
        head = model.get_output_embeddings()  # type: ignore[operator]
        name = next(name for name, layer in model.named_modules() if layer is head)
        return widen(model, example, {name: head.out_features + 5}, new="mean", outputs="logits")
    if growth.cell in WIDER:
        what, factor = WIDER[growth.cell]
        names = entry[what] if isinstance(entry[what], list) else [entry[what]]
        grown = widen(model, example, dict.fromkeys(names, factor), **options)
        return _save_and_load(grown) if growth.cell == "saved" else grown
    student = build_model(growth, entry["larger"][growth.cell[3:]], seed=1)
    transfer(model, student, example, **options)
    return student


def _save_and_load(model: Any) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder).double().eval()
    if hasattr(model.config, "_experts_implementation"):  # a choice that is not saved; another has no float64
        loaded.config._experts_implementation = model.config._experts_implementation
    return loaded


def list_probes(growth: Growth) -> list[Callable[[Any], Any]]:
    """Return what to compare, each a function of the network."""
    fresh, kinds = draw_inputs(growth, seed=3), growth.entry.get("probes", [])
    inputs = [fresh, *(draw_inputs(growth, 4, length) for length in (6, 13) if "lengths" in kinds)]
    probes: list[Callable[[Any], Any]] = [partial(_run, given, growth.entry.get("outputs")) for given in inputs]
    if "padding" in kinds:
        probes += [partial(_run_padded, fresh, side) for side in ("left", "right")]
    if "cache" in kinds:
        probes.append(partial(_run_cached, fresh["input_ids"]))
    if growth.cell == "vocabulary":  # a new token may be generated
        return [partial(_old_entries, probe, growth.entry["options"]["vocab_size"]) for probe in probes]
    if "generate" in kinds:
        probes.append(partial(_generate, {key: x for key, x in fresh.items() if key != "decoder_input_ids"}))
    return probes


def _old_entries(probe: Callable[[Any], Any], count: int, model: Any) -> Any:
    """Return what the probe gives, without the entries of new tokens."""
    return tree_map_only(Tensor, lambda x: x[..., :count], probe(model))


def _run(inputs: dict[str, Any], counts: str | None, model: Any) -> Any:
    result = model(**inputs)
    return result if counts is None else result[counts]


def _generate(inputs: dict[str, Any], model: Any) -> Any:
    options = {"max_new_tokens": 4, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    return copy.deepcopy(model).generate(**inputs, **options)["scores"]


def _run_padded(inputs: dict[str, Tensor], side: str, model: Any) -> Any:
    mask = torch.ones_like(inputs["input_ids"])
    mask[:1, slice(3) if side == "left" else slice(-3, None)] = 0
    kept = mask[..., None].bool() if "decoder_input_ids" not in inputs else torch.ones(())
    logits = model(**inputs, attention_mask=mask)[0]
    return logits * kept if logits.dim() == 3 else logits


def _run_cached(tokens: Tensor, model: Any) -> list[Any]:
    first = model(input_ids=tokens[:, :-2], use_cache=True)
    cached = {key: first[key] for key in ("past_key_values", "cache_params") if key in first}
    return [first[0], model(input_ids=tokens[:, -2:-1], use_cache=True, **cached)[0]]


def models_page(
    results: Sequence[Any], summarise: Callable[[Any], str], facts: dict[str, Any], versions: dict[str, str]
) -> str:
    """Write the page of what growing gave: a row for each network, with a column for each cell."""
    by_library: dict[str, list[Any]] = {}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for result in results:
        library = result.case.library.partition(".")[0]
        by_library.setdefault(library, []).append(result)
        rows.setdefault((library, result.case.model), {})[result.case.cell] = result
    table = [f"| Library | Network | {' | '.join(CELLS)} |", "|---|---|" + "---|" * len(CELLS)]
    for names, row in rows.items():
        cells = ("–" if cell not in row else _show(row[cell]) for cell in CELLS)
        table.append(f"| {' | '.join((*names, *cells))} |")
    libraries = [f"- **{library}:** {len(each)} growths: {summarise(each)}" for library, each in by_library.items()]
    refused = [f"- **{each.case.model}, {each.case.cell}:** “{each.reason}”" for each in results if each.reason]
    return (
        Path(__file__)
        .with_name("models_page.md")
        .read_text()
        .format(
            **{"count": len(results), "networks": len(rows), "result": summarise(results)},
            **{"table": "\n".join(table), "libraries": "\n".join(libraries), "refusals": "\n".join(refused)},
            **{"versions": ", ".join(f"{name} {version}" for name, version in versions.items())},
            **facts,
        )
    )


def support_block(results: Sequence[Any]) -> str:
    """Write the table of docs/support.md: how many networks of each kind grew in each way, of those that were tried."""
    rows: dict[str, dict[str, list[bool]]] = {}
    for result in results:
        row = rows.setdefault(result.case.entry["kind"], {cell: [] for cell in SUPPORT})
        row[result.case.cell].append(result.verdict == "exact")
    table = [f"| networks | {' | '.join(SUPPORT.values())} |", "|---|" + "---|" * len(SUPPORT)]
    for kind, row in rows.items():
        cells = (f"{sum(grew)} of {len(grew)}" if grew else "–" for grew in row.values())
        table.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join([*table, "", "Generated by `python scripts/zoo.py --page models`."])


def _show(result: Any) -> str:
    return f"{result.error:.0e}" if result.verdict == "exact" else result.verdict
