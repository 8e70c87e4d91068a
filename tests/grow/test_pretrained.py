"""Models with a config and `save_pretrained`: what is grown comes back from its folder the same, or is not saved so."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checks import assert_same, refused
from pretrained import Block, Config, Model, teacher, words
from torch import nn

from net2net import deepen, transfer, widen
from net2net.testing import look_trained


def reload(model: nn.Module, folder: Path) -> Model:
    model.save_pretrained(folder)
    again = Model(Config.from_dict(json.loads((folder / "config.json").read_text())))
    again.load_state_dict(torch.load(folder / "weights.pt"))
    return again.eval()


def assert_kept(model: nn.Module, grown: nn.Module, folder: Path, **changed) -> None:
    """The grown model computes the same, and what its folder holds is the grown model; its config has `changed`."""
    x = words()
    assert_same(model, grown, x, bar=1e-10)
    assert torch.equal(reload(grown, folder)(x), grown.eval()(x))
    assert vars(grown.config) == vars(model.config) | changed
    assert all(block.config is grown.config for block in grown.blocks)


pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize(
    ("values", "widths", "changed"),
    [
        ({}, {"*.up": 48}, {"inner": 48}),
        ({"ratio": 4.0}, {"*.up": 48}, {"ratio": 6.0}),
        (
            {"inner": 16, "length": 16, "vocabulary": 16},
            {"*.up": 20},
            {"inner": 20},
        ),  # three fields have the same value
        ({}, {"words": 2.0, "*.up": 2.0, "*.qkv": 2.0}, {"hidden": 16, "heads": 4}),
        ({}, {"words": 2.0, "*.qkv": 2.0}, {"hidden": 16, "heads": 4, "inner": 32}),  # no longer four times as wide
        ({"heads": 4}, {"words": 12, "*.up": 48, "*.qkv": 1.5}, {"hidden": 12, "heads": 6, "eps": (1 - 4 / 12) * 1e-5}),
    ],
)
def test_the_config_says_what_a_wider_model_is(values, widths, changed, tmp_path) -> None:
    model = teacher(**values)
    assert_kept(model, widen(model, words(), widths), tmp_path, **changed)


def test_what_no_config_says_is_not_saved_by_it(tmp_path) -> None:
    model = teacher()
    half = widen(model, words(), {"blocks.0.up": 48})
    inside = deepen(model, words(), "blocks.0.up")
    scaled = widen(teacher(scaled=True), words(), {"words": 2.0, "*.up": 2.0, "*.qkv": 2.0})
    whole = nn.Sequential(copy.deepcopy(model))
    wrapped = deepen(whole, words(), "0.blocks.1.out")[0]
    for grown in (half, inside, copy.deepcopy(half), wrapped):
        with refused(r"The config of Model has no value that makes .* as it is now: save it by net2net.save\(model"):
            grown.save_pretrained(tmp_path)
    with refused("What Model computes from its config changes with the sizes that have grown"):
        scaled.save_pretrained(tmp_path)
    assert not [*tmp_path.iterdir()]
    with refused("no value that makes"):
        widen(half, words(), {"blocks.0.down": 2.0}).save_pretrained(tmp_path)
    assert_kept(model, widen(half, words(), {"blocks.1.up": 48}), tmp_path, inner=48)  # now all are


@pytest.mark.parametrize("after", ["blocks.0", ["blocks.1", "blocks.0", "blocks.1"]])
def test_more_layers_are_more_blocks_of_the_stack(after: str | list[str], tmp_path) -> None:
    model = teacher().requires_grad_(False)
    grown = deepen(model, words(), after)
    new = 1 if isinstance(after, str) else len(after)
    assert_kept(model, grown, tmp_path, blocks=2 + new, kinds=["plain"] * (2 + new))
    assert [block.place for block in grown.blocks] == [*range(2 + new)]
    assert sum(p.requires_grad for p in grown.parameters()) == new * len([*model.blocks[0].parameters()])
    assert_kept(
        model, widen(grown, words(), {"*.up": 48}), tmp_path, inner=48, blocks=2 + new, kinds=grown.config.kinds
    )


def test_blocks_that_depend_on_their_place_are_not_shifted(tmp_path, monkeypatch) -> None:
    made = Block.__init__

    def alternate(block: Block, config: Config, place: int) -> None:
        made(block, config, place)
        block.local = place % 2 == 0

    monkeypatch.setattr(Block, "__init__", alternate)
    model = teacher()
    grown = deepen(model, words(), "blocks.0")
    assert len(grown.blocks) == 2 and hasattr(grown.blocks[0], "deeper")
    with refused("makes blocks.0.deeper as it is now"):
        grown.save_pretrained(tmp_path)
    assert_kept(model, deepen(model, words(), "blocks.1"), tmp_path, blocks=3, kinds=["plain"] * 3)


def test_the_eps_of_padded_norms_goes_into_the_config(tmp_path) -> None:
    model, student = teacher(heads=4), Model(Config(hidden=10, heads=5))
    transfer(model, student, words())
    assert_kept(model, student, tmp_path, hidden=10, heads=5, eps=1e-5 * 8 / 10)
    student = Model(Config(hidden=10, heads=5))
    model.norm.eps = 1e-3  # another than its config has
    transfer(model, student, words())
    with refused("has no value that makes .*eps as it is now"):
        student.save_pretrained(tmp_path)


TINY = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES = TINY | {"intermediate_size": 64}
FAMILIES: dict[str, tuple[dict, dict, str | None]] = {
    "Llama": (SIZES | {"num_key_value_heads": 2}, {"*.up_proj": 96, "*.embed_tokens": 48}, "model.layers.0"),
    "Qwen3": (SIZES | {"num_key_value_heads": 2, "head_dim": 8}, {"*.embed_tokens": 64}, "model.layers.1"),
    "GPT2": ({"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4}, {"*.mlp.c_fc": 192}, "transformer.h.0"),
    "GPTNeoX": (SIZES, {"*.dense_h_to_4h": 96}, "gpt_neox.layers.1"),
    "OPT": (TINY | {"ffn_dim": 64, "word_embed_proj_dim": 32}, {"*.fc1": 96}, "model.decoder.layers.0"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_transformers_come_back_from_pretrained(family: str, tmp_path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.set_default_dtype(torch.float32)  # from_pretrained makes rotary tables in it, whatever the weights are
    sizes, widths, block = FAMILIES[family]
    kind = getattr(transformers, f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")
    model, x = look_trained(kind(getattr(transformers, f"{family}Config")(**sizes))), torch.randint(50, (2, 7))
    growths: list[Callable] = [lambda: widen(model, x, widths), lambda: deepen(model, x, block)]
    for folder, grow in zip((tmp_path / "wider", tmp_path / "deeper"), growths, strict=True):
        grown = grow()
        grown.save_pretrained(folder)
        again = kind.from_pretrained(folder)
        assert_same(model, grown, x, bar=1e-6)
        assert torch.equal(again.eval()(x).logits, grown.eval()(x).logits)
