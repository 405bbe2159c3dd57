# SPDX-License-Identifier: Apache-2.0
"""Folders of experts: what we write stock PEFT reads, what PEFT writes we read, and both compute the same."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dmole_kernels import ExpertHandle, convert, experts_of, load_experts, save_experts

from .families.tiny import FAMILIES, TEXT_SIZES

# PEFT 0.21 still asks transformers 5 by the old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def causal(name: str) -> Callable[[], tuple[nn.Module, dict[str, Any], list[int] | None]]:
    def build() -> tuple[nn.Module, dict[str, Any], None]:
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**TEXT_SIZES))
        ids = torch.randint(10, 40, (3, 7), generator=torch.Generator().manual_seed(1))
        return model.eval(), {"input_ids": ids}, None

    return build


def vision(name: str) -> Callable[[], tuple[nn.Module, dict[str, Any], list[int] | None]]:
    def build() -> tuple[nn.Module, dict[str, Any], list[int]]:
        batch = FAMILIES[name].batch([0, 0, 2], 3)
        return FAMILIES[name].build(), batch.arguments, batch.units

    return build


MODELS = {
    "llama": causal("Llama"),
    "qwen2": causal("Qwen2"),
    "llava": vision("llava"),
    "qwen2_5_vl": vision("qwen2_5_vl"),
}


@pytest.fixture(params=MODELS)
def build(request: pytest.FixtureRequest) -> Callable[[], tuple[nn.Module, dict[str, Any], list[int] | None]]:
    return MODELS[request.param]


def fill(parameters: Any, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        with torch.no_grad():
            parameter.normal_(std=0.2, generator=generator)


def logits(model: nn.Module, arguments: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**arguments).logits  # type: ignore[no-any-return]


def gated(handle: ExpertHandle, name: str, arguments: dict[str, Any], units: list[int] | None) -> Tensor:
    with handle.use(torch.ones(3, 1), [name], units=units):
        return logits(handle.model, arguments)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


def test_stock_peft_computes_what_we_do(build: Any, tmp_path: Path) -> None:
    model, arguments, units = build()
    handle = convert(model)
    handle.add("even", rank=4)
    handle.add("mixed", rank={"q_proj": 2, "v_proj": 5}, alpha=3.0)
    handle.add("scales", rank=3, targets=["k_proj", "o_proj"])
    for i, layer in enumerate(handle.layers.values()):
        if "scales" in layer.bank:
            layer.bank.expert("scales").alpha = 1.5 + i
    fill(handle.parameters())
    paths = save_experts(model, tmp_path)
    assert sorted(paths) == [tmp_path / name for name in ("even", "mixed", "scales")]
    base = logits(model, arguments)
    for path in paths:
        ours = gated(handle, path.name, arguments, units)
        theirs = logits(PeftModel.from_pretrained(build()[0], str(path)), arguments)
        assert (ours - base).abs().max() > 1e-2
        close(ours, theirs)


@pytest.mark.parametrize(
    "settings",
    [
        dict(r=4, lora_alpha=6),
        dict(r=4, lora_alpha=6, use_rslora=True),
        dict(
            r=4, lora_alpha=6, use_rslora=True, rank_pattern={"q_proj": 2, r"layers\.1.*v_proj": 3},
            alpha_pattern={"v_proj": 5, "layers.0.self_attn.q_proj": 7},
        ),
    ],
    ids=["plain", "rslora", "patterns"],
)  # fmt: skip
def test_we_compute_what_stock_peft_does(build: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    model, arguments, units = build()
    peft = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], **settings)).eval()
    fill(p for n, p in peft.named_parameters() if "lora_" in n)
    peft.save_pretrained(str(tmp_path / "theirs"))
    theirs = logits(peft, arguments)
    handle = convert(build()[0], ["q_proj", "v_proj"])
    assert load_experts(handle, tmp_path / "theirs") == ["theirs"]
    ours = gated(handle, "theirs", arguments, units)
    assert (ours - logits(handle.model, arguments)).abs().max() > 1e-2
    close(ours, theirs)
    assert not any(p.requires_grad for p in handle.parameters())


class Names(nn.Module):
    """Names that are endings of each other, and that a regular expression would confuse."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 6)
        self.a = nn.ModuleDict({"fc": nn.Linear(6, 6), "b": nn.ModuleDict({"fc": nn.Linear(6, 6)})})
        self.axb = nn.ModuleDict({"fc": nn.Linear(6, 6)})

    def forward(self, x: Tensor) -> Tensor:
        for linear in (self.fc, self.a["fc"], self.a["b"]["fc"], self.axb["fc"]):
            x = linear(x).relu() + x
        return x


