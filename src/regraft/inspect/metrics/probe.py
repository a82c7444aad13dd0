"""What comes out of a model, in words: the answers to a few inputs, to be read side by side before and after a merge.

    steps:
      merged: {merge: linear, models: [a, b]}
      look: {evaluate: probe, models: [base, a, merged], data: probes.jsonl}

A score says how good a model is; the answers themselves say what it does. `regraft run` prints one table per step: a
row per input, a column per model, and a star on every cell that differs from the first model's. The first `max_inputs`
rows are used, from the columns that the other metrics use: `text`, `image` or `pixel_values`. What a model is asked
follows from its architecture, unless `task` says otherwise:

| task       | models                     | output                                   | value             |
|------------|----------------------------|------------------------------------------|-------------------|
| `classify` | text and image classifiers | name of the most probable label          | its probability   |
| `generate` | causal and encoder-decoder | greedy text, up to `max_new_tokens`      | exp(mean log p)   |
| `fill`     | masked language models     | likeliest token for `[MASK]` or `<mask>` | its probability   |
| `embed`    | encoders without a head    | the nearest other input                  | cosine of the two |

Greedy text is the same on each run, and a model's own settings for sampling, penalties and lengths are left out, so two
models differ only by their weights. A chat template is applied only with `chat: true`.

The score is the share of right answers where the data has a column `label`: the label itself; for `generate` a text
that the output begins with; for `embed` the label of the nearest other input. Without labels it is the mean value (the
geometric mean for `generate`), which says how sure a model is, not whether it is right: a model that repeats one word
can be very sure. The remarks tell of label names that say nothing (`LABEL_0`), outputs that are empty, equal to the
input or caught in a loop, and of a model that answers every input alike.

A few inputs show what changed; they do not measure it. For that there are `accuracy`, `perplexity` and `similarity`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from regraft.errors import UserError, nearest
from regraft.inspect import answers as ask
from regraft.inspect import images
from regraft.inspect.classification import label_names
from regraft.inspect.inputs import PairOptions, input_of
from regraft.inspect.intervals import wilson
from regraft.inspect.loading import Loaded, context_length, load_model, load_tokenizer, text_part, tokenize
from regraft.inspect.metric import Answer, MetricOptions, Score, metric
from regraft.inspect.rows import Row, group_of, home_of, read_rows


class ProbeOptions(PairOptions, MetricOptions):
    """Options of probe."""

    task: Literal["auto", "classify", "generate", "fill", "embed"] = Field(
        "auto", description="what to ask of the models; auto: what their architecture is for"
    )
    max_inputs: int = Field(32, ge=1, description="use only this many rows, from the start")
    max_new_tokens: int = Field(20, ge=1, le=1000, description="most tokens that a language model writes")
    chat: bool = Field(False, description="put each text into the model's chat template, as what the user says")
    label: str = Field("label", description="column with the right answer; may be missing")


def _check(data: Path, options: ProbeOptions) -> None:
    first = next(read_rows(data, split=options.split, limit=1))
    input_of(first, options)
    if "label" in options.model_fields_set:
        first.get(options.label)
    group_of(first, options.group)


@metric(summary="what a model makes of a few inputs, in words", options=ProbeOptions, check=_check)
def probe(model: Path, data: Path, options: ProbeOptions) -> Score:
    """Raises RG601 for data, RG602 for models that cannot be used, RG303 for more new tokens than the model takes."""
    _check(data, options)
    limit = min(options.limit or options.max_inputs, options.max_inputs)
    rows = list(read_rows(data, split=options.split, limit=limit))
    kind = input_of(rows[0], options)
    task = ask.task_of(model, options.task, kind)
    if task.name in ("generate", "fill") and kind != "text":
        what = f"a model for {task.purpose} takes text, and the rows hold {kind}"
        raise UserError("RG602", what, where=str(model), fix="probe it with a text column, or set task")
    encoder = task.name == "embed"
    if encoder and len(rows) < 2:
        fix = "give at least two rows"
        raise UserError("RG601", "one input has no nearest other input", where=str(data), fix=fix)
    loaded = load_model(model, task.auto_class, task.purpose, device=options.device, allow_missing=encoder)
    ask.require_input(loaded, kind)
    session = _Session(loaded, rows, kind, data, options)
    with torch.inference_mode():
        answers = getattr(session, task.name)()
    groups: dict[str, list[Answer]] = {}
    for row, answer in zip(rows, answers, strict=True):
        if (group := group_of(row, options.group)) is not None and answer.value is not None:
            groups.setdefault(group, []).append(answer)
    notes = {
        "task": task.name,
        "value": "cosine" if encoder else "probability",
        "remarks": session.remarks() + _remarks(answers, encoder),
    }
    per_group = {name: _score(own) for name, own in groups.items()}
    return _score(answers, notes=notes).model_copy(update={"per_group": per_group, "answers": tuple(answers)})


@dataclass
class _Session:
    """One model and its inputs; a method per task gives the answers, with a verdict where there is a label."""

    loaded: Loaded
    rows: list[Row]
    kind: str
    data: Path
    options: ProbeOptions
    cut: int = field(default=0, init=False)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(text_part(self.loaded))

    @cached_property
    def processor(self) -> Any:
        return images.load_processor(self.loaded)

    @cached_property
    def names(self) -> Mapping[int, str]:
        """Label number -> name."""
        return label_names(self.loaded)

    @cached_property
    def words(self) -> list[str]:
        """The inputs as people know them: the text, or the name of the file, or of the row."""
        return [self._word(row) for row in self.rows]

    def classify(self) -> list[Answer]:
        truths = [_number(row, self.options.label, self.names) for row in self.rows]
        found: list[Answer] = []
        for batch, words in self._batches():
            found += ask.classify(self.loaded, self._inputs(batch), words, self.names)
        return [
            _judged(a, None if n is None else self.names[n], a.notes["label"] == n)
            for a, n in zip(found, truths, strict=True)
        ]

    def fill(self) -> list[Answer]:
        if self.tokenizer.mask_token is None:
            fix = "set task, or save the tokenizer with its mask token"
            raise UserError("RG602", "the tokenizer has no mask token", where=str(self.loaded.folder), fix=fix)
        found: list[Answer] = []
        for batch, words in self._batches():
            inputs = self._inputs(batch, mask=self.tokenizer.mask_token)
            found += ask.fill(self.loaded, inputs, words, self.tokenizer)
        if all(a.value is None for a in found):
            what = f"none of the texts has the mask token {self.tokenizer.mask_token} where the model can see it"
            raise UserError("RG601", what, where=str(self.data), fix="write [MASK] where the model is to fill in")
        return [_judged(a, t, a.output == t) for a, t in zip(found, self._truths(), strict=True)]

    def embed(self) -> list[Answer]:
        truths = self._truths()
        found = ask.embed(self.loaded, (self._inputs(batch) for batch, _ in self._batches()), self.words)
        near = [truths[a.notes["nearest"]] for a in found]
        return [_judged(a, t, t == other) for a, t, other in zip(found, truths, near, strict=True)]

    def generate(self) -> list[Answer]:
        new = self.options.max_new_tokens
        room = context_length(self.loaded, self.tokenizer)
        if not self.loaded.model.config.is_encoder_decoder:  # text and continuation share the model's context
            room -= new
        if room < 1:
            what = f"max_new_tokens is {new}, and the model takes {room + new} tokens altogether"
            raise UserError("RG303", what, where=str(self.loaded.folder), fix="lower max_new_tokens")
        length = min(room, self.options.max_length or room)
        answers = []
        for row, word, truth in zip(self.rows, self.words, self._truths(), strict=True):
            answer = ask.generate(self.loaded, self._prompt(row, word, length), word, self.tokenizer, new)
            answers.append(_judged(answer, truth, truth is not None and _begins(answer.output, truth)))
        return answers

    def remarks(self) -> list[str]:
        """What is odd about the model and the data rather than about single answers."""
        found = []
        if "names" in self.__dict__ and all(re.fullmatch(r"LABEL_\d+", name) for name in self.names.values()):
            found.append("the labels have no names (LABEL_0, ...): set id2label in the model's config.json")
        if self.cut:
            found.append(f"{self.cut} text(s) were cut to what the model takes")
        return found

    def _word(self, row: Row) -> str:
        if self.kind == "text":
            return " | ".join(row.text(column) for column in (self.options.text, self.options.text_pair) if column)
        value = row.get(getattr(self.options, self.kind))
        if isinstance(value, str) and not value.lstrip().startswith("["):
            return value
        return Path(row.where).name

    def _truths(self) -> list[str | None]:
        return [_given(row, self.options.label) for row in self.rows]

    def _batches(self) -> Iterator[tuple[list[Row], list[str]]]:
        size = self.options.batch_size
        for start in range(0, len(self.rows), size):
            yield self.rows[start : start + size], self.words[start : start + size]

    def _inputs(self, batch: list[Row], mask: str = "") -> dict[str, Tensor]:
        """A batch as the model takes it: padded tokens, or pixels."""
        loaded, options = self.loaded, self.options
        if self.kind == "text":
            texts: list[Any] = [row.text(options.text) for row in batch]
            if mask:
                texts = [ask.with_mask(text, mask) for text in texts]
            if options.text_pair:
                texts = [(a, row.text(options.text_pair)) for a, row in zip(texts, batch, strict=True)]
            length = options.max_length or context_length(loaded, self.tokenizer)
            inputs, cut = tokenize(loaded, self.tokenizer, texts, length)
            self.cut += cut
            return inputs
        if self.kind == "image":
            pictures = [images.picture(row, options.image, home_of(self.data)) for row in batch]
            pixels = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
        else:
            pixels = images.stacked(batch, options.pixel_values, loaded)
        return {"pixel_values": pixels.to(loaded.device, loaded.model.dtype)}

    def _prompt(self, row: Row, word: str, length: int) -> Tensor:
        """The tokens of one text, (1, T) with T up to `length`."""
        tokenizer = self.tokenizer
        if self.options.chat:
            ids = tokenizer(self._in_template(word), add_special_tokens=False, verbose=False)["input_ids"]
        else:
            ids = tokenizer(word, verbose=False)["input_ids"]
            if not self.loaded.model.config.is_encoder_decoder and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
                ids = ids[:-1]  # behind the end of a text there is nothing to continue
        if not ids:
            raise UserError("RG601", "the text has no tokens", where=row.where, fix="fill or remove the row")
        self.cut += len(ids) > length
        return torch.tensor([ids[:length]], device=self.loaded.device)

    def _in_template(self, text: str) -> str:
        import jinja2  # torch depends on it

        try:
            turns = [{"role": "user", "content": text}]
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        except (ValueError, jinja2.TemplateError) as error:
            what = f"the model's chat template cannot be used: {str(error).strip().splitlines()[0]}"
            fix = "leave out chat, or give the model a chat template"
            raise UserError("RG602", what, where=str(self.loaded.folder), fix=fix) from None


def _given(row: Row, column: str) -> str | None:
    """The label in words, None if the row has none; numbers as whole numbers, where they are."""
    value = row.values.get(column)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() or None if value is not None else None


def _number(row: Row, column: str, names: Mapping[int, str]) -> int | None:
    """The true label's number, None if the row has no label. Raises RG601 if the model does not have it."""
    value = _given(row, column)
    if value is None:
        return None
    numbers = {name: number for number, name in names.items()}
    if value in numbers:
        return numbers[value]
    if value.isdecimal() and int(value) in names:
        return int(value)
    fix = nearest(value, numbers) or f"use a name, or a number from 0 to {len(names) - 1}"
    raise UserError("RG601", f"the model has no label {value!r}", where=row.where, fix=fix)


