"""Which files besides the weights travel into a merged model, and how its config changes.

Files travel by name: what belongs to the tokenizer comes from one model, what belongs to the architecture (config,
generation, processors, sentence-transformers modules) from another. Everything else stays behind, so that nothing of
a parent's folder is published by accident. Files are copied byte for byte, except where a value in them would be wrong
in the new model: config.json, a replaced chat template, paths of the machine that saved the tokenizer.
"""

from __future__ import annotations

import filecmp
import json
import re
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.checkpoint.json_file import read_json
from regraft.checkpoint.licences import LICENCE_FILES, short_name
from regraft.checkpoint.paths import head, inside
from regraft.errors import UserWarningMessage

if TYPE_CHECKING:
    from regraft.checkpoint.model import Checkpoint

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.txt", "vocab.json", "merges.txt", "bpe.codes", "normalizer.json", "tekken.json",
    "tokenizer.model", "tokenizer.model.v*", "tiktoken.model", "sentencepiece.*.model", "spiece.model", "*.spm",
    "*.tiktoken", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
MODEL_FILES = (
    "preprocessor_config.json", "processor_config.json", "image_processor_config.json",
    "video_preprocessor_config.json", "audio_tokenizer_config.json",
    "modules.json", "sentence_*_config.json", "config_sentence_transformers.json",
)  # fmt: skip
_TEMPLATES = "additional_chat_templates"
# Of the tokenizer's files those that list no tokens.
_WITHOUT_VOCABULARY = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.", _TEMPLATES)
_ADDED = "added_tokens_decoder"
_MODULE_FOLDER = re.compile(r"\d+_\w+")  # sentence-transformers: 1_Pooling, 2_Normalize, ...
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack", ".onnx")
_STALE = ("_name_or_path", "quantization_config", "torch_dtype", "_commit_hash")
_PATH_KEYS = ("name_or_path", "_name_or_path", "tokenizer_file", "special_tokens_map_file", "vocab_file", "merges_file")


