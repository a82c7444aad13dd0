"""Extract, then apply: dense deltas give the fine-tune back, the others what an independent computation says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from farm_tools import write_tokenizer
from models import save_fine_tune, save_model
from regraft.checkpoint import MemoryTensor, delta_tensor, open_checkpoint
from regraft.checkpoint.delta_record import Delta
from regraft.checkpoint.dtypes import dtype_name
from regraft.deltas import encoding
from regraft.deltas.apply import apply, open_delta
from regraft.deltas.extract import extract
from regraft.merge import bitdelta

MODELS = [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("gpt2", {}), ("bert", {})]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "changes"), MODELS, ids=["llama", "llama-tied", "gpt2", "bert"])
def test_dense_gives_the_fine_tune_back(
    family: str, changes: dict[str, Any], dtype: torch.dtype, tmp_path: Path, there_and_back: Any
) -> None:
    base = save_model(tmp_path / "base", family, dtype=dtype, **changes)
    tuned = save_fine_tune(tmp_path / "tuned", base, 1, scale=0.1)
    back = there_and_back(base, tuned)
    wanted = load_file(tuned / "model.safetensors")
    assert back.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name].view(torch.uint8), tensor.view(torch.uint8)), name
    record = Delta.read(tmp_path / "delta")
    assert (record.exact, record.relative_error) == (1.0, 0.0)
    assert record.model.digest == open_checkpoint(str(tmp_path / "back")).full_digest()
    kind = getattr(hf, hf.AutoConfig.from_pretrained(tuned).architectures[0])
    loaded, info = kind.from_pretrained(tmp_path / "back", dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert loaded.dtype == dtype
    ids = torch.arange(8).unsqueeze(0)
    assert torch.equal(loaded(ids).logits, kind.from_pretrained(tuned, dtype="auto")(ids).logits)


@pytest.mark.parametrize("tied", ["base", "tuned"])
def test_heads_tied_on_one_side(tied: str, tmp_path: Path, there_and_back: Any) -> None:
    folders = [save_model(tmp_path / name, "llama", tie_word_embeddings=name == tied) for name in ("base", "tuned")]
    tensors = load_file(folders[1] / "model.safetensors")
    tensors["model.norm.weight"] += 0.5
    save_file(tensors, folders[1] / "model.safetensors", {"format": "pt"})
    back = there_and_back(*folders)
    assert ("lm_head.weight" in back) is (tied == "base")
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    assert back.keys() == tensors.keys()
    loaded = hf.LlamaForCausalLM.from_pretrained(tmp_path / "back")
    assert torch.equal(loaded.lm_head.weight, tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]))


def test_bits_are_what_the_rule_bitdelta_merges(llama: Path, there_and_back: Any) -> None:
    back = there_and_back(llama / "base", llama / "tuned", "bits")
    base, tuned = (load_file(llama / name / "model.safetensors") for name in ("base", "tuned"))
    merged = bitdelta([tuned], base=base)
    for name, tensor in back.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("density", [0.01, 0.2, 1.0])
def test_sparse_keeps_the_largest_differences(density: float, llama: Path, there_and_back: Any) -> None:
    back = there_and_back(llama / "base", llama / "tuned", "sparse", density=density)
    base, tuned = (load_file(llama / name / "model.safetensors") for name in ("base", "tuned"))
    for name, tensor in tuned.items():
        delta = (tensor - base[name]).flatten()
        kept = max(1, round(density * delta.numel()))
        order = delta.abs().sort(descending=True, stable=True).indices[:kept]
        wanted = base[name].flatten().clone()
        wanted[order] += delta[order]
        assert torch.equal(back[name].flatten(), wanted), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_sparse_of_a_large_tensor_with_many_equal_changes(
    dtype: torch.dtype, tmp_path: Path, there_and_back: Any
) -> None:
    """Beyond what is sorted in memory, and with more ties at the threshold than may be kept."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(400, 500, generator=generator).to(dtype)
    tuned = (base.float() + torch.randint(-8, 9, (400, 500), generator=generator) / 64).to(dtype)
    for name, tensor in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file({"x.weight": tensor}, tmp_path / name / "model.safetensors")
    back = there_and_back(tmp_path / "base", tmp_path / "tuned", "sparse", density=0.05)["x.weight"]
    delta = (tuned.float() - base.float()).flatten()
    order = delta.abs().sort(descending=True, stable=True).indices[:10000]
    wanted = base.float().flatten()
    wanted[order] += delta[order].to(dtype).float()
    assert torch.equal(back.flatten(), wanted.to(dtype))