def _begins(output: str, truth: str) -> bool:
    """True if the output begins with the true text as whole words, whatever the case."""
    return re.match(re.escape(truth) + r"(?!\w)", output, re.IGNORECASE) is not None


def _judged(answer: Answer, truth: str | None, right: bool) -> Answer:
    remarks = answer.remarks
    if answer.output.strip() == answer.input.strip() and "nearest" not in answer.notes:
        remarks = (*remarks, "the output is the input")
    return answer.model_copy(update={"truth": truth, "right": right if truth is not None else None, "remarks": remarks})


def _remarks(answers: Sequence[Answer], encoder: bool) -> list[str]:
    """How many inputs each remark holds for, and whether all got one answer."""
    count: dict[str, int] = {}
    for remark in (r for a in answers for r in a.remarks):
        count[remark] = count.get(remark, 0) + 1
    found = [f"{remark} (for {n} of {len(answers)})" for remark, n in count.items()]
    if not encoder and len(answers) > 2 and len({a.output for a in answers}) == 1 < len({a.input for a in answers}):
        found.append("every input gets the same output")
    return found


def _score(answers: Sequence[Answer], **more: Any) -> Score:
    judged = [a.right for a in answers if a.right is not None]
    if judged:
        right = sum(judged)
        return Score(value=right / len(judged), n=len(judged), interval=wilson(right, len(judged)), **more)
    logs = [a.notes["mean_log_probability"] for a in answers if "mean_log_probability" in a.notes]
    if logs:
        return Score(value=math.exp(math.fsum(logs) / len(logs)), n=len(logs), **more)
    values = [a.value for a in answers if a.value is not None]
    return Score(value=math.fsum(values) / len(values), n=len(values), **more)
