"""JSON schemas (draft 2020-12) of both dialects, for editors: made from the option classes, never written by hand.

An option's own schema is the schema of one value; a recipe may give that value, a gradient of them, or a list of
`{filter, value}`. A step's verb and method decide which options it may have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regraft.errors import UserError, nearest
from regraft.merge.rule import REQUIRED, Rule, one_model_fields, per_model_fields
from regraft.methods import ROOMS, Method, methods
from regraft.recipe import mergekit, own, tokens
from regraft.recipe.chat_templates import TEMPLATES
from regraft.recipe.document import OUTPUTS, TENSORS
from regraft.recipe.fields import DTYPES
from regraft.recipe.option_values import OptionReader

DIALECTS = ("regraft", "mergekit")
_DRAFT = "https://json-schema.org/draft/2020-12/schema"
_TEXT = {"type": "string", "minLength": 1}
_SEED = {"type": "integer", "minimum": 0, "maximum": own.MAX_SEED}
_NUMBER = {"type": "integer", "minimum": 0}
_RANK = {"type": "integer", "minimum": 1}
_LAYERS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 2}
_IGNORED = {"description": "accepted, has no effect on the result"}
_DTYPE = {"enum": [*DTYPES, *(f"torch.{name}" for name in DTYPES)]}


def schema(dialect: str = "regraft") -> dict[str, Any]:
    """The schema of a recipe file.

    Args:
        dialect: "regraft", "mergekit", or "both" for files of either, which a top-level `merge_method` tells apart.

    Raises:
        UserError: RG303 for another dialect.
    """
    if dialect == "both":
        parts = {name: {**schema(name), "$id": f"urn:regraft:recipe:{name}"} for name in DIALECTS}
        own_ref, mergekit_ref = ({"$ref": parts[name]["$id"]} for name in DIALECTS)
        choice = {"if": {"required": ["merge_method"]}, "then": mergekit_ref, "else": own_ref}
        return {"$schema": _DRAFT, "title": "A recipe", **choice, "$defs": parts}
    if dialect not in DIALECTS:
        raise UserError("RG303", f"there is no dialect {dialect!r}", fix=nearest(dialect, DIALECTS))
    body = _own() if dialect == "regraft" else _mergekit()
    return {"$schema": _DRAFT, "title": f"A recipe in the dialect of {dialect}", **body}


def _own() -> dict[str, Any]:
    shared: dict[str, Any] = {}
    cases = []
    for verb in ROOMS:
        for one in methods(verb):
            reading = {"merge": _merge_step, "evaluate": _evaluate_step}.get(verb, _make_step)
            step = reading(one, shared)
            shared[f"{verb}.{one.name}"] = step
            case = {"properties": {verb: {"const": one.name}}, "required": [verb]}
            cases.append({"if": case, "then": {"$ref": f"#/$defs/{verb}.{one.name}"}})
    verbs = {verb: {"enum": [m.name for m in methods(verb)], "description": _summaries(verb)} for verb in ROOMS}
    shared["step"] = {
        "type": "object",
        "properties": verbs,
        "oneOf": [{"required": [verb]} for verb in ROOMS],
        "allOf": cases,
    }
    top = {
        "models": {
            "type": "object",
            "additionalProperties": _TEXT,
            "description": "names, and the path or Hub id (with @revision, +adapter and +delta) that each stands for",
        },
        "steps": {
            "type": "object",
            "additionalProperties": {"$ref": "#/$defs/step"},
            "minProperties": 1,
            "description": "what is done, in this order; the result of a step goes by its name",
        },
        "seed": {**_SEED, "description": "for methods that draw random numbers, unless a step has its own"},
    }
    return {**_closed({k: top[k] for k in own.TOP_KEYS}, ["steps"]), "$defs": shared}


def _merge_step(rule: Rule[Any], shared: dict[str, Any]) -> dict[str, Any]:
    values = _values(rule, shared)
    settings = {name: _setting(value) for name, value in values.items()}
    of_model = {name: settings[name] for name in settings if name in per_model_fields(rule.options)}
    source = _closed({"model": _TEXT, "layers": _LAYERS, **of_model}, ["model", "layers"])
    with_options = {"type": "object", "minProperties": 1}
    own_options = {**_closed(of_model), "type": ["object", "null"]}
    keys: dict[str, Any] = {
        "merge": {"const": rule.name, "description": rule.summary},
        "base": {**_TEXT, "description": "the model that the others were fine-tuned from"},
        "models": {"anyOf": [_list(_TEXT), {**with_options, "additionalProperties": own_options}]},
        "slices": _list(_closed({"models": _list(source), "base": _TEXT, **settings}, ["models"])),
        "dtype": {**_DTYPE, "description": "of the result, where out_dtype is not given"},
        "out_dtype": {**_DTYPE, "description": "of the result"},
        "exclude": {"anyOf": [_TEXT, _list(_TEXT)], "description": "regular expressions of tensors that are copied"},
        "config_from": {**_TEXT, "description": "the model whose configuration the result gets"},
        "tokenizer_from": {**_TEXT, "description": "the model whose tokenizer the result gets"},
        "tokenizer": {
            "anyOf": [_TEXT, _tokenizer(_TEXT, ["source"])],
            "description": "how vocabularies that differ become one",
        },
        "chat_template": {
            "anyOf": [{"enum": sorted(TEMPLATES)}, {"type": "string", "pattern": "\\{"}],
            "description": "the name of a chat template, or its Jinja text",
        },
        "seed": _SEED,
        "sweep": {
            **with_options,
            **_closed({name: _list({"anyOf": _forms(v)}) for name, v in {**values, "seed": _SEED}.items()}),
            "description": "one model for each combination of these values",
        },
        "output": {
            "enum": list(OUTPUTS),
            "description": "a model, of adapters of one base an adapter, or bare tensors by name",
        },
        "rank": {**_RANK, "description": "of the adapter, which is then no longer exact"},
        "energy": {
            "type": "number",
            "exclusiveMinimum": 0,
            "maximum": 1,
            "description": "the share of each tensor's squared change that the adapter keeps",
        },
        "max_rank": {**_RANK, "description": "no larger rank than this with energy"},
        "tensors": {
            "enum": list(TENSORS),
            "description": "of state dicts that differ: an error, those that all have, or those that any has",
        },
    }
    # With slices the base may stand in one of them.
    choice = [{"required": ["models", "base"] if rule.needs_base else ["models"]}, {"required": ["slices"]}]
    return {**_closed({**settings, **{k: keys[k] for k in own.MERGE_KEYS}}, ["merge"]), "oneOf": choice}


def _evaluate_step(metric: Method, shared: dict[str, Any]) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "evaluate": {"const": metric.name, "description": metric.summary},
        "models": {"anyOf": [_TEXT, _list(_TEXT)]},
        "data": {**_TEXT, "description": "the path of a data file"},
    }
    return _closed({**_values(metric, shared), **{k: keys[k] for k in own.EVALUATE_KEYS}}, ["evaluate", "models"])


def _make_step(maker: Any, shared: dict[str, Any]) -> dict[str, Any]:
    keys: dict[str, Any] = {
        maker.room: {"const": maker.name, "description": maker.summary},
        "model": {**_TEXT, "description": "the model that it starts from"},
        "data": {**_TEXT, "description": "the path of a data file"},
        **{role: _role(maker, role) for role in maker.roles},
        **{name: {**_TEXT, "description": f"the path of {what}"} for name, what in maker.sources.items()},
    }
    needed = [maker.room, "model", *(role for role, need in maker.roles.items() if need)]
    needed += ["data"] if maker.data == "needed" else []
    if maker.data == "none":
        del keys["data"]
    return _closed({**_values(maker, shared), **keys}, needed)


def _role(maker: Any, role: str) -> dict[str, Any]:
    if role in maker.several:
        return {"anyOf": [_TEXT, _list(_TEXT)], "description": f"the model that is the {role}, or a list of several"}
    return {**_TEXT, "description": f"the model that is the {role}"}


def _mergekit() -> dict[str, Any]:
    shared: dict[str, Any] = {}
    rules: list[Rule[Any]] = [m for m in methods("merge") if m.in_mergekit]
    cases = []
    for rule in rules:
        settings = {name: _setting(v) for name, v in _values(rule, shared, "mergekit").items()}
        ignored = {n: _IGNORED for n in mergekit.WITHOUT_EFFECT.get(rule.name, ()) if n not in settings}
        per_model = per_model_fields(rule.options)
        whole = _closed({**settings, **ignored})
        single = _closed({**{n: s for n, s in settings.items() if n in per_model}, **ignored})
        shared[f"{rule.name}.parameters"] = {**whole, "type": ["object", "null"]}
        shared[f"{rule.name}.model_parameters"] = {**single, "type": ["object", "null"]}
        cases.append(
            {
                "if": {"properties": {"merge_method": {"const": rule.name}}, "required": ["merge_method"]},
                "then": _parameters_of(rule),
            }
        )
    reference = {"anyOf": [_TEXT, {"type": "object", "required": ["model"]}]}
    source = _closed({"model": reference, "layer_range": _LAYERS, "parameters": {}}, ["model", "layer_range"])
    piece = _closed({"sources": _list(source), "base_model": reference, "parameters": {}}, ["sources"])
    groups = {"models": _list(_closed({"model": reference, "parameters": {}}, ["model"])), "slices": _list(piece)}
    either = [{"required": ["models"]}, {"required": ["slices"]}]
    top: dict[str, Any] = {
        "merge_method": {"enum": [r.name for r in rules], "description": _summaries("merge", rules)},
        "base_model": reference,
        **groups,
        "modules": {
            "type": "object",
            "additionalProperties": {**_closed({**groups, "parameters": {}}), "oneOf": either},
            "minProperties": 1,
            "description": "what each module of the model is made of, in families of several",
        },
        "name": {**_TEXT, "description": "of the result, for other recipes in the file"},
        "parameters": {},
        "dtype": _DTYPE,
        "out_dtype": _DTYPE,
        "tokenizer_source": reference,
        "tokenizer": _tokenizer(reference),
        "chat_template": {"anyOf": [{"enum": ["auto", *sorted(TEMPLATES)]}, {"type": "string", "pattern": "\\{"}]},
    }
    choice = [*either, {"required": ["modules"]}]
    return {**_closed(top, ["merge_method"]), "oneOf": choice, "allOf": cases, "$defs": shared}


def _tokenizer(reference: Mapping[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    """The section `tokenizer`, with models as the dialect writes them."""
    other = {"kind": {"const": "model_token"}, "model": reference, "token": _TEXT, "token_id": _NUMBER}
    model_token = {
        **_closed(other, ["kind", "model"]),
        "oneOf": [{"required": ["token"]}, {"required": ["token_id"]}],
    }
    zero = _closed({"kind": {"const": "zero"}}, ["kind"])
    row = {"anyOf": [{**reference, "not": {"type": "object", "required": ["kind"]}}, zero, model_token]}
    parts = {
        "source": {**reference, "description": "union, base, or the model whose tokenizer the result gets"},
        "tokens": {
            "type": "object",
            "additionalProperties": _closed({"source": row, "force": {"type": "boolean"}}, ["source"]),
            "description": "where models that lack a token get its row from; with force all models",
        },
        "pad_to_multiple_of": {"type": "integer", "minimum": 1, "maximum": tokens.MAX_PAD},
    }
    return _closed(parts, required)


def _parameters_of(rule: Rule[Any]) -> dict[str, Any]:
    whole = {"properties": {"parameters": {"$ref": f"#/$defs/{rule.name}.parameters"}}}
    single = {"items": {"properties": {"parameters": {"$ref": f"#/$defs/{rule.name}.model_parameters"}}}}
    pieces = {"items": {"properties": {**whole["properties"], "sources": single}}}
    groups = {**whole["properties"], "models": single, "slices": pieces}
    modules = {"additionalProperties": {"properties": groups}}
    # Slices may name their own.
    based = {"anyOf": [{"required": [key]} for key in ("base_model", "slices", "modules")]} if rule.base_first else {}
    return {"properties": {**groups, "modules": modules}, **based}


def _values(method: Method, shared: dict[str, Any], dialect: str = "regraft") -> dict[str, Any]:
    """The schema of one value of each option; classes that it needs go to `shared`."""
    whole = method.options.model_json_schema(by_alias=True, ref_template="#/$defs/{model}")
    shared.update(whole.get("$defs", {}))
    reader, per_model = OptionReader(method, dialect), per_model_fields(method.options)
    found = {}
    for name in reader.names:
        value = dict(whole["properties"][name])
        value.pop("title", None)
        if name in per_model:
            value = {**_items(value), **{k: v for k, v in value.items() if k in ("description", "default")}}
            if isinstance(value.get("default"), list):
                value["default"] = value["default"][0]
        if name in one_model_fields(method.options):
            value = {**_TEXT, "description": value["description"]}
        if dialect == "mergekit" and isinstance(method, Rule):
            value = _as_in_mergekit(method, name, value)
        found[name] = value
    return found


def _items(value: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of one entry of a list that may also be null."""
    if "items" in value:
        return dict(value["items"])
    lists = [part for part in value.get("anyOf", []) if "items" in part]
    return dict(lists[0]["items"]) if lists else {}


