"""What stands in the way of combining two models, each with its error code, its reason and what would help.

The order is that of the causes: models of different types also differ in their tensors, but it is the type that one
should hear of. Everything is read from headers, configs and tokenizers, but for the distance of the weights, which is
measured on a sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from regraft.axes import Layout
from regraft.checkpoint import Checkpoint, TensorSource
from regraft.checkpoint.distance import Distance
from regraft.inspect.config_keys import Difference
from regraft.inspect.scan import Scan
from regraft.inspect.tokenizer import TokenizerFacts

LABEL_KEYS = ("id2label", "label2id", "problem_type")


@dataclass(frozen=True)
class Obstacle:
    """Why two models cannot be combined as they are: a code of `regraft.errors`, the reason, what would help."""

    code: str
    reason: str
    fix: str


@dataclass(frozen=True)
class Model:
    """One of the models compared, under the name that messages use."""

    name: str
    checkpoint: Checkpoint
    layout: Layout
    tokenizer: TokenizerFacts | None

    def find(self, tensor: str) -> TensorSource | None:
        """The tensor of this name, or the one that it is tied to."""
        own = self.checkpoint
        known = {**dict(self.layout.tied), **own.aliases}
        return own.tensors.get(tensor) or own.tensors.get(known.get(tensor, ""))


def tokenizers(a: TokenizerFacts | None, b: TokenizerFacts | None) -> str:
    """How two tokenizers relate; "other added tokens" have the vocabulary in common, "none" is for models without.

    One of "same", "other special tokens", "other added tokens", "different", "none", "unknown".
    """
    if a is None and b is None:
        return "none"
    if a is None or b is None or a.hash is None or b.hash is None:
        return "unknown"
    if a.hash == b.hash:
        return "same" if a.special == b.special else "other special tokens"
    return "other added tokens" if a.vocabulary_hash == b.vocabulary_hash else "different"


def of_architecture(a: Model, b: Model) -> Iterator[Obstacle]:
    """Other types, other numbers of layers."""
    mine, theirs = a.checkpoint.model_type, b.checkpoint.model_type
    if mine != theirs and mine and theirs:
        reason = f"{a.name} is of type {mine} and {b.name} of type {theirs}"
        yield Obstacle("RG203", reason, "choose models of one architecture")
    elif a.layout.stacks != b.layout.stacks:
        reason = f"{a.name} has {_layers(a)} and {b.name} has {_layers(b)}"
        yield Obstacle("RG203", reason, "choose models of one depth, or stack layers by slices")


def of_tensors(a: Model, b: Model) -> Iterator[Obstacle]:
    """Tied here and separate there, other vocabularies, other shapes, other tensors."""
    for one, other in ((a, b), (b, a)):
        for alias, canonical in one.layout.tied:
            separate = alias in other.checkpoint.tensors and canonical in other.checkpoint.tensors
            if separate and alias not in one.checkpoint.tensors and alias not in dict(other.layout.tied):
                reason = f"{one.name} ties {alias} to {canonical}, and in {other.name} it is separate"
                yield Obstacle("RG209", reason, f"save {one.name} with tie_word_embeddings=False")
    shapes = []
    for name, source in a.checkpoint.tensors.items():
        found = b.find(name)
        if found is not None and found.shape != source.shape:
            shapes.append((name, source.shape, found.shape))
    for name, mine, theirs in shapes:
        rows = len(mine) == len(theirs) > 0 and mine[1:] == theirs[1:]
        if rows and a.layout.place(name).role == "embedding" and name == a.layout.tokens:
            reason = f"{a.name} has {mine[0]} tokens and {b.name} has {theirs[0]}"
            yield Obstacle("RG204", reason, "say in the recipe, by tokenizer, whose vocabulary the result gets")
    for name, mine, theirs in shapes:
        head = a.layout.place(name).role == "head"
        reason = f"{name} has shape {list(mine)} in {a.name} and {list(theirs)} in {b.name}"
        yield Obstacle("RG201", reason, f"exclude {name}" if head else "choose models of one size")
    for one, other in ((a, b), (b, a)):
        yield from _missing(one, other)


def _missing(one: Model, other: Model) -> Iterator[Obstacle]:
    bare = {other.layout.bare(name) for name in other.checkpoint.tensors}
    for name, source in one.checkpoint.tensors.items():
        if (
            not source.dtype.is_floating_point
            or one.layout.place(name).role == "buffer"
            or other.find(name) is not None
        ):
            continue
        if one.layout.bare(name) in bare:
            reason = f"{name} of {one.name} has another name in {other.name}"
            yield Obstacle("RG202", reason, "load and save both models with the same class")
        else:
            yield Obstacle("RG202", f"{other.name} has no tensor {name}", f"exclude {name}")


def of_vocabulary(a: Model, b: Model) -> Iterator[Obstacle]:
    """Tokenizers that give the same number to different tokens."""
    mine, theirs = a.tokenizer, b.tokenizer
    relation = tokenizers(mine, theirs)
    reason = f"{a.name} and {b.name} have different tokenizers: the same row of the embedding stands for other tokens"
    if relation == "different":
        yield Obstacle("RG204", reason, "choose models of one tokenizer")
    elif relation == "other added tokens" and mine is not None and theirs is not None:
        clash = [(x, y) for x, y in zip(mine.added, theirs.added, strict=False) if x != y]
        if clash:
            reason = f"an added token is {clash[0][0]!r} in {a.name} and {clash[0][1]!r} in {b.name}"
            yield Obstacle("RG204", reason, "give both models the same added tokens, or exclude the embedding")


def of_config(a: Model, b: Model, differences: list[Difference], *, ignore: frozenset[str]) -> Iterator[Obstacle]:
    """Configurations under which the same weights compute something else."""
    for difference in differences:
        if not difference.matters or difference.key in ignore:
            continue
        reason = f"{difference.key} is {_short(difference.a)} in {a.name} and {_short(difference.b)} in {b.name}"
        if difference.key in LABEL_KEYS:
            yield Obstacle("RG207", reason, "exclude the head, or bring its rows into one order")
        else:
            yield Obstacle("RG207", reason, "choose one configuration by config_from, if the weights stand it")


def of_origin(a: Model, b: Model, distance: Distance) -> Iterator[Obstacle]:
    """Weights that have no common start."""
    if distance.verdict == "unrelated":
        reason = f"{b.name} is {distance.sentence()} from {a.name}"
        yield Obstacle("RG205", reason, "choose fine-tunes of one base")


def of_values(model: Model, scan: Scan | None) -> Iterator[Obstacle]:
    """Values that are not finite, where all were read."""
    if scan is not None and scan.damaged:
        name, count = next(iter(scan.damaged.items()))
        reason = f"{name} of {model.name} holds {count} values that are NaN or infinite"
        yield Obstacle("RG206", reason, "repair that model, or merge with --allow-nan")


def of_layers(a: Model, b: Model) -> Iterator[Obstacle]:
    """Layers that cannot be put on top of one another."""
    mine, theirs = _first_layer(a), _first_layer(b)
    for name in mine.keys() | theirs.keys():
        if mine.get(name) != theirs.get(name):
            if name in mine and name in theirs:
                reason = (
                    f"{name} of a layer has shape {list(mine[name])} in {a.name} and {list(theirs[name])} in {b.name}"
                )
                yield Obstacle("RG201", reason, "choose models of one width")
            else:
                lacking = b if name in mine else a
                yield Obstacle(
                    "RG202", f"the layers of {lacking.name} have no {name}", "choose models of one architecture"
                )
            return


def _first_layer(model: Model) -> Mapping[str, tuple[int, ...]]:
    found = {}
    for name, source in model.checkpoint.tensors.items():
        if model.layout.place(name).layer == 0:
            found[model.layout.bare(name)] = source.shape
    return found


def _layers(model: Model) -> str:
    parts = [f"{n} {stack + ' ' if stack else ''}layers" for stack, n in model.layout.stacks.items()]
    return " and ".join(parts) or "no known layers"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
