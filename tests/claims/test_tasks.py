"""The tasks of text and the generators: parts share nothing, answers are right, chance is what it is said to be."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from claims.corpus import Source
from claims.tasks import Matching, Pair, Passage, Task

from claims import answers, arithmetic, grammar, linear, passages, tasks


@pytest.mark.parametrize("name", sorted(tasks.CHOICES))
def test_parts_of_a_choice_share_no_text_and_no_file(name: str) -> None:
    task = tasks.CHOICES[name](0, "smoke")
    assert list(task.parts) == ["train", "validation", "test"]
    for one, other in itertools.combinations(task.parts.values(), 2):
        assert one
        assert other
        assert not tasks.files_of(one) & tasks.files_of(other)
        assert not {tasks.alike(p.text) for p in one} & {tasks.alike(p.text) for p in other}
    assert task.chance == 1 / len(task.classes)
    assert tasks.CHOICES[name](0, "smoke") == task


@pytest.mark.parametrize("name", sorted(tasks.CHOICES))
def test_classes_have_equal_shares(name: str) -> None:
    task = tasks.CHOICES[name](0, "smoke")
    for part in task.parts.values():
        counts = Counter(passage.label for passage in part)
        assert len(counts) == len(task.classes)
        assert len(set(counts.values())) == 1


@pytest.mark.parametrize("name", sorted(tasks.MATCHINGS))
def test_parts_of_a_matching_share_no_text_and_no_file(name: str) -> None:
    task = tasks.MATCHINGS[name](0, "smoke")
    pairs = [pair for part in task.parts.values() for pair in part]
    assert len({tasks.alike(pair.right) for pair in pairs}) == len(pairs)
    assert len({tasks.alike(pair.left) for pair in pairs}) == len(pairs)
    for one, other in itertools.combinations(task.parts.values(), 2):
        assert one
        assert not tasks.files_of(one) & tasks.files_of(other)
    assert all(len(part) % task.among == 0 for part in task.parts.values())


def test_tests_are_on_files_that_no_model_was_pre_trained_on() -> None:
    from claims import text

    seen = set(text.texts(False, 0, "laptop")[0])
    for name in ("call", "balance", "prose"):
        parts = tasks.CHOICES[name](0, "smoke").parts
        files = {source.name: source.text for source in tasks.split_files(0)["test"]}
        assert all(files[passage.file] not in seen for passage in parts["test"])


def test_the_name_of_the_package_is_hidden() -> None:
    for part in tasks.module(0, "smoke").parts.values():
        assert not any(package in passage.text.lower() for passage in part for package in tasks.PACKAGES)


SOURCE = Source(
    "top",
    "top.py",
    '''"""About this module, in a sentence that is long enough.

    >>> indented and an example, which is no prose at all