@pytest.mark.parametrize(
    "ranks",
    [{"fc": 2}, {"fc": 2, "a.fc": 3}, {"a.b.fc": 4, "axb.fc": 2, "a.fc": 3}, {"a.fc": 3, "fc": 2, "a.b.fc": 4}],
    ids=["one", "two", "three", "longer_last"],
)
def test_names_that_end_alike_stay_apart_in_peft(ranks: dict[str, int], tmp_path: Path) -> None:
    handle = convert(Names())
    for name, rank in ranks.items():
        handle.layers[name].bank.add("charts", rank, alpha=rank * 1.5 + rank**2)
    fill(handle.parameters())
    (path,) = save_experts(handle, tmp_path)
    x = torch.randn(4, 6)
    with handle.use(torch.ones(4, 1), ["charts"]), torch.no_grad():
        ours = handle.model(x)
    peft = PeftModel.from_pretrained(Names(), str(path))
    close(ours, peft(x))
    assert sum("lora_A" in name for name, _ in peft.named_parameters()) == len(ranks)


def sequential() -> tuple[nn.Sequential, ExpertHandle]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    return model, convert(model)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    _, handle = sequential()
    handle.add("charts", rank=2, alpha=3.0)
    handle.add("maps", rank={"0": 3})
    fill(handle.parameters())
    save_experts(handle, tmp_path / "experts")
    return tmp_path / "experts"


def test_a_folder_of_folders_one_folder_and_a_list(saved: Path) -> None:
    model, handle = sequential()
    assert load_experts(model, saved) == ["charts", "maps"]
    assert handle.names == ("charts", "maps")
    assert load_experts(sequential()[0], str(saved), ["maps"]) == ["maps"]
    assert load_experts(sequential()[0], saved / "maps") == ["maps"]
    assert load_experts(sequential()[0], saved / "maps", "icons") == ["icons"]
    assert load_experts(model, [saved / "maps", saved / "charts"], ["one", "two"]) == ["one", "two"]
    assert handle.names == ("charts", "maps", "one", "two")
    tensors = load_file(saved / "charts" / "adapter_model.safetensors")
    expert = handle.layers["2"].bank.expert("charts")
    assert torch.equal(expert.lora_a, tensors["base_model.model.2.lora_A.weight"])
    assert (expert.alpha, expert.rank) == (3.0, 2)


def test_loading_is_in_place_and_leaves_the_random_state_alone(saved: Path) -> None:
    model, handle = sequential()
    handle.add("charts", rank=2, alpha=1.0)
    parameters = handle.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    state = torch.get_rng_state()
    load_experts(model, saved)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(one is two for one, two in zip(parameters, handle.parameters("charts"), strict=True))
    assert all(p.requires_grad for p in parameters)
    assert not any(p.requires_grad for p in handle.parameters("maps"))
    assert handle.layers["0"].bank.expert("charts").alpha == 3.0
    before = [p.detach().clone() for p in parameters]
    with handle.use(torch.ones(2, 1), ["charts"]):
        model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    assert not any(torch.equal(p, old) for p, old in zip(handle.parameters("charts"), before, strict=True))
    load_experts(model, saved, trainable=True)
    assert all(p.requires_grad for p in handle.parameters())
    load_experts(model, saved, trainable=False)
    assert not any(p.requires_grad for p in handle.parameters())


