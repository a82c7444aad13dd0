"""Models whose modules are not those of their architecture: recorded, saved, loaded again, and folded back.

A surgery is a record in the model's configuration, `regraft: {surgeries: [{kind, modules: {name: rank}}]}`, where a
matrix that became several products has `[rank, parts]` instead. `save`
writes such a model with `model_type: regraft`, so that a loader that knows nothing of surgeries refuses it in a
sentence, where the stock type would make it fill the missing matrices with random numbers; `load` builds the stock
architecture, replays the records and puts the weights in. `export` folds everything back into a stock model.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regraft.axes.module_map import classifier_of, modules_of
from regraft.axes.module_tables import MODULES
from regraft.checkpoint.json_file import read_json
from regraft.checkpoint.weights import folder_weights
from regraft.errors import UserError
from regraft.inspect.loading import quiet
from regraft.resize.low_rank import LowRankLinear, folded, is_linear, low_rank_like, replace, weight_of

KEY = "regraft"
MODEL_TYPE = "regraft"
# Families whose encoders are those of another family, which has the classifiers.
_CLASSIFIERS = {"vit_mae": "vit"}


def surgeries_of(config: Any) -> list[dict[str, Any]]:
    """The records in a configuration (of transformers, or the contents of config.json); none for a stock model.

    Raises:
        UserError: RG105 if they are malformed.
    """
    kept = config.get(KEY) if isinstance(config, Mapping) else getattr(config, KEY, None)
    found = kept.get("surgeries", []) if isinstance(kept, Mapping) else []
    if not isinstance(found, list) or not all(isinstance(one, Mapping) for one in found):
        what = "the record of what was done to the model's modules is malformed"
        raise UserError("RG105", what, where="config.json", fix="the file was edited; make the model again")
    return [dict(one) for one in found]


def record(model: Any, kind: str, modules: Mapping[str, Any]) -> None:
    """Note a surgery that was made on a model."""
    kept = dict(getattr(model.config, KEY, None) or {})
    kept["surgeries"] = [*surgeries_of(model.config), {"kind": kind, "modules": dict(modules)}]
    setattr(model.config, KEY, kept)


def save(model: Any, folder: Path) -> None:
    """Write weights and configuration; a stock model as `save_pretrained` does."""
    changed = bool(surgeries_of(model.config))
    with quiet():
        # Names as in memory for changed models: renamings of stock architectures know nothing of what was put in.
        model.save_pretrained(folder, **({"save_original_format": False} if changed else {}))
    if not changed:
        return
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config[KEY] |= {"model_type": config["model_type"], "architectures": [type(model).__name__]}
    config |= {"model_type": MODEL_TYPE, "architectures": [f"Regraft{type(model).__name__}"]}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def stock_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json would be without surgeries; the same if there are none."""
    kept = config.get(KEY)
    if not isinstance(kept, Mapping):
        return dict(config)
    plain = {name: value for name, value in config.items() if name != KEY}
    return plain | {name: kept[name] for name in ("model_type", "architectures") if name in kept}


