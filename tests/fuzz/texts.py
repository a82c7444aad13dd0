"""Damaged texts: configurations, tokenizers, cards, adapters, recipes."""

from __future__ import annotations

import json
import os
from random import Random
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from fuzz import mutate, seeds
from fuzz.targets import given, linked, target
from fuzz.world import Input, World

_TYPES = ("llama", "bert", "gpt2", "t5", "clip", "vit", "qwen2", "gemma3", "swin", "whisper", "mixtral", "nothing", "")
# Keys that mean something to the classes of some types.
_KEYS = (
    *("num_labels", "n_layer", "num_layers", "depths", "quantization_config", "auto_map", "transformers_weights"),
    *("layer_types", "rope_parameters", "vision_config", "text_config", "is_decoder", "hidden_dim", "dtype"),
)


@target
def config(rng: Random, world: World) -> Input:
    """config.json and the other small JSON files of a model."""
    names = ("config.json", "config.json", "config.json", *seeds.TEXTS, "regraft.json", "added_tokens.json")
    name = rng.choice(names)
    folder = linked(world, name)
    data: Any = seeds.CONFIG if name == "config.json" else seeds.TEXTS.get(name, {"format": 1, "key": "x"})
    if name == "config.json" and rng.random() < 0.3:
        data = {**data, "model_type": rng.choice(_TYPES)}
    data = mutate.tree(rng, data)
    if name == "config.json" and isinstance(data, dict) and rng.random() < 0.3:
        data[rng.choice(_KEYS)] = mutate.value(rng)
    (folder / name).write_bytes(mutate.json_text(rng, data))
    if rng.random() < 0.15:  # what is said of a folder whose weights are of no use
        (folder / seeds.WEIGHTS).unlink()
    return given(rng, world, str(folder))


@target
def tokenizer(rng: Random, world: World) -> Input:
    """tokenizer.json cut short or wrong, tokenizer.model of garbage, vocabularies, templates."""
    folder = linked(world, "tokenizer.json")
    kind = rng.randrange(8)
    if kind < 4:
        (folder / "tokenizer.json").write_bytes(mutate.json_text(rng, mutate.tree(rng, seeds.TOKENIZER)))
    elif kind == 4:
        (folder / "tokenizer.json").write_bytes(mutate.cut(rng, json.dumps(seeds.TOKENIZER).encode()))
    else:
        name = rng.choice(("tokenizer.model", "spiece.model", "vocab.txt", "vocab.json", "merges.txt", "tekken.json"))
        (folder / name).write_bytes(rng.randbytes(rng.choice((0, 1, 100, 5000))))
    if rng.random() < 0.3:
        (folder / "additional_chat_templates").mkdir()
        for name in rng.sample(("a.jinja", "\udcff.jinja", "x", ".hidden.jinja", "n" * 200 + ".jinja"), 2):
            (folder / "additional_chat_templates" / name).write_bytes(rng.randbytes(50))
    if rng.random() < 0.2:
        name = (
            os.fsencode(folder) + b"/" + rng.choice((b"LICENSE\xff", b"tokenizer.model.v\xff", b"\xff.py", b"x\n.txt"))
        )
        with open(name, "wb") as file:  # noqa: PTH123 - a name that is no text
            file.write(b"x")
    return given(rng, world, str(folder))


_BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


def _bad_yaml(rng: Random, text: str) -> str:
    """A YAML text with what loaders fall for."""
    lines = text.splitlines()
    at = rng.randrange(len(lines) + 1)
    hurt = rng.choice(
        (
            "x: !!python/object/apply:os.system ['touch marker']",
            "x: !!python/name:os.system",
            "x: !!binary AAAA",
            "!!map {a: b}",
            _BOMB.rstrip(),
            "x: &x [*x]",
            "x: &x {y: *x}",
            "<<: *missing",
            "<<: [{a: 1}, {b: 2}]",
            "&k key: *k",
            "? [a, b]\n: c",
            "? {a: b}\n: c",
            "x: " + "[" * 200 + "]" * 200,
            "x: " + "[" * 60_000,
            "x: " + "{a: " * 500,
            "- " * 500,
            "x: '" + "y" * 200_000 + "'",
            "x: [" + "1, " * 20_000 + "1]",
            "%YAML 1." + "9" * 5000,
            "%YAML 9.9\n---",
            "%TAG ! tag:x,2000:\n---",
            'x: "\\UFFFFFFFF"',
            'x: "\\ud800"',
            'x: "\\ud83d\\ude00"',
            'x: "\\0"',
            "x: |9\n y",
            "x: \t- y",
            "\x00",
            "\ufeff",
            "---\nx: 1\n---\ny: 2",
            "...",
            "models: {a: 1}",
            "steps:",
            "merge_method: linear",
            "x: 1e" + "9" * 300,
            "x: 0x" + "f" * 400,
            "x: -.nan",
            "? " * 300,
            ": " * 300,
            "x: *" + "a" * 1000,
        )
    )
    return "\n".join([*lines[:at], " " * rng.choice((0, 0, 2, 4)) + hurt, *lines[at:]]) + "\n"