def _as_in_mergekit(rule: Rule[Any], name: str, value: dict[str, Any]) -> dict[str, Any]:
    default = rule.mergekit_defaults.get(name, value.get("default"))
    texts = {k: v for k, v in value.items() if k == "description"}
    leaf = {k: v for k, v in value.items() if k not in ("description", "default")}
    spelt = list(rule.mergekit_values.get(name, {}))
    if spelt:
        leaf = {"anyOf": [{"enum": spelt}, leaf]}
        default = {ours: theirs for theirs, ours in rule.mergekit_values[name].items()}.get(default, default)
    return {**leaf, **texts, **({} if default is None or default == REQUIRED else {"default": default})}


def _setting(value: Mapping[str, Any]) -> dict[str, Any]:
    """One value, a gradient, or conditions; description and default stay outside, where editors look."""
    outside = {k: v for k, v in value.items() if k in ("description", "default")}
    return {"anyOf": _forms(value), **outside}


def _forms(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    leaf = {k: v for k, v in value.items() if k not in ("description", "default")}
    plain = [leaf, _list(leaf)]
    condition = _closed({"filter": {"type": ["string", "null"]}, "value": {"anyOf": plain}}, ["value"])
    return [*plain, condition, _list(condition)]


def _closed(properties: Mapping[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    needed = {"required": required} if required else {}
    return {"type": "object", "properties": dict(properties), **needed, "additionalProperties": False}


def _list(items: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": dict(items), "minItems": 1}


def _summaries(verb: str, only: list[Rule[Any]] | None = None) -> str:
    return "; ".join(f"{m.name}: {m.summary}" for m in (only if only is not None else methods(verb)))