"""
# A remark that goes over two lines of the source, since one
# would be too short.
class Thing:
    def name(self, count=3):
        """Say something about a thing, so often. And more."""
        total = "text".join(["a", "b"])  # remark
        if count:
            return total.strip()
        return {}
''',
)


def test_what_is_taken_from_a_file() -> None:
    assert list(passages.paragraphs(SOURCE)) == [
        "About this module, in a sentence that is long enough.",
        "Say something about a thing, so often. And more.",
        "A remark that goes over two lines of the source, since one would be too short.",
    ]
    assert 'total = "text".join(["a", "b"])  # remark' in list(passages.statements(SOURCE))
    assert list(passages.calls(SOURCE, ("join", "strip", "pop")))[1][1] == "strip"
    assert [name for _, name in passages.calls(SOURCE, ("join", "strip", "pop"))] == ["join", "strip"]
    assert all(before.endswith(".") for before, _ in passages.calls(SOURCE, ("join", "strip")))
    ((sentence, function),) = passages.documented_functions(SOURCE)
    assert sentence == "Say something about a thing, so often."
    assert function.startswith("def _(self, count=3):\ntotal = ")
    assert "Say something" not in function
    places = list(passages.words_in_place(SOURCE))
    of_kind = [[SOURCE.text[begin:end] for begin, end, is_prose in places if is_prose == kind] for kind in (0, 1)]
    assert of_kind[0] == ["class", "Thing", "def", "name", "self", "count", "total", "join", "if", "count", "return",
                          "total", "strip", "return"]  # fmt: skip
    assert of_kind[1][:4] == ["About", "this", "module", "in"]
    assert of_kind[1][-3:] == ["often", "And", "more"] or of_kind[1][-1] == "remark"
    assert "text" not in [*of_kind[0], *of_kind[1]]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("f(a[1], {2: '('})", True),
        ("f(a[1)]", False),
        ("f(a", False),
        ("f)a(", False),
        ("'it''s'", True),
        ('"it\'s"', True),
        ("'it\\'s'", True),
        ("'it's'", False),
        ("", True),
    ],
)
def test_brackets_and_quotes(text: str, right: bool) -> None:
    assert passages.balanced(text) == right


def test_one_sign_alone_fits_where_one_is_hidden() -> None:
    draw, statement = random.Random(0), "f(a[1], {2: '('})"
    found = [hidden for _ in range(200) if (hidden := tasks.without_sign(statement, draw))]
    assert {sign for _, sign in found} == {"(", ")", "[", "]", "'"}
    for text, sign in found:
        assert text.replace(tasks.HIDDEN, sign) == statement
        fit = [one for one in "()[]{}'\"" if passages.balanced(text.replace(tasks.HIDDEN, one))]
        assert fit == [sign]
    assert tasks.without_sign("a = b", draw) is None
    # whatever stands in a string, "'…' + a" matches, so that a sign in it is not hidden
    others = [tasks.without_sign("'(' + a", draw) for _ in range(50)]
    assert {hidden[1] for hidden in others if hidden} == {"'"}


def test_the_right_output_stands_with_its_example() -> None:
    for pair in (pair for part in tasks.doctest(0, "smoke").parts.values() for pair in part):
        assert pair.left
        assert "\n" not in pair.right


def choice(texts: dict[str, list[tuple[str, int]]]) -> Task:
    return Task("?", ("a", "b"), {part: [Passage(*one, "f") for one in some] for part, some in texts.items()})


def test_the_linear_baseline_learns_what_n_grams_tell_and_nothing_else() -> None:
    draw = random.Random(0)
    told = [(f"{draw.random()} {'x y' if i % 2 else 'y x'}", i % 2) for i in range(120)]
    parts = {"train": told[:60], "validation": told[60:80], "test": told[80:]}
    assert linear.classified(choice(parts)) > 0.9
    untold = [(text, draw.randrange(2)) for text, _ in told]
    parts = {"train": untold[:60], "validation": untold[60:80], "test": untold[80:]}
    assert linear.classified(choice(parts)) < 0.75


def test_the_end_of_a_text_alone_is_tried_as_well() -> None:
    draw = random.Random(1)
    told = [("".join(draw.choices("ab", k=200)) + "ab"[i % 2], i % 2) for i in range(160)]
    parts = {"train": told[:80], "validation": told[80:120], "test": told[120:]}
    assert linear.classified(choice(parts), end=1) == 1.0


def test_matching_by_shared_n_grams() -> None:
    pairs = [Pair(f"word{i} and more", f"less of word{i}", "f") for i in range(8)]
    task = Matching("?", 4, {"train": pairs, "validation": pairs, "test": pairs})
    assert linear.matched(task) == 1.0
    assert task.chance == 0.25


def test_ties_are_divided_and_groups_are_apart() -> None:
    assert linear.found_in_groups(np.ones((4, 4)), 2) == 0.5
    similar = np.array([[2, 1, 9, 9], [2, 1, 9, 9], [9, 9, 1, 0], [9, 9, 0, 1]])
    assert linear.found_in_groups(similar, 2) == 0.75
    assert linear.found_in_groups(similar, 4) == 0.0


def test_last_layers_go_on_where_the_others_ended() -> None:
    import transformers

    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()

    def tokenizer(texts: list[str], **_: object) -> dict[str, torch.Tensor]:
        ids = torch.randint(1, 30, (len(texts), 6), generator=torch.Generator().manual_seed(1))
        mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 3 + [0] * 3])[: len(texts)]
        return {"input_ids": ids, "attention_mask": mask}

    inputs = answers.below(model, tokenizer, ["a", "b", "c"], 6)
    with torch.inference_mode():
        whole = model(**tokenizer(["a", "b", "c"])).last_hidden_state
        with answers.last_layers(model, answers.LAST_LAYERS):
            rows = answers.cut(inputs, [1, 2])
            assert rows["inputs_embeds"].shape == (2, 4, 16)
            part = model(**rows).last_hidden_state
        again = model(**tokenizer(["a", "b", "c"])).last_hidden_state
    torch.testing.assert_close(part[0], whole[1, :4])
    torch.testing.assert_close(part[1, :3], whole[2, :3])
    assert again.equal(whole)


def test_questions_of_arithmetic_are_apart_and_right() -> None:
    parts = [set(arithmetic.questions(part)) for part in arithmetic.PARTS]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 20_000
    assert [round(len(part) / 20_000, 1) for part in parts] == [0.7, 0.1, 0.2]
    assert arithmetic.right((7, "+", 85)) == 92
    assert arithmetic.right((7, "-", 85)) == 78
    asked = "".join(arithmetic.TOKENS[i] for i in arithmetic.written((7, "+", 85)))
    assert asked == "07+85=290"
    for sign, count in arithmetic.ANSWERS.items():
        every = {arithmetic.right(q) for part in arithmetic.PARTS for q in arithmetic.questions(part, sign)}
        assert len(every) == count


def test_accuracy_counts_whole_answers_that_the_model_gives_itself() -> None:
    class Knows(torch.nn.Module):
        """Right but for the last digit of differences."""

        def forward(self, input_ids: torch.Tensor) -> object:
            logits = torch.zeros(*input_ids.shape, len(arithmetic.TOKENS))
            for row, ids in enumerate(input_ids.tolist()):
                a, b = 10 * ids[0] + ids[1], 10 * ids[3] + ids[4]
                sign = arithmetic.TOKENS[ids[2]]
                digits = arithmetic.written((a, sign, b))
                if sign == "-":
                    digits[-1] = 9
                logits[row, -1, digits[input_ids.shape[1]]] = 1
            return type("Output", (), {"logits": logits})

    asked = arithmetic.questions("test", "+")[:30] + arithmetic.questions("test", "-")[:10]
    assert arithmetic.accuracy(Knows(), asked) == 0.75


def test_probabilities_of_the_grammar_add_up() -> None:
    for symbol, sides in grammar.RULES.items():
        assert math.isclose(sum(probability for probability, _ in sides), 1), symbol


def test_the_inside_algorithm_agrees_with_counting() -> None:
    """Short sentences are drawn about as often as their probability says, and each was derivable."""
    draw = random.Random(0)
    count = 10_000
    drawn = Counter(grammar.derived(draw) for _ in range(count))
    # All nouns are alike: sentences of one shape are counted together.
    shapes: dict[tuple[str, ...], list[float]] = {}
    kind = {w: "n" for n in grammar.NOUNS.values() for w in n} | {w: "v" for v in grammar.VERBS.values() for w in v}
    for sentence, times in drawn.items():
        shape = tuple(kind.get(word, word) for word in sentence)
        if len(sentence) == 4 and sentence[3] in ("often", "never"):
            if shape not in shapes:  # 8 nouns, 5 verbs
                shapes[shape] = [0.0, 8 * 5 * math.exp(grammar.log_probability(sentence))]
            shapes[shape][0] += times / count
    assert len(shapes) == 2 * 3 * 2 - 2  # `the` goes with both numbers
    for shape, (seen, told) in shapes.items():
        both = 2 if shape[0] == "the" else 1
        error = math.sqrt(told * both / count)
        assert abs(seen - told * both) < 5 * error, shape


def test_a_sentence_that_the_grammar_does_not_derive() -> None:
    assert grammar.log_probability(("the", "dog", "see", "a", "cat")) == -math.inf
    assert grammar.log_probability(("the", "dog", "that", "the", "cats", "see", "sees", "a", "cat")) > -math.inf
    assert grammar.log_probability(("the", "dog", "that", "the", "cats", "see", "see", "a", "cat")) == -math.inf


def test_sentences_of_two_derivations_count_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """S -> S S | a: `a a a` has two derivations, each of probability 0.4^2 * 0.6^3."""
    monkeypatch.setattr(grammar, "RULES", {"S": [(0.4, ("S", "S")), (0.6, ("a",))]})
    grammar._by_right.cache_clear()
    try:
        assert math.isclose(grammar.log_probability(("a", "a", "a")), math.log(2 * 0.4**2 * 0.6**3))
    finally:
        grammar._by_right.cache_clear()


def test_parts_of_the_grammar_are_apart() -> None:
    draw = random.Random(0)
    some = [grammar.drawn(draw, part) for part in ("train", "validation", "test") for _ in range(50)]
    assert [grammar.part_of(sentence) for sentence in some] == ["train"] * 50 + ["validation"] * 50 + ["test"] * 50
    assert all(len(sentence) <= grammar.LONGEST for sentence in some)


def test_the_trigrams_of_the_grammar_are_counted_as_the_model_is() -> None:
    """With two sentences, one word apart, in equal shares, every model of the past has the same loss: ln 2 / 6."""
    pair = [("the", "dog", "sees", "a", "cat"), ("the", "dog", "sees", "a", "bird")]
    sentences = [pair[i % 2] for i in random.Random(0).choices(range(2), k=4000)]
    assert grammar.trigram_loss(sentences, sentences[:1000]) == pytest.approx(math.log(2) / 6, abs=0.01)