def load(
    folder: Path | str,
    auto_class: str = "",
    *,
    allow_missing: bool = False,
    labels: Mapping[int, str] | None = None,
    seed: int = 0,
) -> Any:
    """Load a model that regraft or transformers saved, in eval mode on the CPU.

    Args:
        folder: a saved model.
        auto_class: name of a class or Auto class of transformers, to put another head on; the model's own if empty.
        allow_missing: accept that a head has no weights in the folder and starts at random.
        labels: number -> name of the classes of a new head.
        seed: of what starts at random.

    Raises:
        UserError: RG101, RG102, RG105 for a folder that holds no usable model, RG202 for weights that do not fit.
    """
    folder = Path(folder)
    model, missing = opened(folder, auto_class, labels=labels, seed=seed)
    if allow_missing and missing:
        missing = [name for name in missing if not _above_the_body(model, name)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        what = f"the folder has no weights for {missing[0]}{more}"
        raise UserError("RG202", what, where=str(folder), fix="load it as the kind of model that was saved")
    return model.eval()


def config_of(folder: Path) -> Any:
    """The configuration of a model with surgeries, as that of its stock architecture that keeps the records.

    Raises:
        UserError: RG105 if it is malformed.
    """
    stored = read_json(folder / "config.json")
    _, config = _class_and_config(stock_config(stored), "", folder)
    setattr(config, KEY, {"surgeries": surgeries_of(stored)})
    return config


def opened(
    folder: Path, auto_class: str = "", *, labels: Mapping[int, str] | None = None, seed: int = 0
) -> tuple[Any, list[str]]:
    """As `load`: the model, and the names of parameters that the folder has no weights for.

    Raises:
        UserError: as `load`, but for what is missing.
    """
    if not folder.is_dir():
        raise UserError("RG101", "there is no model", where=str(folder), fix="give the folder of a saved model")
    stored = read_json(folder / "config.json")
    surgeries = surgeries_of(stored)
    plain = stock_config(stored)
    if auto_class == "AutoModelForImageClassification":
        plain["model_type"] = _CLASSIFIERS.get(str(plain.get("model_type")), plain.get("model_type"))
    if labels is not None:
        numbers = {name: number for number, name in labels.items()}
        plain |= {"id2label": dict(labels), "label2id": numbers, "problem_type": "single_label_classification"}
        plain.pop("num_labels", None)
    kind, config = _class_and_config(plain, auto_class, folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if surgeries:
            model, missing = _with_surgeries(kind, config, surgeries, folder, _dtype(plain))
        else:
            model, missing = _stock(kind, config, folder, _dtype(plain), other_head=labels is not None)
    return model, missing


def export(model: Any) -> Any:
    """A stock model that computes the same: every low-rank product multiplied out. The given model stays as it is."""
    plain = copy.deepcopy(model.config)
    if hasattr(plain, KEY):
        delattr(plain, KEY)
    dense = type(model)._from_config(plain, dtype=model.dtype)
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            folded(module, dense.get_submodule(name))
            for key in [k for k in state if k.startswith(name + ".")]:
                del state[key]
    dense.load_state_dict(state, strict=False)
    dense.tie_weights()
    return dense.eval()


def _stock(
    kind: Any, config: Any, folder: Path, dtype: torch.dtype, *, other_head: bool = False
) -> tuple[Any, list[str]]:
    from regraft.checkpoint.model_class import REFUSALS

    with quiet():
        try:
            model, info = kind.from_pretrained(
                folder, config=config, dtype=dtype, output_loading_info=True, trust_remote_code=False,
                ignore_mismatched_sizes=other_head,
            )  # fmt: skip
        except (OSError, *REFUSALS) as error:
            raise UserError("RG105", _line(error), where=str(folder), fix="check it with: regraft inspect") from None
    # A head for another number of classes has the names of the old one and other shapes: it starts at random.
    return model, sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})


def _with_surgeries(
    kind: Any, config: Any, surgeries: list[dict[str, Any]], folder: Path, dtype: torch.dtype
) -> tuple[Any, list[str]]:
    from regraft.checkpoint.model_class import REFUSALS

    build = getattr(kind, "_from_config", None) or kind.from_config  # of a class, of an Auto class
    try:
        model = build(config, dtype=dtype)
    except REFUSALS as error:
        raise UserError("RG105", _line(error), where=str(folder), fix="check config.json") from None
    for one in surgeries:
        _replay(model, one, folder)
    return model, _fill(model, folder)