def test_saving_again_replaces_the_folder_whole(saved: Path) -> None:
    model, handle = sequential()
    load_experts(model, saved)
    (saved / "charts" / "README.md").write_text("ours")
    (saved / "charts" / "adapter_config.json").write_text("{half")
    handle.remove("maps")
    save_experts(handle, saved)
    assert json.loads((saved / "charts" / "adapter_config.json").read_text())["r"] == 2
    assert (saved / "charts" / "README.md").read_text() == "ours"
    assert sorted(path.name for path in saved.iterdir()) == ["charts", "maps"]


def test_a_write_that_fails_leaves_the_old_folder(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, handle = sequential()
    load_experts(model, saved)
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    fill(handle.parameters(), seed=9)

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        save_experts(model, saved)
    assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in saved.iterdir()) == ["charts", "maps"]


def test_what_is_saved(tmp_path: Path) -> None:
    model, handle = sequential()
    handle.add("charts", rank=2)
    handle.layers["0"].bank.expert("charts").to(torch.float64)
    (path,) = save_experts(model, tmp_path, ["charts"], base_name="hub/base")
    config = json.loads((path / "adapter_config.json").read_text())
    assert {key: config[key] for key in ("peft_type", "task_type", "r", "lora_alpha", "bias", "target_modules")} == {
        "peft_type": "LORA", "task_type": None, "r": 2, "lora_alpha": 4, "bias": "none", "target_modules": ["0", "2"],
    }  # fmt: skip
    assert config["base_model_name_or_path"] == "hub/base"
    tensors = load_file(path / "adapter_model.safetensors")
    assert {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()} == {
        "base_model.model.0.lora_A.weight": ((2, 6), torch.float64),
        "base_model.model.0.lora_B.weight": ((5, 2), torch.float64),
        "base_model.model.2.lora_A.weight": ((2, 5), torch.float32),
        "base_model.model.2.lora_B.weight": ((4, 2), torch.float32),
    }


def test_wrappers_around_the_model_are_not_in_the_names(saved: Path, tmp_path: Path) -> None:
    model, handle = sequential()
    wrapped = nn.DataParallel(model)
    load_experts(wrapped, saved)
    (path,) = save_experts(wrapped, tmp_path / "again", ["charts"])
    names = load_file(path / "adapter_model.safetensors").keys()
    assert names == load_file(saved / "charts" / "adapter_model.safetensors").keys()
    assert (
        list(experts_of(wrapped).layers) == list(experts_of(torch.compile(model, backend="eager")).layers) == ["0", "2"]
    )


def test_parts_in_a_checkpoint_wrapper_keep_their_names(tmp_path: Path) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = nn.Sequential(nn.Sequential(nn.Linear(6, 5)), nn.Linear(5, 4))
    handle = convert(model)
    handle.add("charts", rank=2)
    model[0] = checkpoint_wrapper(model[0])
    (path,) = save_experts(model, tmp_path)
    assert json.loads((path / "adapter_config.json").read_text())["target_modules"] == ["0.0", "1"]
    assert load_experts(model, path) == ["charts"]
    assert list(handle.base_state_dict()) == ["0.0.weight", "0.0.bias", "1.weight", "1.bias"]


def test_save_refuses_before_it_writes(tmp_path: Path) -> None:
    model, handle = sequential()
    with pytest.raises(ValueError, match="model: it has no experts to save; .* Call add"):
        save_experts(model, tmp_path)
    handle.add("charts", rank=2)
    handle.layers["0"].bank.add("a/b", 2, alpha=1.0)
    with pytest.raises(ValueError, match="names: got 'chart', which no layer holds; .* Did you mean 'charts'"):
        save_experts(model, tmp_path, ["charts", "chart"])
    with pytest.raises(ValueError, match="names: got 'a/b', which cannot be a folder; .* Call rename"):
        save_experts(model, tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "charts").mkdir()
    (tmp_path / "charts" / "thesis.tex").write_text("years of work")
    with pytest.raises(
        ValueError, match=r"folder: .*charts is there and holds \['thesis.tex'\]; expected a new folder"
    ):
        save_experts(model, tmp_path, ["charts"])
    assert (tmp_path / "charts" / "thesis.tex").exists()
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(2, 2))
    convert(empty).add("charts", rank=1)
    with pytest.raises(ValueError, match="0: expert 'charts' is on the meta device; expected values"):
        save_experts(empty, tmp_path / "meta")


