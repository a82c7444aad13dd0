"""Errors that a user can act on: one sentence that says what is wrong, where, and what to do.

Every error has a stable code. `CODES` is the single list of them; docs/errors.md is generated from it, and
`regraft` prints `RGnnn: what (where): what to do` and exits with status 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# code -> (short title, when it happens and what helps). 1xx files, 2xx models that do not fit together,
# 3xx recipes and options, 4xx output and resources, 5xx network, 6xx data and evaluation.
CODES: dict[str, tuple[str, str]] = {
    "RG101": ("model not found", "The path does not exist, and it is not the id of a model on the Hub."),
    "RG102": ("no weights", "The folder holds no safetensors or pytorch_model files, or the ones its index names are missing."),
    "RG103": ("damaged safetensors file", "The header is truncated, lies about sizes or offsets, or is no safetensors header at all."),
    "RG104": ("unsafe path", "An index or a link names a file outside the model's folder."),
    "RG105": ("unreadable JSON or config", "A JSON file of the model is missing, malformed or has the wrong types."),
    "RG106": ("git-LFS pointer", "The weights were never downloaded: the file is a text stub of git-LFS."),
    "RG107": ("unsafe pickle", "A pickled weight file needs code to load; only plain tensors are accepted."),
    "RG108": ("adapter cannot be applied", "The PEFT adapter does not fit its base, or is of a kind that is no weight delta."),
    "RG109": ("unsupported weights", "Quantised or packed weights cannot be merged; float weights are needed."),
    "RG110": ("remote code", "The model needs code from its own folder, which is never run."),
    "RG111": ("damaged pickle", "A pickled weight file is truncated, compressed, or was not written by torch.save."),
    "RG112": ("damaged delta", "The weights of a delta are not those that its delta.json describes."),
    "RG113": ("a delta alone", "A delta was named where a model is needed: write base+delta, or list it in a merge that names its base."),
    "RG201": ("shapes differ", "The same tensor has different shapes in two models."),
    "RG202": ("tensor missing", "A tensor that one model has is missing in another."),
    "RG203": ("architectures differ", "The models are of different architectures or layer counts."),
    "RG204": ("vocabularies differ", "The models have different vocabularies."),
    "RG205": ("not a fine-tune of this base", "The measured distance to the base is that of an unrelated model."),
    "RG206": ("NaN or infinity", "A source holds values that are not finite."),
    "RG207": ("configurations differ", "The models agree in shape but compute differently, for example by RoPE settings or label maps."),
    "RG208": ("layers unknown", "The method works on layers, and the layers of this architecture are not known."),
    "RG209": ("tied weights differ", "The embedding and the head are tied in one model and separate in another."),
    "RG210": ("no usable tokenizer", "Vocabularies are to become one, and a model has no tokenizer.json, or one that cannot be united with the others."),
    "RG211": ("another base", "The delta was made from another base; --force adds it all the same and says how far the two bases are apart."),
    "RG212": ("no difference", "The model and the base have the same weights, so that there is no delta."),
    "RG213": ("nothing to transfer", "The teacher would teach the student nothing: wherever it was looked at, the student knows as well."),
    "RG301": ("unknown method", "No method of this name is registered."),
    "RG302": ("unknown key or option", "The recipe has a key that is not known here; nothing is ignored silently."),
    "RG303": ("value out of range", "An option's value has the wrong type or lies outside its range."),
    "RG304": ("base missing", "The method needs a base model and the recipe names none."),
    "RG305": ("wrong number of models", "The method takes another number of models."),
    "RG306": ("unreadable YAML", "The recipe is not valid YAML, or uses tags, anchors or sizes that are refused."),
    "RG307": ("unknown name", "A step refers to a model or a step that the recipe does not define, or to itself."),
    "RG308": ("filter matches nothing", "A filter or pattern selects no tensor of this model."),
    "RG309": ("not supported", "The recipe asks for something that regraft knows of but does not do."),
    "RG310": ("unknown token", "The recipe names a token, or the number of a row, that the model does not have."),
    "RG401": ("output exists", "The output directory exists and is not empty."),
    "RG402": ("too little disk", "The output does not fit on the disk."),
    "RG403": ("too little memory", "The run cannot be done within the memory allowed."),
    "RG404": ("licences conflict", "The licences of the inputs do not agree; --accept-licenses goes on."),
    "RG405": ("output cannot be written", "The output's parent folder is missing or read-only."),
    "RG406": ("no such device", "The device that --device names is not there, or torch was built without it."),
    "RG501": ("Hub unreachable", "The Hub did not answer, or the run is offline and the model is not in the local cache."),
    "RG502": ("not on the Hub", "The Hub has no such model or revision, or it is private."),
    "RG503": ("download broken", "A download ended early or does not match its size or hash."),
    "RG601": ("data unreadable", "A data file is missing, of an unknown format, or lacks a column."),
    "RG602": ("evaluation impossible", "The model has no head for this metric, or a package for it is not installed."),
    "RG603": ("nothing to report", "The folder holds no model that regraft made, no scores and no log of a training."),
    "RG604": ("training diverged", "The loss is not finite any more; nothing that was trained after that would be of use."),
    "RG901": ("no experiments here", "There is no folder claims/; experiments are run from a clone of the repository."),
    "RG902": ("no such claim", "There is no claim of this number, or its file does not hold one."),
    "RG903": ("inputs missing", "A claim at the scale of its paper needs models and data, or the file of them is malformed."),
    "RG904": ("unreadable results", "A file of results of a claim cannot be used."),
    "RG905": ("no such model of the zoo", "No module of the folder claims/ lists a model of this name, or two modules do."),
    "RG906": ("model of the zoo not good enough", "A model of the zoo is not far enough above its baseline, or above chance, to count as trained."),
}  # fmt: skip


class UserError(Exception):
    """The user's input is wrong. `str()` is one sentence: what, where, what to do.

    Args:
        code: a key of `CODES`.
        what: what is wrong, with the values found (no full stop).
        where: the file, step, field or tensor concerned.
        fix: what the user can do about it.
    """

    def __init__(self, code: str, what: str, *, where: str = "", fix: str = "") -> None:
        if code not in CODES:
            raise KeyError(f"unregistered error code {code}")
        self.code, self.what, self.where, self.fix = code, what, where, fix
        sentence = what
        if where:
            sentence += f" ({where})"
        if fix:
            sentence += f": {fix}"
        super().__init__(printable(" ".join(sentence.split())))


class UserWarningMessage(UserWarning):
    """A remark that does not stop a run; the CLI prints it once, the lineage file keeps it."""


def printable(text: str) -> str:
    """A text whose control characters are spelt out: names in files of others may hold commands for the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as "did you mean 'density'? (known: density, weight)", for unknown names."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}(known: {', '.join(options)})" if options else hint
