"""A farm of small model folders with a table of the truth about each: for tests of everything that looks at models.

The truth is written down from how each folder was made, or taken from transformers' own model object; nothing of it
comes from the code under test.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import models
from farm_tools import (
    LLAMA_TRUTH,
    NO_CARD,
    VOCAB,
    WIDTH,
    Entry,
    Farm,
    edit_config,
    edit_weights,
    save,
    stack,
    truth_of,
    write_card,
    write_tokenizer,
)


def make_farm(root: Path) -> Farm:
    """Build all folders below `root`; takes a few seconds."""
    farm: Farm = {}
    _llamas(farm, root)
    _berts(farm, root)
    _others(farm, root)
    _awkward(farm, root)
    return farm


def _llamas(farm: Farm, root: Path) -> None:
    base = models.model("llama")
    truth = truth_of(base) | LLAMA_TRUTH
    front = "license: apache-2.0\nlanguage: [en, de]\ndatasets: [farm/words]\npipeline_tag: text-generation"
    folder = save(base, root / "llama-base")
    write_tokenizer(folder)
    write_card(folder, front, "A context length of 64 tokens.\n")
    stated = {
        "card.licences": ("apache-2.0",),
        "card.languages": ("en", "de"),
        "card.datasets": ("farm/words",),
        "card.task": "text-generation",
        "card.silent": ("base model", "evaluation results"),
        "bases": [],
    }
    farm["llama-base"] = Entry(folder, truth | stated)

    def tuned(name: str, seed: int, parent: str = "llama-base", **truths: Any) -> Path:
        made = models.save_fine_tune(root / name, root / parent, seed)
        write_tokenizer(made)
        farm[name] = Entry(made, truth | NO_CARD | {"bases": []} | truths, parent)
        return made

    folder = tuned("llama-a", 1)
    write_card(folder, "license: mit\nbase_model: farm/llama-base\nbase_model_relation: finetune")
    farm["llama-a"].truth |= {
        "card.licences": ("mit",),
        "card.base_models": ("farm/llama-base",),
        "card.base_relation": "finetune",
        "card.silent": ("languages", "training data", "task", "evaluation results"),
        "bases": [{"source": "card", "model": "farm/llama-base", "detail": "finetune"}],
    }
    tuned("llama-b", 2)
    folder = shutil.copytree(farm["llama-a"].path, root / "llama-copy")
    farm["llama-copy"] = Entry(folder, farm["llama-a"].truth, "llama-base")

    folder = shutil.copytree(farm["llama-b"].path, root / "llama-merge")
    a, b = (load_file(farm[n].path / "model.safetensors") for n in ("llama-a", "llama-b"))
    save_file({n: (a[n] + b[n]) / 2 for n in a}, folder / "model.safetensors", {"format": "pt"})
    write_card(folder, "base_model: [farm/llama-a, farm/llama-b]\nbase_model_relation: merge")
    merged = ("farm/llama-a", "farm/llama-b")
    farm["llama-merge"] = Entry(
        folder,
        truth
        | {
            "card.licences": (),
            "card.base_models": merged,
            "bases": [{"source": "card", "model": m, "detail": "merge"} for m in merged],
        },
        "llama-base",
    )
    stranger = save(models.model("llama", seed=9), root / "llama-stranger")
    write_tokenizer(stranger)
    farm["llama-stranger"] = Entry(stranger, truth | NO_CARD)

    write_tokenizer(tuned("llama-other-tokenizer", 3), seed=1)

    folder = tuned("llama-rope", 4, **{"architecture.positions.theta": 500000.0})
    edit_config(folder, rope_parameters={"rope_theta": 500000.0, "rope_type": "default"})

    wrong = {"subject": "vocabulary", "card": "config.json: 100", "found": "weights: 96 rows"}
    vocabulary = {"architecture.configured_vocabulary": 100, "contradictions": [wrong]}
    edit_config(tuned("llama-wrong-vocabulary", 5, **vocabulary), vocab_size=100)

    zero, damaged = "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"
    folder = tuned("llama-nan", 6, **{"scan.nan": 3, "scan.inf": 1, "scan.damaged": {damaged: 4}, "scan.zero": (zero,)})

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[damaged].view(-1)[:3] = torch.nan
        tensors[damaged].view(-1)[900] = -torch.inf
        tensors[zero].zero_()

    edit_weights(folder, damage)

    folder = tuned("llama-bf16", 7, **{"size.dtypes": {"BF16": base.num_parameters()}})
    edit_weights(folder, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items()}))
    edit_config(folder, dtype="bfloat16")

    folder = tuned("llama-sharded", 8)
    loaded = hf.LlamaForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    save(loaded, folder, max_shard_size="40KB")
    assert (folder / "model.safetensors.index.json").is_file()

    folder = tuned("llama-pickle", 10)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()

    false = "This model has 7B parameters and a context length of 4,096 tokens.\n"
    folder = tuned("llama-boasting", 11)
    write_card(
        folder,
        "license: other\nlicense_name: farm-terms\nlicense_link: https://x.org/t\npipeline_tag: fill-mask",
        false,
    )
    farm["llama-boasting"].truth |= {
        "card.licences": ("farm-terms",),
        "card.licence_link": "https://x.org/t",
        "card.silent": ("languages", "training data", "base model", "evaluation results"),
        "contradictions": [
            {"subject": "task", "card": "fill-mask", "found": "causal language model"},
            {"subject": "parameters", "card": "7B parameters", "found": f"{base.num_parameters():,}"},
            {"subject": "context length", "card": "context length of 4,096", "found": "64"},
        ],
    }

    folder = tuned("llama-remote-code", 12)
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_farm.FarmModel"})
    (folder / "modeling_farm.py").write_text("raise SystemExit('this must never run')\n")

    tied = models.model("llama", tie_word_embeddings=True)
    tied.load_state_dict({n: t for n, t in base.state_dict().items() if n != "lm_head.weight"}, strict=False)
    folder = save(tied, root / "llama-tied")
    write_tokenizer(folder)
    truths = {**truth_of(tied), "architecture.tied": True, "size.head": 0, "size.tensors": 20}
    farm["llama-tied"] = Entry(folder, truth | NO_CARD | truths, "llama-base")

    deep = models.model("llama", num_hidden_layers=4)
    twice = {n: t for n, t in base.state_dict().items() if ".layers." not in n}
    for i in range(4):
        prefix = f"model.layers.{i // 2}."
        twice |= {
            f"model.layers.{i}.{n.removeprefix(prefix)}": t
            for n, t in base.state_dict().items()
            if n.startswith(prefix)
        }
    deep.load_state_dict(twice)
    folder = save(deep, root / "llama-deep")
    write_tokenizer(folder)
    shape = {**stack(0, kv_heads=2, layers=4), "size.tensors": 39}
    farm["llama-deep"] = Entry(folder, truth | NO_CARD | truth_of(deep) | shape)

    grown = hf.LlamaForCausalLM.from_pretrained(farm["llama-base"].path)
    grown.resize_token_embeddings(VOCAB + 1, mean_resizing=False)
    folder = save(grown, root / "llama-added-token")
    write_tokenizer(folder, added=("<tool>",))
    rows = {
        "size.embeddings": (VOCAB + 1) * WIDTH,
        "size.head": (VOCAB + 1) * WIDTH,
        "architecture.vocabulary": VOCAB + 1,
    }
    tokens = {"tokenizer.size": VOCAB + 1, "tokenizer.added": ("<tool>",)}
    farm["llama-added-token"] = Entry(folder, truth | NO_CARD | truth_of(grown) | rows | tokens, "llama-base")


def _berts(farm: Farm, root: Path) -> None:
    torch.manual_seed(1)
    base = hf.BertModel(models.config("bert"))
    shared = {
        **stack(0),
        "architecture.vocabulary": VOCAB,
        "architecture.context": 64,
        "architecture.positions.kind": "learned",
        "architecture.tied": None,
        "size.embeddings": (VOCAB + 64 + 2) * WIDTH,
    }
    farm["bert-base"] = Entry(
        save(base, root / "bert-base"), truth_of(base) | shared | {"architecture.head": "none", "size.head": 0}
    )
    labels = {0: "bad", 1: "good", 2: "neither"}
    swapped = {0: "good", 1: "bad", 2: "neither"}
    for name, names, seed in (("bert-labels", labels, 5), ("bert-labels-swapped", swapped, 6)):
        config = models.config("bert", id2label=names, label2id={v: k for k, v in names.items()})
        model = hf.BertForSequenceClassification(config)
        model.bert.load_state_dict(base.state_dict())
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.0005 * torch.randn(parameter.shape, generator=generator)
        folder = save(model, root / name)
        write_card(folder, "license: cc-by-nc-4.0\nlanguage: en" if name == "bert-labels" else "licence: [", "No.\n")
        truth = {
            "architecture.head": "sequence classification",
            "architecture.labels": tuple(names.values()),
            "architecture.generic_labels": False,
            "size.head": 3 * WIDTH + 3,
            "card.licences": ("cc-by-nc-4.0",) if name == "bert-labels" else (),
            "card.languages": ("en",) if name == "bert-labels" else (),
            "card.remark": None if name == "bert-labels" else "the front matter of its card is not valid YAML",
        }
        farm[name] = Entry(folder, truth_of(model) | shared | truth, "bert-base")

    folder = shutil.copytree(farm["bert-labels"].path, root / "bert-renamed-head")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for end in ("weight", "bias"):
            tensors[f"my_output.{end}"] = tensors.pop(f"classifier.{end}")

    edit_weights(folder, rename)
    farm["bert-renamed-head"] = Entry(folder, farm["bert-labels"].truth | {"size.head": 0}, "bert-base")


def _others(farm: Farm, root: Path) -> None:
    gpt2 = models.model("gpt2", bos_token_id=1, eos_token_id=2)
    folder = save(gpt2, root / "gpt2")
    farm["gpt2"] = Entry(
        folder,
        truth_of(gpt2)
        | stack(0, ffn=4 * WIDTH)
        | NO_CARD
        | {
            "architecture.vocabulary": VOCAB,
            "architecture.context": 64,
            "architecture.positions.kind": "learned",
            "architecture.head": "causal language model",
            "architecture.tied": True,
            "size.embeddings": (VOCAB + 64) * WIDTH,
            "size.head": 0,
            "tokenizer": None,
        },
    )
    roberta = models.model("roberta")
    farm["roberta"] = Entry(
        save(roberta, root / "roberta"),
        truth_of(roberta)
        | stack(0)
        | {
            "architecture.vocabulary": VOCAB,
            "architecture.context": 64,  # 66 rows, of which the first two are not positions
            "architecture.positions.kind": "learned",
            "architecture.head": "masked language model",
            "architecture.tied": True,
            "size.embeddings": (VOCAB + 66 + 2) * WIDTH,
        },
    )
    t5 = models.model("t5")
    truth = (
        truth_of(t5)
        | stack(0, name="encoder")
        | stack(1, name="decoder")
        | {
            "architecture.vocabulary": VOCAB,
            "architecture.context": None,
            "architecture.positions.kind": "relative",
            "architecture.head": "sequence to sequence",
            "architecture.tied": True,
            "size.embeddings": VOCAB * WIDTH,
            "size.head": 0,
        }
    )
    farm["t5"] = Entry(save(t5, root / "t5"), truth)
    farm["t5-tuned"] = Entry(models.save_fine_tune(root / "t5-tuned", root / "t5", 1), truth, "t5")
    vit = models.model("vit")
    farm["vit"] = Entry(
        save(vit, root / "vit"),
        truth_of(vit)
        | stack(0)
        | {
            "architecture.vocabulary": None,
            "architecture.context": None,
            "architecture.positions.kind": "learned",
            "architecture.head": "image classification",
            "architecture.tied": None,
            "architecture.labels": tuple(f"LABEL_{i}" for i in range(10)),
            "architecture.generic_labels": True,
            "size.embeddings": WIDTH + 5 * WIDTH + 16 * WIDTH + WIDTH,
            "size.head": 10 * WIDTH + 10,
        },
    )
    clip = models.model("clip")
    farm["clip"] = Entry(
        save(clip, root / "clip"),
        truth_of(clip)
        | stack(0, name="text")
        | stack(1, name="vision")
        | {
            "architecture.configured_vocabulary": VOCAB,
            "architecture.vocabulary": VOCAB,
            "architecture.context": 64,
            "architecture.head": "similarity of text and image",
            "size.embeddings": (VOCAB + 64) * WIDTH + WIDTH + 5 * WIDTH + 3 * 16 * WIDTH,
        },
    )


def _awkward(farm: Farm, root: Path) -> None:
    """Folders without weights that can be opened."""
    config: Mapping[str, Any] = {
        "architecture.classes": ("LlamaForCausalLM",),
        "architecture.model_type": "llama",
        **stack(0, kv_heads=2, layers=None),
        "architecture.stacks.0.configured_layers": 2,
        "architecture.context": 64,
        "architecture.positions.theta": 10000.0,
        "architecture.vocabulary": None,
        "architecture.configured_vocabulary": VOCAB,
        "size.parameters": None,
        "size.tensors": None,
        "scan": None,
        "kind": "model",
    }
    stub = root / "lfs-stub"
    stub.mkdir()
    shutil.copy(farm["llama-a"].path / "config.json", stub)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 101048\n"
    (stub / "model.safetensors").write_text(pointer)
    farm["lfs-stub"] = Entry(stub, dict(config))

    packed = shutil.copytree(farm["llama-a"].path, root / "llama-quantised", ignore=shutil.ignore_patterns("README.md"))
    edit_config(packed, quantization_config={"quant_method": "gptq", "bits": 4})
    farm["llama-quantised"] = Entry(packed, dict(config))

    adapter = root / "llama-lora"
    adapter.mkdir()
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": "farm/llama-base",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for layer in range(2):
        for module, rows in (("q_proj", 32), ("v_proj", 16)):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            factors[f"{prefix}.lora_A.weight"] = torch.randn(2, WIDTH, generator=generator) * 0.01
            factors[f"{prefix}.lora_B.weight"] = torch.randn(rows, 2, generator=generator) * 0.01
    save_file(factors, adapter / "adapter_model.safetensors", {"format": "pt"})
    farm["llama-lora"] = Entry(
        adapter,
        {
            "kind": "adapter",
            "adapter.kind": "LORA",
            "adapter.rank": 2,
            "adapter.alpha": 4.0,
            "adapter.targets": ("q_proj", "v_proj"),
            "adapter.base": "farm/llama-base",
            "bases": [{"source": "adapter", "model": "farm/llama-base", "detail": ""}],
            "size.parameters": None,
            "architecture.model_type": None,
        },
    )

    bare = root / "llama-without-config"
    bare.mkdir()
    shutil.copy(farm["llama-a"].path / "model.safetensors", bare)
    farm["llama-without-config"] = Entry(
        bare,
        {
            "architecture.classes": (),
            "architecture.model_type": None,
            "architecture.stacks.0.layers": 2,
            "architecture.stacks.0.hidden": None,
            "architecture.head": None,
            "architecture.context": None,
            "size.parameters": farm["llama-a"].truth["size.parameters"],
            "tokenizer": None,
        },
        "llama-base",
    )
