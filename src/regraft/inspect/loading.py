"""Models as `transformers` loads them, for metrics: in inference mode, quietly, and refused if parts are missing.

`from_pretrained` fills what a checkpoint lacks with random numbers and says so in the log; a score of such a model
means nothing, so missing tensors are an error here. Weights below float32 are widened on the CPU, where half
precision is slow and incomplete; on a GPU they stay as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regraft.checkpoint.json_file import read_json
from regraft.errors import UserError

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Loaded:
    """A model ready to be run: the module in eval mode, its config, its folder and its device."""

    model: Any
    config: Any
    folder: Path
    device: torch.device
    missing: tuple[str, ...] = ()

    def logits(self, **inputs: Any) -> Tensor:
        """The head's output."""
        output: Tensor = self.model(**inputs).logits
        return output


def device_of(choice: str) -> torch.device:
    """The device for `auto`, `cpu` or `cuda`. Raises RG602 for `cuda` without a GPU."""
    if choice == "cuda" and not torch.cuda.is_available():
        raise UserError("RG602", "there is no GPU that torch can use", fix="set device to cpu or auto")
    return torch.device("cuda" if choice != "cpu" and torch.cuda.is_available() else "cpu")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and reports of `transformers`; what matters in them is raised as an error here."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def load_config(folder: Path) -> Any:
    """The model's config.

    Raises:
        UserError: RG101 if the folder does not exist, RG105 if its config cannot be used, RG110 if it needs code.
    """
    import transformers

    if not folder.is_dir():
        raise UserError("RG101", "there is no model", where=str(folder), fix="give the folder of a saved model")
    plain = read_json(folder / "config.json")
    if "regraft" in plain:
        from regraft.resize.surgery import config_of

        return config_of(folder)
    try:
        with quiet():
            return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if "auto_map" in plain:
            what = f"the model type {plain.get('model_type')!r} needs code from the model's own folder"
            fix = "evaluate with a transformers version that knows it"
            raise UserError("RG110", what, where=str(folder), fix=fix) from None
        raise UserError("RG105", _line(error), where=str(folder), fix="check config.json") from None


def refuse_masked(config: Any, folder: Path, has: str) -> None:
    """Raise RG602 for masked language models, which load as causal ones too, with their attention masked otherwise than
    in training; `has` says what such a model has instead of what was asked for."""
    if any(name.endswith("ForMaskedLM") for name in config.architectures or ()):
        fix = "evaluate it by accuracy or similarity after fine-tuning"
        raise UserError("RG602", f"a masked language model has {has}", where=str(folder), fix=fix)


def load_model(
    folder: Path, auto_class: str, purpose: str, *, device: str = "auto", allow_missing: bool = False
) -> Loaded:
    """Load a model for a task.

    Args:
        folder: a saved model.
        auto_class: name of the `transformers` class, such as "AutoModelForImageClassification".
        purpose: what the model is to do, for messages: "image classification".
        device: auto, cpu or cuda.
        allow_missing: hand the names of missing tensors back in `missing` instead of raising.

    Raises:
        UserError: RG602 if the architecture cannot do this or the checkpoint lacks tensors for it (a missing head),
            and what `load_config` raises.
    """
    import transformers

    config = load_config(folder)
    target = device_of(device)
    dtype: Any = torch.float32 if target.type == "cpu" else "auto"
    if hasattr(config, "regraft"):
        model, missing = _compressed(folder, config, auto_class, purpose, target)
        return _checked(Loaded(model, config, folder, target, missing), purpose, allow_missing)
    try:
        with quiet():
            model, info = getattr(transformers, auto_class).from_pretrained(
                folder, config=config, dtype=dtype, output_loading_info=True, trust_remote_code=False
            )
    except ValueError as error:
        if "Unrecognized configuration class" in str(error):
            what = f"a {config.model_type} model cannot do {purpose}"
            raise UserError("RG602", what, where=str(folder), fix="choose another metric or model") from None
        raise _unusable(folder, error) from None
    except (OSError, RuntimeError, TypeError) as error:
        raise _unusable(folder, error) from None
    missing = tuple(sorted(info["missing_keys"]))
    return _checked(Loaded(model.to(target).eval(), config, folder, target, missing), purpose, allow_missing)


def _checked(loaded: Loaded, purpose: str, allow_missing: bool) -> Loaded:
    """The same, if nothing is missing that may not be; raises RG602."""
    missing = loaded.missing
    if missing and not allow_missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        what = f"the checkpoint has no weights for {purpose}: {missing[0]}{more} would be random"
        raise UserError("RG602", what, where=str(loaded.folder), fix="evaluate a model that was trained with this head")
    return loaded


