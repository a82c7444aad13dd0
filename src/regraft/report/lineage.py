"""Where the models of a run come from: the graph, its words, what each model cost, and what is to be said of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from regraft.checkpoint.lineage import InputRecord, Lineage
from regraft.errors import UserError
from regraft.inspect.words import count, duration, listed, size_in_words
from regraft.merge.rule import field_names
from regraft.methods import Method, method
from regraft.report.charts import Bar, bars
from regraft.report.graph import Edge, Node
from regraft.report.markup import Markup, join, tag
from regraft.report.sections import Cell, Column, Entries, Entry, Figure, Graph, Section, Table, Text

KINDS = (("base", "base"), ("model", "fine-tuned"), ("merge", "made in this run"))
_GROUPS = 6  # groups of tensors with options of their own that are told one by one


def read_lineages(artefacts: Mapping[str, Path], show: Collection[str] | None = None) -> dict[str, Lineage]:
    """The lineage of each model of a run by step name; only of those in `show`, and of what they were made from."""
    found = {name: Lineage.read(folder) for name, folder in artefacts.items()}
    if show is None:
        return found
    wanted, waiting = set(), [name for name in show if name in found]
    while waiting:
        name = waiting.pop()
        if name not in wanted:
            wanted.add(name)
            waiting += [record.name for record in found[name].inputs if record.name in found]
    return {name: lineage for name, lineage in found.items() if name in wanted}


def kinds_of(lineages: Mapping[str, Lineage]) -> dict[str, str]:
    """Name of every model that plays a part -> "base", "model" or "merge"."""
    kinds = {r.name: "model" for lineage in lineages.values() for r in lineage.inputs}
    kinds |= {r.name: "base" for lineage in lineages.values() for r in lineage.inputs if r.role == "base"}
    return kinds | dict.fromkeys(lineages, "merge")


def lineage_sections(lineages: Mapping[str, Lineage], artefacts: Mapping[str, Path]) -> list[Section]:
    """The graph and everything about it, cost and remarks; artefacts are measured on disk as they are now."""
    disk = {name: size_on_disk(artefacts[name]) for name in lineages}
    parts: list[Section] = [lineage_graph(lineages), lineage_table(lineages), lineage_entries(lineages, disk)]
    parts += cost_sections(lineages, disk)
    said: dict[str, list[str]] = {}
    for name, lineage in lineages.items():
        for warning in dict.fromkeys(lineage.warnings):
            said.setdefault(warning, []).append(name)
    if said:
        parts.append(Text("Remarks", [f"{listed(names)}: {warning}" for warning, names in said.items()]))
    return parts


def lineage_graph(lineages: Mapping[str, Lineage]) -> Graph:
    """What was made from what. Fine-tunes stand behind their base, which the merges that name it read as well."""
    kinds = kinds_of(lineages)
    anchors = _anchors(lineages)
    nodes: dict[str, Node] = {}
    edges: dict[tuple[str, str], Edge] = {}
    for lineage in lineages.values():
        for record in sorted(lineage.inputs, key=lambda r: r.role != "base"):
            detail = " · ".join(part for part in (record.ref, record.digest[:8]) if part)
            name = record.name
            nodes.setdefault(name, Node(name, name, detail, kinds[name], anchors[name]))
    for name, lineage in lineages.items():
        told = [] if name.split("@")[0] == lineage.method else [lineage.method]
        told += [option for option in brief_options(lineage) if option.replace(" ", "=") not in name]
        nodes[name] = Node(name, name, " · ".join(filter(None, [*told, lineage.key[:8]])), "merge", anchors[name])
        base = next((r.name for r in lineage.inputs if r.role == "base"), None)
        models = [r.name for r in lineage.inputs if r.role != "base"]
        for model in models or ([base] if base else []):
            edges[model, name] = Edge(model, name)
            if base is not None and model != base and kinds[model] == "model":
                edges[base, model] = Edge(base, model)
    caption = "From what was read to what was made; fine-tunes stand behind the base that they came from. The last "
    caption += "word in a box is the start of the model's digest or content key. A box leads to all that is recorded."
    legend = [pair for pair in KINDS if any(n.kind == pair[0] for n in nodes.values())]
    return Graph("Lineage", list(nodes.values()), list(edges.values()), caption, legend)


def lineage_table(lineages: Mapping[str, Lineage]) -> Table:
    """The same in words, with options and content keys."""
    columns = [Column("model"), Column("method"), Column("made from"), Column("content key")]
    rows: list[list[Cell | float | str | None]] = []
    for name, lineage in lineages.items():
        base = [r.name for r in lineage.inputs if r.role == "base"]
        models = ", ".join(r.name for r in lineage.inputs if r.role != "base")
        made_from = Cell(models, note=f"base: {base[0]}" if base else "")
        how = Cell(lineage.method, note=", ".join(brief_options(lineage)))
        rows.append([name, how, made_from, lineage.key[:12]])
    caption = "Options are named where they differ from the defaults. Equal content keys mean equal weights."
    return Table("How each model was made", columns, rows, caption)


def lineage_entries(lineages: Mapping[str, Lineage], disk: Mapping[str, int]) -> Entries:
    """Every model with all that is recorded of it: what was read first, then what was made."""
    anchors, kinds = _anchors(lineages), kinds_of(lineages)
    users: dict[str, list[str]] = {}
    records: dict[str, InputRecord] = {}
    for name, lineage in lineages.items():
        for record in lineage.inputs:
            users.setdefault(record.name, []).append(name)
            records.setdefault(record.name, record)

    def links(names: Sequence[str]) -> Markup:
        return join([tag("a", name, href=f"#{anchors[name]}") for name in dict.fromkeys(names)], ", ")

    entries = []
    for name, record in sorted(records.items(), key=lambda item: kinds[item[0]] != "base"):
        if name not in lineages:
            facts = _of_input(record) | {"used for": links(users[name])}
            entries.append(Entry(name, anchors[name], facts, record.ref, kinds[name]))
    for name, lineage in lineages.items():
        facts = _of_lineage(lineage, disk.get(name))
        parents = {"made from": links([r.name for r in lineage.inputs if r.role != "base"])}
        if bases := [r.name for r in lineage.inputs if r.role == "base"]:
            parents["base"] = links(bases)
        facts = {"method": facts.pop("method"), **{k: v for k, v in parents.items() if v}, **facts}
        if name in users:
            facts["used for"] = links(users[name])
        note = " · ".join([lineage.method, *brief_options(lineage)])
        entries.append(Entry(name, anchors[name], facts, note, "merge"))
    return Entries("Every model", entries, "Taken from the record that lies in each model's folder, regraft.json.")


def cost_sections(lineages: Mapping[str, Lineage], disk: Mapping[str, int]) -> list[Section]:
    """Time, memory and disk of what was made."""
    columns = [Column("model"), Column("seconds", digits=2), Column("peak memory, MB", digits=0)]
    columns += [Column("on disk, MB", digits=2), Column("parameters")]
    rows: list[list[Cell | float | str | None]] = [
        [
            name,
            one.wall_seconds,
            None if one.peak_memory_bytes is None else one.peak_memory_bytes / 1e6,
            disk[name] / 1e6 if name in disk else None,
            one.output.parameters if one.output else None,
        ]
        for name, one in lineages.items()
    ]
    caption = "As recorded when each model was made, and as it lies on the disk now. Memory is the most that the "
    caption += "process had had by then, so within one run it never falls."
    parts: list[Section] = [Table("Cost", columns, rows, caption)]
    times = {name: one.wall_seconds for name, one in lineages.items() if one.wall_seconds}
    if len(times) > 1:
        longest = max(times.values())
        drawn = [Bar(name, value, kind="merge") for name, value in times.items()]
        chart = bars(drawn, high=longest, percent=False)
        parts.append(Figure("Cost: seconds per model", chart, f"{duration(sum(times.values()))} in all."))
    return parts


def brief_options(lineage: Lineage) -> list[str]:
    """Options that differ from the method's defaults, such as "lambda 0.4"; "varied" where tensors differ."""
    if not lineage.options:
        told = {k: v for k, v in lineage.settings.items() if v not in (None, [], {}, "")}
        return [] if lineage.kind == "merge" else [f"{name} {_words(value)}" for name, value in told.items()]
    registered = _method(lineage)
    defaults: dict[str, Any] = {}
    if registered is not None:
        fields = registered.options
        names = field_names(fields)
        defaults = {k: fields.model_fields[a].get_default(call_default_factory=True) for k, a in names.items()}
    found = []
    for name in lineage.options[0].options:
        values = [_plain(group.options.get(name)) for group in lineage.options]
        if any(value != values[0] for value in values):
            found.append(f"{name} varied")
        elif values[0] != _plain(defaults.get(name)):
            found.append(f"{name} {_words(values[0])}")
    return found


