"""One vocabulary for models whose vocabularies differ: whose tokenizer it is, and where each model's rows come from.

A model that has a token keeps its own row of it, at the token's new number. For a token that it lacks it is given the
row that the recipe chooses; else that of the base, else that of the only model that has it, else the mean of those that
do, as in mergekit; a token that no model has gets zeros. Rules then see models of one shape in which equal rows mean
equal tokens, and know nothing of all this.

Rows without a token are padding. They stay as many as the model has whose tokenizer is taken, with each model's own
values, unless `pad_to_multiple_of` says how many there are: then they are the mean of all tokens' rows.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from tokenizers import AddedToken

from regraft.axes import Layout
from regraft.checkpoint import Checkpoint, TensorSource
from regraft.checkpoint.mapped_rows import AVERAGE, MEAN, ZERO, MappedRows, RowMap, common_dtype
from regraft.errors import UserError
from regraft.inspect.vocabulary import TokenTable, token_table, united
from regraft.recipe.document import TokenRow, VocabularyChoice
from regraft.recipe.fit import Member, missing
from regraft.recipe.planned import PlannedCheckpoint
from regraft.recipe.vocabulary_report import Report, doubts

_FILE = "tokenizer.json"


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The vocabulary of a merge's output, decided.

    Attributes:
        table: its tokens.
        rows: rows of embedding and head, with padding.
        tokenizer_json: the file where it is none of the models' own, else None.
        giver: the model that the other tokenizer files come from.
        tables: the tokenizer of each model, by name.
        maps: model -> where its rows come from; sources are numbered as `owners`.
        owners: the models that can give rows, the base first.
        report: what happens to the tokens of each model, JSON-able.
        remarks: what of it may be a mistake.
    """

    table: TokenTable
    rows: int
    tokenizer_json: str | None
    giver: Member
    tables: Mapping[str, TokenTable]
    maps: Mapping[str, RowMap]
    owners: tuple[Member, ...]
    report: Mapping[str, Any]
    remarks: tuple[str, ...]

    def ids_of(self, checkpoint: Checkpoint) -> Mapping[str, int]:
        """The tokens of one of the models."""
        return next(self.tables[m.name].ids for m in (*self.owners, self.giver) if m.checkpoint is checkpoint)

    @property
    def digest(self) -> str:
        """A hash of everything that decides the rows and the file."""
        sha = hashlib.blake2b(f"{self.rows}\n{self.tokenizer_json}".encode(), digest_size=16)
        for one in self.maps.values():
            sha.update(one.origin.tobytes() + one.row.tobytes() + repr((one.means, one.tokens)).encode())
        return sha.hexdigest()

    def shown(self, member: Member, layouts: Mapping[str, Layout], *, where: str) -> Member:
        """The model as the merge sees it: every tensor with an entry per token in the order of this vocabulary.

        Raises:
            UserError: RG202 or RG209 if a model that can give rows lacks such a tensor.
        """
        tensors: dict[str, TensorSource] = dict(member.checkpoint.tensors)
        for name in tensors:
            axis = layouts[member.name].vocabulary_axis(name)
            if axis is not None:
                tensors[name] = self._mapped(member, name, axis, layouts, where)
        return Member(member.name, replace(member.checkpoint, tensors=tensors))

    def _mapped(self, member: Member, name: str, axis: int, layouts: Mapping[str, Layout], where: str) -> TensorSource:
        sources = []
        for owner in self.owners:
            source = owner.find(name)
            if source is None:
                raise missing(name, owner, layouts[owner.name], where)
            sources.append(source)
        own = member.checkpoint.tensors[name]
        if any(_beside(source, axis) != _beside(own, axis) for source in sources):
            return own  # models of other widths, which do not fit together whatever their vocabularies are
        rows = self.maps[member.name]
        if rows.is_identity(self.owners.index(member), own.shape[axis]):
            return own
        return MappedRows(name, sources, rows, axis=axis, dtype=common_dtype(sources))