def test_bits_are_signs_and_the_mean_size(llama: Path, there_and_back: Any, tmp_path: Path) -> None:
    back = there_and_back(llama / "base", llama / "tuned", "bits")
    base, tuned = (load_file(llama / name / "model.safetensors") for name in ("base", "tuned"))
    record = Delta.read(tmp_path / "delta")
    for name, tensor in tuned.items():
        delta = tensor - base[name]
        if tensor.dim() == 1:
            assert torch.equal(back[name], tensor)
            continue
        wanted = base[name] + torch.where(delta > 0, 1.0, -1.0) * delta.double().abs().mean().float()
        assert torch.allclose(back[name], wanted, rtol=0, atol=1e-9), name
        error = (back[name].double() - tensor.double()).norm() / delta.double().norm()
        assert record.tensors[name].relative_error == pytest.approx(float(error), rel=1e-6)
    assert 0.5 < record.relative_error < 0.7  # of Gaussian changes: sqrt(1 - 2 / pi) = 0.603


@pytest.mark.parametrize("scale", [0.0, 0.5, -1.0])
def test_a_scale_multiplies_the_changes(scale: float, llama: Path, there_and_back: Any) -> None:
    back = there_and_back(llama / "base", llama / "tuned", "dense", scale)
    base, tuned = (load_file(llama / name / "model.safetensors") for name in ("base", "tuned"))
    for name, tensor in tuned.items():
        wanted = base[name].double() + scale * (tensor.double() - base[name].double())
        assert torch.allclose(back[name].double(), wanted, rtol=0, atol=1e-7), name


