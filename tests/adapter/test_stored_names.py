"""Adapters in storage go by their contents, everything else as the engine has it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.lora.lora import LoRAAdapter
from sglang.srt.lora.lora_config import LoRAConfig
from sglang.srt.lora.lora_registry import LoRARef

from sglang_ext.adapter.stored_names import StoredNames
from sglang_ext.core.storage.keys import namespace_seed

CONFIG = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["o_proj", "embed_tokens"],
}


def adapter(seed: int = 0, **config: Any) -> LoRAAdapter:
    """An adapter as the engine keeps it."""
    shape = SimpleNamespace(num_hidden_layers=2, architectures=[], model_type="mellum")
    made = LoRAAdapter("a", LoRAConfig.from_dict({**CONFIG, **config}), shape, None, None)
    made.initialize_weights_from_tensors(weights(seed))
    return made


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = [f"model.layers.{n}.self_attn.o_proj" for n in range(2)] + ["model.embed_tokens"]
    return {
        f"base_model.model.{name}.lora_{part}.weight": torch.randn(
            (4, 16) if part == "A" else (16, 4), generator=generator
        ).bfloat16()
        for name in names
        for part in "AB"
    }


def new_id() -> str:
    """As the engine numbers what is loaded while it runs."""
    return str(LoRARef(lora_name="a", lora_path="/a").lora_id)


def seed_of(loaded: LoRAAdapter, key: str = "", salt: str | None = None) -> bytes:
    number = new_id()
    return StoredNames({number: loaded}).seed((key + number, salt))


def test_an_adapter_is_found_under_another_number() -> None:
    assert seed_of(adapter()) == seed_of(adapter())
    assert seed_of(adapter(), "mine", "salt") == seed_of(adapter(), "mine", "salt")


def test_another_adapter_of_the_same_name_is_not() -> None:
    """The number of ``--lora-paths`` is made of name and path alone."""
    number = LoRARef.deterministic_id("a", "/adapters/a")
    old, new = StoredNames({number: adapter(0)}), StoredNames({number: adapter(1)})
    assert old.seed((number, None)) != new.seed((number, None))


@pytest.mark.parametrize("name", weights(0))
def test_every_tensor_of_it_counts(name: str) -> None:
    other = adapter()
    for part in (*(layer.weights for layer in other.layers), other.embedding_layers):
        if name in part:
            part[name].reshape(-1)[3] += 1
    assert seed_of(other) != seed_of(adapter())


@pytest.mark.parametrize("config", [{"lora_alpha": 16}, {"r": 8}, {"use_rslora": True}])
def test_how_it_applies_counts(config: dict[str, Any]) -> None:
    assert seed_of(adapter(**config)) != seed_of(adapter())


def test_whose_it_is_counts_as_without_an_adapter() -> None:
    one = adapter()
    keys = [("", None), ("mine", None), ("yours", None), ("", "salt"), ("mine", "salt")]
    seeds = {seed_of(one, key, salt) for key, salt in keys}
    seeds |= {namespace_seed((key or None, salt)) for key, salt in keys}
    assert len(seeds) == 2 * len(keys)


def test_without_an_adapter_names_are_the_engines() -> None:
    names = StoredNames({new_id(): adapter()})
    for namespace in [None, (None, None), ("key", None), (None, "salt"), ("f" * 32, "salt")]:
        assert names.seed(namespace) == namespace_seed(namespace)


def test_an_adapter_that_was_unloaded_keeps_its_name() -> None:
    """What it has computed may be written after it has gone."""
    number = new_id()
    loaded = {number: adapter()}
    names = StoredNames(loaded)
    before = names.seed((number, None))
    loaded.clear()
    assert names.seed((number, None)) == before


def test_the_engines_suffix_does_not_hide_it() -> None:
    number = new_id()
    names = StoredNames({number: adapter()})
    grown = names.seed((f"{number}|elastic_ep_size=4", None))
    assert grown != namespace_seed((f"{number}|elastic_ep_size=4", None))
    assert grown != names.seed((number, None))