def _yaml(rng: Random, tree: Any) -> str:
    """A tree as YAML in block style, or as JSON, which YAML is a superset of."""
    if rng.random() < 0.3 or max(map(len, mutate.places(tree))) > 30:
        return json.dumps(tree, ensure_ascii=rng.random() < 0.5) + "\n"
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=rng.random() < 0.5)


_LONG = (
    *("1,", "1 ", "1" * 9, "1 k ", "9" * 400 + " parameters ", " ", "|", "\t", "```", "--- \n"),
    *("context length:", "context length of " + "9" * 400 + "k ", "sequence length "),
)


@target
def card(rng: Random, world: World) -> Input:
    """README.md: front matter that is no YAML or too much of it, texts that make patterns search for long."""
    folder = linked(world, "README.md")
    _, front, body = seeds.CARD.split("---\n", 2)
    kind = rng.randrange(6)
    if kind == 0:
        front = _bad_yaml(rng, front)
    elif kind == 1:
        front = _yaml(rng, mutate.tree(rng, yaml.safe_load(front)))
    elif kind == 2:
        piece = rng.choice(_LONG)
        body = rng.choice(("", "1", "context length", "```")) + piece * (
            rng.choice((10, 3000, 200_000)) // len(piece) + 1
        )
    raw = f"---\n{front}---\n{body}".encode("utf-8", "surrogatepass")
    if kind == 3:
        raw = mutate.flipped(rng, raw)
    elif kind == 4:
        raw = mutate.cut(rng, raw)
    elif kind == 5:
        raw = (
            b"---\n"
            + b"license: "
            + rng.choice((b"[", b"- ", b"&a [*a, ", b'"\\ud800"', b'"\\0"')) * rng.choice((1, 5000))
        )
        raw += b"\n---\n"
    (folder / "README.md").write_bytes(raw)
    return given(rng, world, str(folder))


_BASE = "base_model.model."
_MODULES = (
    *(f"{_BASE}model.layers.0.self_attn.q_proj", f"{_BASE}model.embed_tokens", f"{_BASE}lm_head", f"{_BASE}model.norm"),
    *("x", "", "a" * 900),
)
_PARTS = (
    *(".lora_A.weight", ".lora_B.weight", ".lora_B.bias", ".lora_magnitude_vector", ".ia3_l", ".weight", ".bias"),
    *(".lora_embedding_A", ".lora_embedding_B", ".token_adapter.trainable_tokens_delta", ".base_layer.weight"),
    *(".modules_to_save.weight", ".modules_to_save.default.weight", ".lora_A.other.weight", ".lora_A" * 50),
)
_SHAPES = (
    *((), (0,), (1,), (2, 2), (2, 8), (8, 2), (1, 8), (8, 1), (2, 8, 1), (8, 2, 1, 1), (0, 8), (16, 8), (17, 8)),
)
_SETTINGS: tuple[dict[str, Any], ...] = (
    *({"peft_type": "IA3"}, {"use_dora": True}, {"fan_in_fan_out": True}, {"use_rslora": True}),
    *({"r": 10**400}, {"r": 10**30}, {"lora_alpha": 10**400}, {"lora_alpha": float("inf")}, {"lora_alpha": 1e308}),
    *({"rank_pattern": {"(a|a|[a-z.])+#": 2}}, {"rank_pattern": {"(": 2}}, {"trainable_token_indices": [0, 1]}),
    *({"task_type": "SEQ_CLS"}, {"auto_mapping": {"base_model_class": "Trainer"}}),
)