def copy_sidecars(
    staging: Path,
    *,
    config_from: Checkpoint,
    tokenizer_from: Checkpoint,
    config_changes: Mapping[str, Any],
    dtype: str,
    generation_from: Checkpoint | None = None,
    chat_template: str | None = None,
    tokenizer_json: str | None = None,
    generation_changes: Mapping[str, Any] | None = None,
    remote_code: bool = False,
) -> list[str]:
    """Write every file of the model but its weights, lineage and card.

    Args:
        staging: the folder to write into.
        config_from: the model whose config, processors and sentence-transformers modules are taken.
        tokenizer_from: the model whose tokenizer and chat template are taken.
        config_changes: values by key; a dotted key (`text_config.num_hidden_layers`) reaches into a nested config.
        dtype: what the weights are stored as, in torch's words.
        generation_from: the model whose generation config is taken, `config_from` if None.
        chat_template: Jinja text that replaces the tokenizer's template.
        tokenizer_json: text that replaces that file; then no other file with a vocabulary is taken.
        generation_changes: values by key that differ in generation_config.json, if there is one.
        remote_code: copy Python files of the model's folder; without it a remark names them.

    Returns:
        Names of the files written, sorted, with "/" between folder and file.

    Raises:
        UserError: RG104 for a link out of the model's folder, RG105 for unreadable JSON, RG106 for a stub of git-LFS.
    """
    sources = sidecar_files(
        config_from=config_from,
        tokenizer_from=tokenizer_from,
        generation_from=generation_from,
        own_template=chat_template is not None,
        own_vocabulary=tokenizer_json is not None,
        remote_code=remote_code,
    )
    for name, source in sources.items():
        target = staging / name
        target.parent.mkdir(exist_ok=True)
        if name == "tokenizer_config.json":
            _copy_tokenizer_config(
                source, target, own_template=chat_template is not None, tokenizer_json=tokenizer_json
            )
        elif name == "generation_config.json" and generation_changes:
            _write_json(target, {**read_json(source), **generation_changes})
        else:
            shutil.copyfile(source, target)
    written = set(sources)
    if config_from.config or config_changes:
        _write_json(staging / "config.json", changed_config(config_from.config, config_changes, dtype))
        written.add("config.json")
    if chat_template is not None:
        (staging / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
        written.add("chat_template.jinja")
    if tokenizer_json is not None:
        (staging / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
        written.add("tokenizer.json")
    return sorted(written)


def sidecar_files(
    *,
    config_from: Checkpoint,
    tokenizer_from: Checkpoint,
    generation_from: Checkpoint | None = None,
    own_template: bool = False,
    own_vocabulary: bool = False,
    remote_code: bool = False,
) -> dict[str, Path]:
    """The files that `copy_sidecars` would copy, by name: for plans, which add up their sizes.

    Raises:
        UserError: as `copy_sidecars`.
    """
    found = dict(_tokenizer_files(tokenizer_from, own_template=own_template))
    if own_vocabulary:
        found = {name: path for name, path in found.items() if name.startswith(_WITHOUT_VOCABULARY)}
    found |= _matching(config_from, MODEL_FILES)
    found |= _matching(generation_from or config_from, ("generation_config.json",))
    found |= _module_folders(config_from, found)
    code = _matching(tokenizer_from, ("*.py",)) | _matching(config_from, ("*.py",))
    if code and remote_code:
        found |= code
    elif code:
        names = ", ".join(sorted(code))
        warnings.warn(
            f"{names} of the model's folder is code that was neither run nor copied",
            UserWarningMessage,
            stacklevel=2,
        )
    return found


def changed_config(config: Mapping[str, Any], changes: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A copy of `config` with `changes`, the dtype as transformers 5 writes it, and nothing that no longer holds.

    Raises:
        KeyError: a dotted key reaches into a nested config that is not there.
    """
    new: dict[str, Any] = json.loads(json.dumps(config))
    for part in _configs(new):
        if "dtype" in part or "torch_dtype" in part:
            part["dtype"] = dtype
        for key in _STALE:
            part.pop(key, None)
    new["dtype"] = dtype
    for key, value in changes.items():
        *outer, last = key.split(".")
        part = new
        for step in outer:
            part = part[step]
        part[last] = value
    return new


def copy_licences(staging: Path, parents: Sequence[Checkpoint]) -> list[str]:
    """Carry licence files along: the first parent's under their own names, others as `LICENSE.<parent>` if they differ.

    Returns:
        Names written, sorted.

    Raises:
        UserError: RG104 for a link out of the model's folder, RG106 for a stub of git-LFS.
    """
    files: dict[str, Path] = {}
    for parent in parents:
        for name, source in _matching(parent, LICENCE_FILES, upper=True).items():
            if any(filecmp.cmp(source, other, shallow=False) for other in files.values()):
                continue
            target = name if parent is parents[0] else f"{name}.{_file_name(short_name(parent))}"
            while target in files:
                target += "_"
            files[target] = source
    for target, source in files.items():
        shutil.copyfile(source, staging / target)
    return sorted(files)


def copy_tokenizer(staging: Path, parent: Checkpoint) -> list[str]:
    """Write the tokenizer and chat templates of a model; returns their names.

    Raises:
        UserError: RG104 for a link out of the model's folder, RG105 for unreadable JSON, RG106 for a stub of git-LFS.
    """
    files = dict(_tokenizer_files(parent, own_template=False))
    for name, source in files.items():
        target = staging / name
        target.parent.mkdir(exist_ok=True)
        if name == "tokenizer_config.json":
            _copy_tokenizer_config(source, target, own_template=False, tokenizer_json=None)
        else:
            shutil.copyfile(source, target)
    return sorted(files)


def same_tokenizer(model: Checkpoint, base: Checkpoint) -> bool:
    """Whether a model's tokenizer and chat templates are those of its base, or it has none of its own."""
    own, theirs = (dict(_tokenizer_files(one, own_template=False)) for one in (model, base))
    if not own:
        return True
    return own.keys() == theirs.keys() and all(_same_file(path, theirs[name]) for name, path in own.items())


def _same_file(one: Path, other: Path) -> bool:
    if one.name == "tokenizer_config.json":
        facts = [{k: v for k, v in read_json(path).items() if k not in _PATH_KEYS} for path in (one, other)]
        return facts[0] == facts[1]
    return filecmp.cmp(one, other, shallow=False)


def _tokenizer_files(parent: Checkpoint, *, own_template: bool) -> Iterator[tuple[str, Path]]:
    for name, source in _matching(parent, TOKENIZER_FILES).items():
        if not (own_template and name.startswith("chat_template.")):
            yield name, source
    for name in parent.files:
        if name.startswith(f"{_TEMPLATES}/") and name.endswith(".jinja"):
            yield name, _file(parent, name)


def _module_folders(parent: Checkpoint, found: Mapping[str, Path]) -> dict[str, Path]:
    """Files of the modules that follow the encoder in a sentence-transformers model."""
    if "modules.json" not in found:
        return {}
    files: dict[str, Path] = {}
    for module in read_json(found["modules.json"], list):
        folder = str(module.get("path", "")).rstrip("/") if isinstance(module, dict) else ""
        if _MODULE_FOLDER.fullmatch(folder):
            files |= _folder(found["modules.json"].parent, folder, parent.ref)
    pickled = [name for name in files if name.endswith(_PICKLED)]
    weights = [name for name in files if name.endswith(".safetensors")]
    if weights:
        what = f"{', '.join(weights)} holds weights outside the merged model; it is {short_name(parent)}'s, unchanged"
        warnings.warn(what, UserWarningMessage, stacklevel=2)
    if pickled:
        what = f"{', '.join(pickled)} is not a safetensors file and was not copied: save that module as safetensors"
        warnings.warn(what, UserWarningMessage, stacklevel=2)
    return {name: path for name, path in files.items() if name not in pickled}


def _matching(parent: Checkpoint, patterns: Collection[str], *, upper: bool = False) -> dict[str, Path]:
    """Top-level files of a model whose names match one of `patterns`."""
    return {
        name: _file(parent, name)
        for name in parent.files
        if "/" not in name and any(fnmatchcase(name.upper() if upper else name, pattern) for pattern in patterns)
    }


def _folder(root: Path, name: str, ref: str) -> dict[str, Path]:
    """Files of a sub-folder of a model's folder, as `name/file`."""
    folder = root / name
    if not folder.is_dir():
        return {}
    names = [f"{name}/{path.name}" for path in sorted(folder.iterdir()) if path.is_file()]
    return {name: _checked(root, name, ref) for name in names}


def _file(parent: Checkpoint, name: str) -> Path:
    """The path of a file that the model lists: an adapter or a delta can bring files from its own folder."""
    return _checked(parent.files[name].parents[name.count("/")], name, parent.ref)


def _checked(folder: Path, name: str, ref: str) -> Path:
    """The path of a file of a folder, which is neither a link out of it nor a stub of git-LFS."""
    path = inside(folder, name, where=ref)
    head(path)
    return path


def _configs(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A config and those nested in it, such as `text_config`."""
    yield config
    for key, value in config.items():
        if isinstance(value, dict) and (key.endswith("_config") or "model_type" in value):
            yield from _configs(value)


def _copy_tokenizer_config(source: Path, target: Path, *, own_template: bool, tokenizer_json: str | None) -> None:
    config = read_json(source)
    stale = [key for key in _PATH_KEYS if isinstance(config.get(key), str) and Path(config[key]).is_absolute()]
    if own_template and "chat_template" in config:
        stale.append("chat_template")
    changes: dict[str, Any] = {}
    if tokenizer_json is not None and _ADDED in config:  # where it is there, it counts instead of tokenizer.json
        entries = [dict(entry) for entry in json.loads(tokenizer_json)["added_tokens"]]
        changes[_ADDED] = {str(entry.pop("id")): entry for entry in entries}
    if stale or changes:
        _write_json(target, {key: value for key, value in {**config, **changes}.items() if key not in stale})
    else:
        shutil.copyfile(source, target)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    text = json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    if text.encode(errors="ignore").decode() != text:  # JSON can hold halves of characters, as escapes only
        text = json.dumps(data, indent=2, sort_keys=True) + "\n"
    path.write_text(text, encoding="utf-8")


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text)