def changed(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    "fields, text",
    [
        (dict(use_dora=True), "use_dora=True"),
        (dict(bias="lora_only"), "bias='lora_only'"),
        (dict(lora_bias=True), "lora_bias=True"),
        (dict(modules_to_save=["head"]), r"modules_to_save=\['head'\]"),
        (dict(target_parameters=["experts.gate_up_proj"]), r"target_parameters=\['experts.gate_up_proj'\]"),
        (dict(trainable_token_indices=[1]), r"trainable_token_indices=\[1\]"),
        (dict(layer_replication=[[0, 2]]), "layer_replication="),
        (dict(init_lora_weights="pissa_niter_4"), "init_lora_weights='pissa_niter_4'"),
        (dict(alora_invocation_tokens=[1]), "alora_invocation_tokens="),
        (dict(a_field_of_the_future={"x": 1}), "a_field_of_the_future="),
        (dict(peft_type="IA3"), "peft_type='IA3'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_adapters_of_another_kind_are_refused_by_name(saved: Path, fields: dict[str, Any], text: str) -> None:
    model, handle = sequential()
    changed(saved / "maps", **fields)
    with pytest.raises(ValueError, match=f"maps: adapter_config.json has {text}.*; expected a plain LoRA adapter"):
        load_experts(model, saved)
    assert handle.names == ()


def test_harmless_fields_are_read(saved: Path) -> None:
    changed(saved / "charts", init_lora_weights="gaussian", lora_dropout=0.1, megatron_core="megatron.core",
            qalora_group_size=16, loftq_config={}, task_type="CAUSAL_LM", layers_to_transform=[0], use_dora=False,
            modules_to_save=[], peft_version="0.99")  # fmt: skip
    assert load_experts(sequential()[0], saved) == ["charts", "maps"]


def retensored(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


A0 = "base_model.model.0.lora_A.weight"


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda t: t.update({"base_model.model.0.lora_magnitude_vector": torch.ones(5)}),
         "maps: holds the tensor 'base_model.model.0.lora_magnitude_vector'; expected only"),
        (lambda t: t.update({"transformer.0.lora_A.weight": t[A0].clone()}), "'transformer.0.lora_A.weight'"),
        (lambda t: t.pop(A0), "maps: '0' lacks 'lora_A.weight'; expected A and B"),
        (lambda t: t.clear(), "maps: adapter_model.safetensors holds no tensors"),
        (lambda t: t.update({A0: torch.ones(4, 6)}), r"maps: '0' has A \(4, 6\) and B \(5, 3\); expected the rank 3"),
        (lambda t: t.update({A0: torch.ones(3, 7)}), r"'maps': '0' has A \(3, 7\) and B \(5, 3\); expected \(3, 6\)"),
        (lambda t: t.update({k.replace(".0.", ".0x."): t.pop(k) for k in list(t)}),
         "expert 'maps': the model has no linear '0x'"),
    ],
    ids=["magnitude", "prefix", "half", "empty", "rank", "shape", "name"],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused_before_anything_changes(saved: Path, change: Any, text: str) -> None:
    model, handle = sequential()
    handle.add("charts", rank=2, alpha=1.0)
    before = [p.detach().clone() for p in handle.parameters()]
    retensored(saved / "maps", change)
    with pytest.raises(ValueError, match=text):
        load_experts(model, saved)
    assert handle.names == ("charts",)
    assert all(torch.equal(p, old) for p, old in zip(handle.parameters(), before, strict=True))


def test_places_that_are_not_converted_name_the_call(saved: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    text = (
        r"expert 'charts': \['0', '2'\] \(2 layers\) are not converted; .* Call convert\(model, targets=\['0', '2'\]\)"
    )
    with pytest.raises(ValueError, match=text):
        load_experts(model, saved)
    convert(model, targets=["0", "2"])
    assert load_experts(model, saved) == ["charts", "maps"]


def test_an_expert_that_exists_otherwise_is_refused(saved: Path) -> None:
    for rank, text in (
        ({"0": 2}, r"at '2': rank None here, 2 in the folder"),
        (3, "at '0': rank 3 here, 2 in the fol"),
    ):
        model, handle = sequential()
        handle.add("charts", rank=rank)
        with pytest.raises(ValueError, match=f"expert 'charts' exists with other layers or ranks .{text}"):
            load_experts(model, saved)
        assert handle.names == ("charts",)
    model, handle = sequential()
    load_experts(model, saved)
    handle.merge("charts")
    with pytest.raises(ValueError, match="expert 'charts' is merged into the base"):
        load_experts(model, saved)


def test_folders_that_are_none(saved: Path, tmp_path: Path) -> None:
    model, _ = sequential()
    with pytest.raises(ValueError, match="folders: .*nowhere has no adapter_config.json, and no folder with one in it"):
        load_experts(model, tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match="folders: .*nowhere has no adapter_config.json; expected a PEFT adapter folder"
    ):
        load_experts(model, [saved / "maps", tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="names: got 'map', which is not in .* Did you mean 'maps'"):
        load_experts(model, saved, ["map"])
    with pytest.raises(ValueError, match=r"names: got \['a', 'b'\] for 1 adapter folders"):
        load_experts(model, saved / "maps", ["a", "b"])
    with pytest.raises(ValueError, match="name='a.b' cannot name a submodule"):
        load_experts(model, saved / "maps", ["a.b"])
    (saved / "maps" / "adapter_model.safetensors").rename(saved / "maps" / "adapter_model.bin")
    with pytest.raises(ValueError, match="maps: holds adapter_model.bin, a pickle; expected safetensors"):
        load_experts(model, saved)
    (saved / "maps" / "adapter_model.bin").unlink()
    with pytest.raises(ValueError, match="maps: has no adapter_model.safetensors; expected safetensors"):
        load_experts(model, saved)
    with pytest.raises(ValueError, match="model is a str; expected a converted nn.Module or its handle"):
        load_experts("llava", saved)  # type: ignore[arg-type]


def test_a_layer_on_the_meta_device_has_no_place_for_values(saved: Path) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    convert(model)
    with pytest.raises(ValueError, match="0: the layer is on the meta device, where values are lost"):
        load_experts(model, saved)


def test_without_safetensors_the_error_says_what_to_install(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, handle = sequential()
    handle.add("charts", rank=2)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="safetensors is not installed; .* Run pip install safetensors"):
        load_experts(model, saved)
    with pytest.raises(ImportError, match="pip install safetensors"):
        save_experts(model, saved.parent / "other")
    assert not (saved.parent / "other" / "charts").exists()


def test_sharded_experts_are_gathered_and_loaded_in_place(saved: Path, tmp_path: Path) -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model, handle = sequential()
    load_experts(model, saved)
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for layer in handle.layers.values():
            for expert in layer.bank.experts.children():
                for side in ("lora_a", "lora_b"):
                    whole = getattr(expert, side).detach()
                    setattr(expert, side, nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)])))
        save_experts(model, tmp_path / "again")
        parameters = handle.parameters()
        for parameter in parameters:
            parameter.detach().zero_()
        load_experts(model, tmp_path / "again")
        assert all(one is two for one, two in zip(parameters, handle.parameters(), strict=True))
        for name in ("charts", "maps"):
            old, new = (
                load_file(folder / name / "adapter_model.safetensors") for folder in (saved, tmp_path / "again")
            )
            assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
            a0 = handle.layers["0"].bank.expert(name).lora_a
            assert torch.equal(a0.full_tensor(), old[A0])  # type: ignore[operator]
    finally:
        distributed.destroy_process_group()
