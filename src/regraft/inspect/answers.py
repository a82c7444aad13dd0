"""What a model makes of single inputs, in words: a label, a continuation, the filling of a gap, or a neighbour.

Each function takes the model and its inputs and gives one `Answer` per input, in order, without a verdict on whether it
is right. Continuations are made one text at a time: padding would change them slightly, and a before/after table must
show what the weights changed and nothing else.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from regraft.errors import UserError
from regraft.inspect.embedding import vectors
from regraft.inspect.loading import Inputs, Loaded, forward, load_config, unused_missing
from regraft.inspect.metric import Answer

TOP = 4  # the answer and the next best three
SAME = 0.99999  # cosine above which two inputs are the same to an encoder
_MASKS = ("[MASK]", "<mask>")  # spellings that stand for the model's own mask token
# What belongs to the model's vocabulary is kept of its generation settings; sampling, penalties and lengths are not.
_TOKENS = ("bos", "eos", "pad", "decoder_start", "forced_bos", "forced_eos")


@dataclass(frozen=True)
class Task:
    """What a model does with an input: `name` (classify, generate, fill or embed) and the class that loads it."""

    name: str
    auto_class: str
    purpose: str


_TASKS = {
    "SEQ_TO_SEQ_CAUSAL_LM": Task("generate", "AutoModelForSeq2SeqLM", "text generation"),
    "CAUSAL_LM": Task("generate", "AutoModelForCausalLM", "text generation"),
    "MASKED_LM": Task("fill", "AutoModelForMaskedLM", "filling of masked tokens"),
    "SEQUENCE_CLASSIFICATION": Task("classify", "AutoModelForSequenceClassification", "text classification"),
    "IMAGE_CLASSIFICATION": Task("classify", "AutoModelForImageClassification", "image classification"),
}
_EMBED = Task("embed", "AutoModel", "embedding")
_ENCODE = Task("embed", "AutoModelForTextEncoding", "embedding")


def task_of(folder: Path, wanted: str, kind: str) -> Task:
    """The task of the model in a folder: by its architecture's name, unless one is wanted.

    Args:
        folder: path of a saved model.
        wanted: "auto", or the name of a task.
        kind: what the inputs are (text, image, pixel_values).

    Raises:
        UserError: RG602 if the architecture has a head that no task knows, and what `load_config` raises.
    """
    from transformers.models.auto import modeling_auto as auto

    config = load_config(folder)
    text = kind == "text"
    if wanted == "embed":
        return _EMBED
    if wanted == "fill":
        return _TASKS["MASKED_LM"]
    if wanted == "classify":
        return _TASKS["SEQUENCE_CLASSIFICATION" if text else "IMAGE_CLASSIFICATION"]
    if wanted == "generate":
        return _TASKS["SEQ_TO_SEQ_CAUSAL_LM" if config.is_encoder_decoder else "CAUSAL_LM"]
    names = set(config.architectures or ())
    for part, task in _TASKS.items():
        if names & _names(getattr(auto, f"MODEL_FOR_{part}_MAPPING_NAMES")):
            return task
    if names & _names(auto.MODEL_MAPPING_NAMES):
        return _EMBED
    if names & _names(auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES):
        return _ENCODE
    what = f"there is no probe for the architecture {', '.join(sorted(names)) or '(none named in config.json)'}"
    fix = "set task to classify, generate, fill or embed"
    raise UserError("RG602", what, where=str(folder), fix=fix)


def _names(mapping: Mapping[str, str | tuple[str, ...]]) -> set[str]:
    return {name for value in mapping.values() for name in ([value] if isinstance(value, str) else value)}


def require_input(loaded: Loaded, kind: str) -> None:
    """Raise RG602 if the model does not take inputs of this kind (text, image or pixel_values)."""
    name, words = ("input_ids", "text") if kind == "text" else ("pixel_values", "images")
    if name not in inspect.signature(loaded.model.forward).parameters:
        what = f"a {loaded.config.model_type} model does not take {words}"
        raise UserError("RG602", what, where=str(loaded.folder), fix="give other inputs")


def classify(loaded: Loaded, inputs: Inputs, words: Sequence[str], names: Mapping[int, str]) -> list[Answer]:
    """The most probable label of each input, by name.

    Args:
        inputs: a batch of B inputs.
        words: the B inputs in words.
        names: label number -> name.

    Raises:
        UserError: RG602 if the outputs are not finite.
    """
    probabilities = _finite(loaded, forward(loaded, inputs).logits.float()).softmax(-1)  # (B, labels)
    best = probabilities.topk(min(TOP, probabilities.shape[-1]))
    found = []
    for word, values, labels in zip(words, best.values.tolist(), best.indices.tolist(), strict=True):
        ranked = tuple((names.get(label, str(label)), value) for label, value in zip(labels, values, strict=True))
        found.append(_best(word, ranked, notes={"label": labels[0]}))
    return found


def with_mask(text: str, mask: str) -> str:
    """The text with a model's own mask token for `[MASK]` and `<mask>`, so one text does for several models."""
    for spelling in _MASKS:
        text = text.replace(spelling, mask)
    return text