@target
def adapter(rng: Random, world: World) -> Input:
    """Adapters: their configuration, the names and shapes of their tensors, their base."""
    folder = world.case / "adapter"
    folder.mkdir()
    settings: Any = seeds.ADAPTER
    state: dict[str, torch.Tensor] = seeds.adapter_tensors()
    kind = rng.randrange(5)
    if kind < 2:
        settings = mutate.tree(rng, settings)
    for _ in range(rng.choice((1, 2)) if kind in (1, 2, 3) else 0):
        name = rng.choice(list(state))
        tensor, what = state.pop(name), rng.randrange(9)
        if what < 3:
            state[name] = torch.zeros(rng.choice(_SHAPES))
        elif what == 3:
            state[name] = tensor.to(
                rng.choice((torch.int8, torch.bool, torch.complex64, torch.float8_e5m2, torch.float64))
            )
        elif what == 4:
            state[name] = torch.full(tensor.shape, float("nan"))
        elif what == 5:
            path, part = rng.choice(_MODULES), rng.choice(_PARTS)
            state[path + part] = torch.zeros(rng.choice(_SHAPES))
        elif what == 6:
            state = {n: t for n, t in state.items() if rng.random() < 0.5}
        state = state or {"x": torch.ones(1)}
    if kind == 3:
        settings = {**settings, **rng.choice(_SETTINGS)}
    save_file({n: t.contiguous() for n, t in state.items()}, folder / "adapter_model.safetensors")
    raw = json.dumps(settings).encode("utf-8", "surrogatepass")
    (folder / "adapter_config.json").write_bytes(mutate.json_text(rng, settings) if rng.random() < 0.1 else raw)
    if kind == 4:
        path_ = folder / "adapter_model.safetensors"
        path_.write_bytes(mutate.flipped(rng, path_.read_bytes()))
    base = world.seed("a")
    if rng.random() < 0.15:
        changed = {**seeds.CONFIG, rng.choice(list(seeds.CONFIG)): mutate.value(rng)}
        base = linked(world, "config.json")
        (base / "config.json").write_text(json.dumps(changed))
    result = given(rng, world, f"{base}+{folder}")
    result.refs += [str(folder)] if rng.random() < 0.2 else []
    return result


@target
def recipe(rng: Random, world: World) -> Input:
    """Recipes of both languages: bombs, tags, wrong types at every place, sweeps that explode."""
    places = {name: str(world.seed(name)) for name in ("base", "a", "b")}
    text = rng.choice(seeds.RECIPES).format(**places)
    kind = rng.randrange(10)
    raw: str | bytes = text
    if kind < 4:
        tree = mutate.tree(rng, yaml.safe_load(text))
        raw = _yaml(rng, tree)
    elif kind < 7:
        raw = _bad_yaml(rng, text)
    elif kind == 7:
        raw = mutate.flipped(rng, text.encode())
    elif kind == 8:
        raw = mutate.cut(rng, text.encode())
    else:
        raw = _explosion(rng, places)
    return Input([], raw, run=rng.random() < 0.2)


def _explosion(rng: Random, places: dict[str, str]) -> str:
    """Few lines that ask for very much."""
    a, b, base = places["a"], places["b"], places["base"]
    head = f"models: {{base: '{base}', a: '{a}', b: '{b}'}}\nsteps:\n"
    count = rng.choice((30, 30, 30, 300, 300, 1000, 8000))
    values = ", ".join(str(i / count) for i in range(1, count))
    pieces = ", ".join(["{models: [{model: a, layers: [0, 2]}]}"] * count)
    step = "{merge: ties, base: base, models: [a, b], "
    return rng.choice(
        (
            head + f"  m: {step}sweep: {{density: [{values}], lambda: [{values}], seed: [1, 2, 3]}}}}\n",
            head + f"  m: {step}sweep: {{density: [{values}]}}}}\n",
            head
            + f"  m: {step}sweep: {{density: [0.1{'0' * 50_000}, 0.2], seed: [{', '.join(map(str, range(400)))}]}}}}\n",
            head + "".join(f"  m{i}: {{merge: linear, models: [a, b]}}\n" for i in range(count)),
            head
            + "".join(
                f"  m{i}: {step}sweep: {{density: [{values[:300]}0], seed: [1,2,3,4,5,6,7,8]}}}}\n" for i in range(400)
            ),
            head + f"  m: {{merge: linear, models: [{', '.join(f'./m{i}' for i in range(count))}]}}\n",
            head + f"  m: {{merge: linear, models: {{{', '.join(f'./m{i}: {{weight: 1}}' for i in range(count))}}}}}\n",
            "merge_method: linear\nmodels:\n" + "- {model: ./m, parameters: {weight: 1}}\n" * count,
            "merge_method: linear\nmodels:\n" + "".join(f"- {{model: ./m{i}}}\n" for i in range(count)),
            head + f"  m: {{merge: passthrough, slices: [{{models: [{{model: a, layers: [0, {10**17}]}}]}}]}}\n",
            f"{head}  m: {{merge: passthrough, slices: [{pieces}]}}\n",
            head + f"  {'m' * 100_000}: {{merge: linear, models: [a, b]}}\n",
            head + f"  m: {{merge: linear, models: [a, b], exclude: [{', '.join(['x'] * count)}]}}\n",
            head + "  m: {merge: linear, models: [a, b], exclude: ['(a|[a-z._0-9])+#']}\n",
            head + f"  m: {{merge: slerp, models: [a, b], t: [{', '.join(['0', '1'] * count)}]}}\n",
        )
    )
