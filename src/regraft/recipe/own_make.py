"""The body of a step that makes a model by running one: `{compress: pela, model: base, data: texts.jsonl}`."""

from __future__ import annotations

from regraft.methods import method
from regraft.recipe.document import MakeStep
from regraft.recipe.fields import Field
from regraft.recipe.names import Names
from regraft.recipe.option_values import OptionReader
from regraft.train.making import roles_for

MAKE_VERBS = ("compress", "train")
MAKE_KEYS = ("model", "data")


def read_make(body: Field, verb: str, names: Names, seed: int) -> MakeStep:
    """The typed form of a step.

    Raises:
        UserError: RG301 to RG307, with file, line, step and key.
    """
    items = body.items()
    maker = method(verb, items[verb].text("a method"), where=items[verb].where)
    reader = OptionReader(maker)
    body.check_keys([verb, *MAKE_KEYS, *maker.roles, *reader.names], f"a step with {verb}: {maker.name}")
    models: dict[str, str] = {}
    for role in ("model", *maker.roles):
        if role in items and role in maker.several and items[role].is_list:
            models |= _several(items[role], role, names)
        elif role in items:
            models[role] = names.one(items[role])
        elif role == "model" or maker.roles[role]:
            raise body.error("RG304", f"{verb}: {maker.name} needs a {role}", f"add {role}: ...")
    data = items["data"].text("the path of a data file") if "data" in items else ""
    if not data and maker.data == "needed":
        raise body.error("RG601", f"{verb}: {maker.name} needs data", "add data: ...")
    taken = {verb, *MAKE_KEYS, *maker.roles}
    options = {key: reader.check(key, item, 1) for key, item in items.items() if key not in taken}
    if "seed" in reader.names:
        options.setdefault("seed", seed)
    return MakeStep(body.step, verb, maker.name, models, data, options, body.where)


def _several(item: Field, role: str, names: Names) -> dict[str, str]:
    """A list of models that have one role; RG305 for one that is listed twice."""
    listed = item.entries("a list of models")
    found = [names.one(entry) for entry in listed]
    if (i := names.repeated(found)) is not None:
        raise listed[i].error("RG305", f"{found[i]} is listed twice", "list it once")
    return dict(zip(roles_for(role, len(found)), found, strict=True))