def _compressed(
    folder: Path, config: Any, auto_class: str, purpose: str, target: torch.device
) -> tuple[Any, tuple[str, ...]]:
    """A model whose modules are not those of its architecture, and what it lacks for a task."""
    import transformers

    from regraft.resize.surgery import opened

    if type(config) not in getattr(transformers, auto_class)._model_mapping:
        what = f"a {config.model_type} model cannot do {purpose}"
        raise UserError("RG602", what, where=str(folder), fix="choose another metric or model")
    model, missing = opened(folder, auto_class)
    if target.type == "cpu":
        model = model.float()
    return model.to(target).eval(), tuple(sorted(missing))


def load_tokenizer(loaded: Loaded) -> Any:
    """The tokenizer in the model's folder, with a padding token. Raises RG602 if there is none."""
    import transformers

    folder = loaded.folder
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        what = f"the model's tokenizer cannot be loaded: {_line(error)}"
        fix = "save the tokenizer beside the model"
        raise UserError("RG602", what, where=str(folder), fix=fix) from None
    if len(tokenizer) > (size := _vocabulary(loaded.model)):
        what = f"the tokenizer has {len(tokenizer)} tokens and the model embeds {size}"
        raise UserError("RG602", what, where=str(folder), fix="use the tokenizer that the model was trained with")
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token  # masked out wherever it pads; only an id is needed
    if getattr(loaded.config, "pad_token_id", None) is None:
        loaded.model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def context_length(loaded: Loaded, tokenizer: Any) -> int:
    """Most tokens that model and tokenizer say they take; 512 where neither says."""
    positions = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
    for module in loaded.model.modules():
        # A table of positions with a padding row starts to count behind that row, so it takes fewer tokens.
        if isinstance(module, nn.Embedding) and module.num_embeddings == positions and module.padding_idx is not None:
            positions -= module.padding_idx + 1
            break
    limits = [n for n in (tokenizer.model_max_length, positions) if isinstance(n, int) and 0 < n < 10**9]
    return min(limits, default=512)


def tokenize(loaded: Loaded, tokenizer: Any, texts: list[Any], length: int) -> tuple[dict[str, Tensor], int]:
    """A padded batch on the model's device, and how many of its texts were cut at `length` tokens."""
    encoded = tokenizer(texts, truncation=True, max_length=length, padding=True, return_tensors="pt")
    full = int((encoded["attention_mask"].sum(1) >= length).sum())
    cut = 0
    if full:  # a text of exactly `length` tokens is whole, so those that fill it are counted again uncut
        cut = sum(len(ids) > length for ids in tokenizer(texts, verbose=False)["input_ids"])
    return {name: tensor.to(loaded.device) for name, tensor in encoded.items()}, cut


def text_part(loaded: Loaded) -> Loaded:
    """The part of a model of text and images that reads text, to check a tokenizer against; else the model itself."""
    import transformers

    kind = loaded.config.get_text_config().model_type
    for module in loaded.model.modules():
        if isinstance(module, transformers.PreTrainedModel) and module.config.model_type == kind:
            return replace(loaded, model=module)
    return loaded


def forward(loaded: Loaded, inputs: Inputs, model: Any = None) -> Any:
    """Run the model (or a part of it) on those inputs that it has a parameter for.

    Raises:
        UserError: RG601 for inputs that it refuses, such as images of another size.
    """
    module = loaded.model if model is None else model
    known = inspect.signature(module.forward).parameters
    try:
        return module(**{name: tensor for name, tensor in inputs.items() if name in known})
    except ValueError as error:
        what = f"the model does not take these inputs: {str(error).splitlines()[0]}"
        raise UserError("RG601", what, where=str(loaded.folder), fix="give inputs of the model's size") from None


def unused_missing(loaded: Loaded, output: Tensor) -> bool:
    """True if none of the missing tensors takes part in `output`, which was computed with gradients on."""
    parameters = dict(loaded.model.named_parameters())
    lacking: list[nn.Parameter] = [parameters[name] for name in loaded.missing if name in parameters]
    if not lacking:
        return True
    gradients = torch.autograd.grad(output.float().sum(), lacking, allow_unused=True)
    return all(gradient is None for gradient in gradients)


def _vocabulary(model: Any) -> int:
    embedding = model.get_input_embeddings()
    return int(embedding.weight.shape[0]) if embedding is not None else 0


def _unusable(folder: Path, error: BaseException) -> UserError:
    what = f"transformers cannot load the model: {_line(error)}"
    return UserError("RG602", what, where=str(folder), fix="check it with: regraft inspect")


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