def fill(loaded: Loaded, inputs: Inputs, words: Sequence[str], tokenizer: Any) -> list[Answer]:
    """The most probable filling of the gaps of each input; several gaps are filled each by itself.

    Args:
        inputs: a batch of B tokenised texts.
        words: the B texts.

    An input without a gap has the output "" and says so in its remarks. The value is the geometric mean over gaps.

    Raises:
        UserError: RG602 if the outputs are not finite.
    """
    logits = _finite(loaded, forward(loaded, inputs).logits.float())  # (B, T, V)
    found = []
    for word, ids, scores in zip(words, inputs["input_ids"], logits, strict=True):
        gaps = scores[ids == tokenizer.mask_token_id].softmax(-1).topk(TOP)  # (gaps, TOP)
        tokens = [[tokenizer.decode([i]).strip() for i in row] for row in gaps.indices.tolist()]
        values = gaps.values.tolist()
        if not tokens:
            found.append(Answer(input=word, output="", remarks=("no mask token in the text",)))
        elif len(tokens) == 1:
            found.append(_best(word, tuple(zip(tokens[0], values[0], strict=True))))
        else:
            mean = math.exp(sum(math.log(max(row[0], 1e-300)) for row in values) / len(values))
            found.append(Answer(input=word, output=" / ".join(row[0] for row in tokens), value=mean))
    return found


def generate(loaded: Loaded, ids: Tensor, word: str, tokenizer: Any, new_tokens: int) -> Answer:
    """The greedy continuation of one text, or an encoder-decoder's output for it.

    Args:
        ids: the text's tokens, shape (1, T), on the model's device.
        word: the text.
        new_tokens: most tokens to write.

    The value is exp of the mean log-probability of the written tokens (the end token included); the mean itself is in
    `notes`.

    Raises:
        UserError: RG602 if the model cannot generate or its outputs are not finite.
    """
    import transformers

    own = loaded.model.generation_config
    kept = {f"{name}_token_id": getattr(own, f"{name}_token_id", None) for name in _TOKENS}
    if kept["pad_token_id"] is None:
        kept["pad_token_id"] = tokenizer.pad_token_id
    settings = transformers.GenerationConfig(
        **{name: value for name, value in kept.items() if value is not None},
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    loaded.model.generation_config = settings  # what is left open in `settings` would be filled from here
    try:
        made = loaded.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    except ValueError as error:
        what = f"the model cannot generate: {str(error).strip().splitlines()[0]}"
        raise UserError("RG602", what, where=str(loaded.folder), fix="check generation_config.json") from None
    logits = torch.cat([step.float() for step in made.logits])  # (new tokens, V)
    tokens = made.sequences[0, -len(logits) :]
    logs = _finite(loaded, logits).log_softmax(-1).gather(1, tokens[:, None])
    mean = float(logs.mean())
    output = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    remarks = [] if output else ["the output is empty"]
    if repeats(tokens.tolist()):
        remarks.append("the output repeats itself")
    if output and len(tokens) == new_tokens and word.strip() != output and word.strip().startswith(output):
        remarks.append("the output repeats the input")
    return Answer(
        input=word,
        output=output,
        value=math.exp(mean),
        remarks=tuple(remarks),
        notes={"mean_log_probability": mean, "tokens": len(tokens)},
    )


def repeats(tokens: Sequence[int]) -> bool:
    """True if the tokens end in a loop: one piece three times in a row or more, six tokens or more together."""
    n = len(tokens)
    for period in range(1, n // 3 + 1):
        same = 0  # how many tokens, from the end, equal the one a period before
        while same + period < n and tokens[n - 1 - same] == tokens[n - 1 - same - period]:
            same += 1
        if same >= 2 * period and same + period >= 6:
            return True
    return False


def embed(loaded: Loaded, batches: Iterable[Inputs], words: Sequence[str]) -> list[Answer]:
    """The nearest other input of each input, by the cosine of their vectors, which is the value.

    Args:
        batches: the inputs, in order; at least two altogether.
        words: the inputs in words.

    A vector is the model's own embedding where it has one for text and images alike, else the mean of the last hidden
    states over tokens or positions. Its L2 norm is in `notes`, with the number of the nearest input.

    Raises:
        UserError: RG602 if tensors are missing that take part, or the outputs are not finite.
    """
    found_vectors = []
    for number, inputs in enumerate(batches):
        if number == 0 and loaded.missing:
            with torch.inference_mode(False), torch.enable_grad():
                copies = {name: tensor.clone() for name, tensor in inputs.items()}  # made here, gradients may use them
                whole = unused_missing(loaded, vectors(loaded, copies))
            if not whole:
                what = f"the checkpoint lacks weights of the encoder ({loaded.missing[0]}), which would be random"
                raise UserError("RG602", what, where=str(loaded.folder), fix="probe a whole model")
        found_vectors.append(_finite(loaded, vectors(loaded, inputs).float()).cpu())
    matrix = torch.cat(found_vectors)  # (n, D)
    unit = functional.normalize(matrix, dim=-1)
    cosines = unit @ unit.T
    cosines.fill_diagonal_(-2.0)
    norms = matrix.norm(dim=-1).tolist()
    ranked = cosines.topk(min(TOP, len(words) - 1))
    found = []
    for i, (values, others) in enumerate(zip(ranked.values.tolist(), ranked.indices.tolist(), strict=True)):
        order = tuple((words[j], value) for j, value in zip(others, values, strict=True))
        remarks = ("the vector is that of another input",) if values[0] > SAME else ()
        found.append(_best(words[i], order, notes={"norm": norms[i], "nearest": others[0]}, remarks=remarks))
    return found


def _best(word: str, ranked: tuple[tuple[str, float], ...], **more: Any) -> Answer:
    return Answer(input=word, output=ranked[0][0], value=ranked[0][1], alternatives=ranked[1:], **more)


def _finite(loaded: Loaded, output: Tensor) -> Tensor:
    if not torch.isfinite(output).all():
        fix = "check the model with: regraft inspect --stats"
        raise UserError("RG602", "the model's outputs are not finite", where=str(loaded.folder), fix=fix)
    return output