def plan_vocabulary(
    choice: VocabularyChoice, owners: Sequence[Member], giver: Member, layouts: Mapping[str, Layout], *, has_base: bool
) -> Vocabulary | None:
    """Decide on the vocabulary of a merge; None where all models have the one that is chosen.

    Args:
        owners: the models of the merge; the base first if `has_base`.
        giver: the model whose tokenizer is chosen, or built on.

    Raises:
        UserError: RG210 for a tokenizer that cannot be used, RG310 for a token or row that is not there, RG208 for a
            family whose tensors are not known, RG204 for a model that contradicts itself, RG307 for a row from a model
            that is none of these.
    """
    tables = {m.name: _table(m, choice) for m in dict.fromkeys([*owners, giver])}
    table = _output(choice, owners, giver, tables)
    lengths = {m.name: _lengths(m, layouts[m.name]) for m in owners}
    agree = table is tables[giver.name] and all(tables[m.name].ids == table.ids for m in owners)
    chosen = choice.tokens or choice.pad_to_multiple_of is not None
    if agree and not chosen and len({tuple(one.values())[:1] for one in lengths.values()}) == 1:
        return None
    sizes = {m.name: _rows(m, lengths[m.name], choice) for m in owners}
    rows = table.size
    if choice.pad_to_multiple_of is not None:
        rows = -(-rows // choice.pad_to_multiple_of) * choice.pad_to_multiple_of
    elif choice.source is not None:
        rows = max(rows, sizes.get(giver.name, 0))
    plan = _Rows(choice, owners, giver, tables, sizes, table, rows, has_base=has_base)
    maps = {m.name: plan.of(i) for i, m in enumerate(owners)}
    made = table.content if table is not tables[giver.name] else None
    report = plan.report.to_dict()
    remarks = (*_other_kinds(giver, owners, tables), *doubts(report))
    return Vocabulary(table, rows, made, giver, tables, maps, tuple(owners), report, remarks)


def _other_kinds(giver: Member, owners: Sequence[Member], tables: Mapping[str, TokenTable]) -> list[str]:
    kind = tables[giver.name].kind
    return [
        f"the tokenizer of {m.name} is {tables[m.name].kind} and that of {giver.name} {kind}: tokens are matched by "
        f"their text, which need not mean the same"
        for m in owners
        if tables[m.name].kind != kind
    ]


class _Rows:
    """Finds the row of every token for every model."""

    def __init__(
        self,
        choice: VocabularyChoice,
        owners: Sequence[Member],
        giver: Member,
        tables: Mapping[str, TokenTable],
        sizes: Mapping[str, int],
        table: TokenTable,
        rows: int,
        *,
        has_base: bool,
    ) -> None:
        self._choice, self._owners, self._table, self._rows = choice, owners, table, rows
        self._giver = next((i for i, m in enumerate(owners) if m is giver), None)
        self._sizes = [sizes[m.name] for m in owners]
        self._tables = [tables[m.name] for m in owners]
        self._ids = [
            {token: number for token, number in one.ids.items() if number < size}
            for one, size in zip(self._tables, self._sizes, strict=True)
        ]
        self._means: list[tuple[tuple[int, int], ...]] = []
        self.report = Report(choice.source, giver.name, table, rows, [m.name for m in owners])
        self._given = {t: self._default(t, has_base) for t in table.ids}

    def of(self, model: int) -> RowMap:
        """Where the rows of one model come from."""
        origin = np.full(self._rows, ZERO, dtype=np.int32)
        row = np.arange(self._rows, dtype=np.int64)
        own, size = self._ids[model], self._sizes[model]
        self._pad(origin, model, set(self._tables[model].ids.values()))
        for token, number in self._table.ids.items():
            chosen = self._choice.tokens.get(token)
            forced = chosen is not None and chosen.force
            if token in own and not forced:
                origin[number], row[number] = model, own[token]
            else:
                origin[number], row[number] = self._given[token]
                if self._given[token][0] == ZERO:
                    row[number] = number
        kept = {token: (int(origin[i]), int(row[i])) for token, i in self._table.ids.items()}
        self.report.add(model, self._tables[model], own, kept, size)
        return RowMap(origin, row, self._means, self._table.size)

    def _pad(self, origin: np.ndarray, model: int, taken: set[int]) -> None:
        """Rows without a token: the model's own, else those of the model whose tokenizer it is."""
        numbers = set(self._table.ids.values())
        for number in range(self._rows):
            if number in numbers:
                continue
            if number >= self._table.size and self._choice.pad_to_multiple_of is not None:
                origin[number] = AVERAGE
            elif number < self._sizes[model] and number not in taken:
                origin[number] = model
            elif self._giver is not None and number < self._sizes[self._giver]:
                origin[number] = self._giver

    def _default(self, token: str, has_base: bool) -> tuple[int, int]:
        """The row that models get which lack a token."""
        if token in self._choice.tokens:
            return self._chosen(token, self._choice.tokens[token])
        having = [i for i, ids in enumerate(self._ids) if token in ids]
        if has_base and having and having[0] == 0:
            having = [0]
        if len(having) < 2:
            return (having[0], self._ids[having[0]][token]) if having else (ZERO, 0)
        self._means.append(tuple((i, self._ids[i][token]) for i in having))
        return MEAN, len(self._means) - 1

    def _chosen(self, token: str, given: TokenRow) -> tuple[int, int]:
        if given.model is None:
            return ZERO, 0
        found = [i for i, m in enumerate(self._owners) if m.name == given.model]
        if not found:
            names = ", ".join(m.name for m in self._owners)
            what = f"the row of {token!r} is to come from {given.model}, which is no model of this merge"
            raise UserError("RG307", what, where=given.where, fix=f"choose one of {names}")
        name, ids, size = given.model, self._ids[found[0]], self._sizes[found[0]]
        if given.token_id is not None:
            if given.token_id >= size:
                what = f"{name} has no row {given.token_id}: its embedding has {size}"
                raise UserError("RG310", what, where=given.where, fix=f"choose a number below {size}")
            return found[0], given.token_id
        wanted = given.token if given.token is not None else token
        if wanted not in ids:
            what = f"{name} has no token {wanted!r}"
            raise UserError("RG310", what, where=given.where, fix=_nearest(wanted, self._tables[found[0]]))
        return found[0], ids[wanted]


def _output(
    choice: VocabularyChoice, owners: Sequence[Member], giver: Member, tables: Mapping[str, TokenTable]
) -> TokenTable:
    """The tokenizer of the result: the giver's own object if nothing is added to it."""
    first = tables[giver.name]
    others = [tables[m.name] for m in owners if m is not giver] if choice.source is None else []
    for member in owners if others else ():
        kind = tables[member.name].kind
        if kind != first.kind:
            what = f"{giver.name} has a tokenizer of the kind {first.kind}, {member.name} one of the kind {kind}"
            fix = "take the tokenizer of one of them as the source: the same text is not the same token in both"
            raise UserError("RG210", what, where=choice.where, fix=fix)
    known = set(first.ids).union(*(one.ids for one in others))
    more = {token: _setting(token, row, tables) for token, row in choice.tokens.items() if token not in known}
    if not more and all(
        token in first.ids and (token not in o.added or token in first.added) for o in others for token in o.ids
    ):
        return first
    return united(first, others, more, where=f"{choice.where}, {giver.name}")


def _setting(token: str, row: TokenRow, tables: Mapping[str, TokenTable]) -> AddedToken:
    """How a token is added that the recipe names: as the model has it that gives the row."""
    source = tables.get(row.model or "")
    return source.added[token] if source is not None and token in source.added else AddedToken(token)


def _table(member: Member, choice: VocabularyChoice) -> TokenTable:
    found = _read(member.checkpoint)
    if found is None:
        what = f"{member.name} has no {_FILE}, so nothing tells which row of its embedding is which token"
        fix = "load its tokenizer with AutoTokenizer and save it beside the model"
        raise UserError("RG210", what, where=choice.where, fix=fix)
    return found


@lru_cache(maxsize=128)  # by identity: the steps of a recipe share their inputs
def _read(checkpoint: Checkpoint) -> TokenTable | None:
    if isinstance(checkpoint, PlannedCheckpoint) and checkpoint.tokenizer_json is not None:
        return token_table(checkpoint.tokenizer_json, where=checkpoint.ref)
    path = checkpoint.files.get(_FILE)
    if path is None:
        return None
    return token_table(path.read_text(encoding="utf-8", errors="replace"), where=str(path))


def _lengths(member: Member, own: Layout) -> dict[str, int]:
    """Tensors with an entry per token -> how many they have."""
    axes = {name: own.vocabulary_axis(name) for name in member.checkpoint.tensors}
    return {n: member.checkpoint.tensors[n].shape[axis] for n, axis in axes.items() if axis is not None}


def _rows(member: Member, lengths: Mapping[str, int], choice: VocabularyChoice) -> int:
    """Rows of a model's embedding.

    Raises:
        UserError: RG208 if its tensors are not known, RG204 if they have different numbers of rows.
    """
    if not lengths:
        kind = member.checkpoint.model_type or member.name
        what = f"it is not known which tensors of {kind} have a row for each token"
        raise UserError(
            "RG208", what, where=choice.where, fix="merge models of one vocabulary, and leave tokenizer out"
        )
    if len(set(lengths.values())) > 1:
        named = " and ".join(f"{size} in {name}" for name, size in lengths.items())
        what = f"{member.name} has different numbers of rows in its vocabulary: {named}"
        raise UserError("RG204", what, where=choice.where, fix="resize its embedding and head to one size")
    return next(iter(lengths.values()))


def _beside(source: TensorSource, axis: int) -> tuple[int, ...]:
    return (*source.shape[:axis], *source.shape[axis + 1 :])


def _nearest(token: str, table: TokenTable) -> str:
    """A hint for a misspelt token, looked for among the added ones, which have names."""
    close = difflib.get_close_matches(token, list(table.added), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "choose another model, another token, or {kind: zero}"