@given(
    st.lists(st.tuples(st.floats(width=16, allow_nan=False), st.floats(width=16, allow_nan=False)), max_size=40).map(
        lambda pairs: [pair for pair in pairs if all(abs(x) < 7e4 for x in pair)]
    ),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_dense_is_exact_for_any_finite_values(values: list[tuple[float, float]], dtype: torch.dtype) -> None:
    base, model = (torch.tensor([pair[i] for pair in values], dtype=dtype) for i in (0, 1))
    wide = delta_tensor.arithmetic(dtype)
    delta = model.to(wide) - base.to(wide)
    plain = delta_tensor.added(base.to(wide), encoding.rounded(delta, dtype).to(wide), 1.0, dtype)
    odd = int((~encoding.same_bits(plain, model)).sum())
    stored: dict[str, torch.Tensor] = {}
    writer = encoding.Dense("x", MemoryTensor("x", model), odd)

    def write(name: str, start: int, part: torch.Tensor) -> None:
        assert start == 0
        stored[name] = part.clone()

    measured = writer.write(write, 0, base.to(wide), model, delta)
    assert encoding.same_bits(measured, model).all()
    assert {spec.name: (spec.shape, spec.dtype) for spec in writer.specs} == {
        name: (tuple(part.shape), dtype_name(part.dtype)) for name, part in stored.items()
    }
    parts = {name: MemoryTensor(name, part) for name, part in stored.items()}
    back = delta_tensor.DeltaTensor(MemoryTensor("x", base), parts, "x", dtype, "dense")
    assert encoding.same_bits(back.read(), model).all()
    for start in range(len(values)):
        assert encoding.same_bits(back.read(start, start + 3), model[start : start + 3]).all()


@pytest.mark.parametrize("kind", ["dense", "sparse", "bits"])
def test_results_do_not_depend_on_slices(
    kind: str, llama: Path, there_and_back: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = there_and_back(llama / "base", llama / "tuned", kind)
    one = (tmp_path / "delta" / "model.safetensors").read_bytes()
    monkeypatch.setattr(delta_tensor, "SLICE", 1000)
    origin = open_checkpoint(str(llama / "base"))
    extract(open_checkpoint(str(llama / "tuned")), origin, tmp_path / "cut", kind)  # type: ignore[arg-type]
    apply(open_delta(tmp_path / "cut"), origin, tmp_path / "from-cut")
    found = load_file(tmp_path / "from-cut" / "model.safetensors")
    assert all(torch.allclose(found[name], whole[name], rtol=0, atol=1e-9) for name in whole)
    if kind != "bits":  # sums of slices differ in their last bit
        assert (tmp_path / "cut" / "model.safetensors").read_bytes() == one


def test_what_is_no_difference_is_stored_whole_or_not_at_all(llama: Path, tmp_path: Path, there_and_back: Any) -> None:
    """Integers that differ and tensors that only the fine-tune has come along; what only the base has is left out."""
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    for folder, other in ((base, "base"), (tuned, "tuned")):
        folder.mkdir()
        (folder / "config.json").write_bytes((llama / other / "config.json").read_bytes())
        tensors = load_file(llama / other / "model.safetensors")
        if other == "tuned":
            tensors["model.norm.weight"] = load_file(llama / "base" / "model.safetensors")["model.norm.weight"]
        extra = {"steps": torch.tensor([1 if other == "base" else 2]), "same": torch.arange(5)}
        extra[f"only_{other}.weight"] = torch.full((3, 3), 0.5)
        save_file(tensors | extra, folder / "model.safetensors", {"format": "pt"})
    back = there_and_back(base, tuned)
    wanted = load_file(tuned / "model.safetensors")
    assert back.keys() == wanted.keys()
    assert all(torch.equal(back[name], wanted[name]) for name in wanted)
    record = Delta.read(tmp_path / "delta")
    assert record.removed == ["only_base.weight"]
    encodings = {name: record.tensors[name].encoding for name in ("steps", "same", "only_tuned.weight")}
    assert encodings == {"steps": "whole", "same": "base", "only_tuned.weight": "whole"}
    assert record.tensors["model.norm.weight"].encoding == "base"


def test_files_of_the_fine_tune_come_along(llama: Path, tmp_path: Path, there_and_back: Any) -> None:
    base = save_model(tmp_path / "base", "llama")
    tuned = save_fine_tune(tmp_path / "tuned", base, 1)
    for folder in (base, tuned):
        write_tokenizer(folder)
    (tuned / "chat_template.jinja").write_text("{{ messages }}")
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps(config | {"eos_token_id": 5}))
    there_and_back(base, tuned)
    stored = sorted(path.name for path in (tmp_path / "delta" / "files").iterdir())
    assert stored == ["chat_template.jinja", "config.json"]
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == 5
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_folders_of_modules_come_along(llama: Path, tmp_path: Path, there_and_back: Any) -> None:
    """Of a sentence-transformers model, and chat templates below a folder: from the delta, not from the base."""
    base = save_model(tmp_path / "base", "llama")
    tuned = save_fine_tune(tmp_path / "tuned", base, 1)
    for folder in (base, tuned):
        for name in ("1_Pooling", "additional_chat_templates"):
            (folder / name).mkdir()
        (folder / "modules.json").write_text('[{"path": "1_Pooling"}]')
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"of": folder.name}))
        (folder / "additional_chat_templates" / "tools.jinja").write_text(folder.name)
    there_and_back(base, tuned)
    assert json.loads((tmp_path / "back" / "1_Pooling" / "config.json").read_text()) == {"of": "tuned"}
    assert (tmp_path / "back" / "additional_chat_templates" / "tools.jinja").read_text() == "tuned"