def size_on_disk(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _method(lineage: Lineage) -> Method | None:
    """The method as this version registers it; None for what is no registered method, or one of another version."""
    try:
        found: Method = method(lineage.kind, lineage.method)
    except UserError:
        return None
    return found


def _anchors(lineages: Mapping[str, Lineage]) -> dict[str, str]:
    """Name -> id; the colon keeps these apart from the ids of sections."""
    return {name: f"model:{i}" for i, name in enumerate(kinds_of(lineages))}


def _of_input(record: InputRecord) -> dict[str, str]:
    facts = {
        "reference": record.ref,
        "revision": record.revision,
        "adapters": ", ".join(record.adapters),
        "architecture": record.model_type,
        "parameters": f"{record.parameters:,}" if record.parameters else "",
        f"digest ({record.digest_kind or 'unknown kind'})": record.digest,
        "licence": record.licence or "not stated",
    }
    return {name: value for name, value in facts.items() if value}


def _of_lineage(lineage: Lineage, disk: int | None) -> dict[str, str]:
    registered = _method(lineage)
    how = [lineage.method + (f": {registered.summary}" if registered else "")]
    papers: list[Any] = [
        tag("a", paper.title, href=paper.url, rel="noreferrer") if paper.url else paper.title
        for paper in getattr(registered, "papers", ())
    ]
    output, software = lineage.output, lineage.software
    facts: dict[str, str] = {"method": join([*how, *(join([" · ", paper]) for paper in papers)])}
    for i, group in enumerate(lineage.options[:_GROUPS]):
        told = ", ".join(f"{name} {_words(_plain(value))}" for name, value in group.options.items())
        where = "" if len(lineage.options) == 1 else f" ({group.count} tensors: {', '.join(group.tensors[:3])}"
        where += "" if not where else (", …)" if len(group.tensors) > 3 else ")")
        facts[f"options{f' {i + 1}' if len(lineage.options) > 1 else ''}"] = told + where
    if len(lineage.options) > _GROUPS:
        facts["more options"] = f"{len(lineage.options) - _GROUPS} further groups of tensors are in regraft.json"
    settings = {k: v for k, v in lineage.settings.items() if v not in (None, [], {}, "")}
    facts["settings"] = ", ".join(f"{name} {_words(value)}" for name, value in settings.items())
    facts["seeds"] = ", ".join(f"{name} {value}" for name, value in lineage.seeds.items())
    facts["content key"] = lineage.key
    if output is not None:
        sizes = f"{count(output.parameters)} parameters in {output.tensors:,} tensors, {output.dtype}"
        facts["size"] = f"{sizes}, {size_in_words(output.bytes)} of weights"
    if disk is not None:
        facts["on disk"] = size_in_words(disk)
    facts["licence"] = lineage.licence or "not stated"
    cost = [duration(lineage.wall_seconds)] if lineage.wall_seconds is not None else []
    cost += [f"{size_in_words(lineage.peak_memory_bytes)} of memory"] if lineage.peak_memory_bytes else []
    facts["cost"] = ", ".join(cost)
    facts["made"] = f"{lineage.finished or lineage.started}, {lineage.hardware.cpu or 'processor not told'}"
    facts["software"] = f"regraft {software.regraft}, torch {software.torch}, transformers {software.transformers}"
    facts["remarks"] = "; ".join(lineage.warnings)
    return {name: value for name, value in facts.items() if value}


def _plain(value: Any) -> Any:
    """One value for one per model, where they are the same."""
    if isinstance(value, (list, tuple)):
        return value[0] if value and all(v == value[0] for v in value) else list(value)
    return value


def _words(value: Any) -> str:
    if isinstance(value, list):
        return "/".join(map(_words, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