def _replay(model: Any, surgery: Mapping[str, Any], folder: Path) -> None:
    if surgery.get("kind") != "low_rank" or not isinstance(surgery.get("modules"), Mapping):
        what = f"the model has a surgery of kind {surgery.get('kind')!r}, which this version of regraft does not know"
        raise UserError("RG105", what, where=str(folder / "config.json"), fix="use the version that made the model")
    there = dict(model.named_modules())
    done = {}
    for name, size in surgery["modules"].items():
        rank, parts = size if isinstance(size, list) and len(size) == 2 else (size, 1)
        own = next((n for n in _spellings(model, name) if n in there), "")
        if not own and _is_head(model, name):
            continue  # the head was exchanged for another one
        linear = bool(own) and is_linear(there[own])
        if not linear or not _fits(rank, parts, weight_of(there[own])):
            what = f"the surgery names {name} with rank {size!r}, which the architecture has no place for"
            raise UserError("RG105", what, where=str(folder / "config.json"), fix="the file was edited; make it again")
        replace(model, own, low_rank_like(there[own], rank, parts))
        done[own] = size
    record(model, "low_rank", done)


def _fits(rank: Any, parts: Any, weight: torch.Tensor) -> bool:
    """Whether a matrix can become this many products of this rank."""
    if not isinstance(rank, int) or not isinstance(parts, int) or not 1 <= parts <= weight.shape[0]:
        return False
    return weight.shape[0] % parts == 0 and 1 <= rank <= min(weight.shape[0] // parts, weight.shape[1])


def _fill(model: Any, folder: Path) -> list[str]:
    """Put the weights of a folder in; names of parameters that it has none for."""
    state = model.state_dict()
    given: dict[str, torch.Tensor] = {}
    for name, source in folder_weights(folder).tensors.items():
        own = next((n for n in _spellings(model, name) if n in state), "")
        if not own:
            continue  # of a head that was exchanged for another one
        if tuple(state[own].shape) != tuple(source.shape):
            what = f"{name} has shape {list(source.shape)}, and the model wants {list(state[own].shape)}"
            raise UserError("RG201", what, where=str(folder), fix="the weights and config.json are of two models")
        given[own] = source.read().reshape(source.shape).to(state[own].dtype)
    model.load_state_dict(given, strict=False)
    model.tie_weights()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    filled = {id(parameters[name]) for name in given if name in parameters}
    return [name for name, parameter in parameters.items() if id(parameter) not in filled]


def _spellings(model: Any, name: str) -> tuple[str, ...]:
    """The name, and the name with and without what a model with a head puts before its base model's names."""
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    return (name, prefix + name, name.removeprefix(prefix)) if prefix else (name,)


def _above_the_body(model: Any, name: str) -> bool:
    """Whether a parameter belongs to what a model has on its blocks: a head or a pooler, which may be new."""
    if model.config.model_type in MODULES:
        return modules_of(model).depth(name) is None
    return name.startswith(f"{classifier_of(model)}.")


def _is_head(model: Any, name: str) -> bool:
    """Whether a name lies outside the base model."""
    base = getattr(model, model.base_model_prefix, None)
    first = name.split(".")[0]
    return isinstance(base, nn.Module) and first != model.base_model_prefix and not hasattr(base, first)


def _class_and_config(plain: Mapping[str, Any], auto_class: str, folder: Path) -> tuple[Any, Any]:
    import transformers

    from regraft.checkpoint.model_class import REFUSALS, bounded, model_class

    if "auto_map" in plain:
        what = "the model needs code from its own folder"
        raise UserError("RG110", what, where=str(folder), fix="use a version of transformers that knows it")
    architectures = plain.get("architectures") or [""]
    name = auto_class or str(architectures[0])
    kind = getattr(transformers, name, None) if name.startswith("AutoModel") else model_class(name)
    if kind is None or not bounded(plain):
        what = f"transformers has no model of the class {name!r}" if kind is None else "a count is beyond all reason"
        raise UserError("RG105", what, where=str(folder / "config.json"), fix="check architectures in config.json")
    try:
        return kind, transformers.AutoConfig.for_model(**plain)
    except REFUSALS as error:
        raise UserError("RG105", _line(error), where=str(folder), fix="check config.json") from None


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    found = getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) and found.is_floating_point else torch.float32


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
