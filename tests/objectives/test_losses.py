"""Every loss against the same formula written again in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models import model
from regraft.errors import UserError
from regraft.objectives.features import Features, feature_loss
from regraft.objectives.logits import Logits, logit_loss
from regraft.objectives.minilm import MiniLM, relation_loss
from regraft.objectives.own_loss import OwnLoss
from regraft.objectives.perturbation import Perturbation, perturbation_loss
from regraft.resize.factorise import factorise
from regraft.resize.low_rank import LowRankLinear
from regraft.train.objective import Phases, Sum
from regraft.train.tap import Seen, Signal, every_block, look
from regraft.train.teacher import Teacher

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
IDS = torch.arange(10).reshape(2, 5) + 5


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (p * (np.log(p) - np.log(q))).sum(-1)


def test_features() -> None:
    s, t = normal(2, 5, 4), normal(2, 5, 4, seed=1)
    a, b, valid = s.numpy(), t.numpy(), MASK.numpy()
    assert float(feature_loss(s, t, None)) == pytest.approx(((a - b) ** 2).mean(), rel=1e-6)
    assert float(feature_loss(s, t, MASK)) == pytest.approx(((a - b) ** 2)[valid].mean(), rel=1e-6)
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert float(feature_loss(s, t, MASK, "cosine")) == pytest.approx((1 - cosine)[valid].mean(), rel=1e-6)


@given(st.floats(0.5, 4), st.integers(0, 100))
def test_logits(temperature: float, seed: int) -> None:
    s, t = normal(3, 6, seed=seed), normal(3, 6, seed=seed + 1)
    p, q = (softmax(x.numpy() / temperature) for x in (t, s))
    m = (p + q) / 2
    expected = {
        "kl": temperature**2 * kl(p, q),
        "soft_ce": -(temperature**2) * (p * np.log(q)).sum(-1),
        "sym_kl": temperature**2 * (kl(p, q) + kl(q, p)) / 2,
        "js": temperature**2 * (kl(p, m) + kl(q, m)) / 2,
        "mse": ((s - t).numpy() ** 2).mean(-1),
    }
    for kind, values in expected.items():
        found = logit_loss(s, t, kind, temperature)  # type: ignore[arg-type]
        assert np.allclose(found.numpy(), values, rtol=1e-4, atol=1e-5), kind


def test_classes_of_two_models_are_matched_by_name() -> None:
    def named(*names: str, seed: int = 0) -> Any:
        numbers = {name: i for i, name in enumerate(names)}
        return model("vit", seed, num_labels=len(names), id2label=dict(enumerate(names)), label2id=numbers)

    student, teacher = named("cat", "dog", "owl"), named("owl", "cat", "dog", seed=1)
    batch = {"pixel_values": normal(2, 1, 8, 8).float()}
    term = Logits("sym_kl")
    term.prepare(student, teacher)
    one, two = look(student, batch), look(teacher, batch)
    p, q = (softmax(x.detach().double().numpy()) for x in (two.output.logits[:, [1, 2, 0]], one.output.logits))
    assert float(term(one, batch, two).detach()) == pytest.approx(((kl(p, q) + kl(q, p)) / 2).mean(), rel=1e-4)
    with pytest.raises(UserError, match="the student has a class 'owl', and the teacher has none of that name"):
        term.prepare(student, named("cat", "dog", "emu"))


def test_only_logits_themselves_are_compared_where_there_is_no_distribution() -> None:
    for changes in ({"num_labels": 1}, {"num_labels": 3, "problem_type": "multi_label_classification"}):
        one, two = (model("vit", seed, **changes) for seed in (0, 1))
        Logits("mse").prepare(one, two)
        with pytest.raises(UserError, match="does not choose one of several classes"):
            Logits("kl").prepare(one, two)


def test_tokens_are_compared_with_tokens_alone() -> None:
    bert, classifier = model("bert"), model("vit", num_labels=int(model("bert").config.vocab_size))
    for pair in ((bert, classifier), (classifier, bert), (bert, model("bert", vocab_size=64))):
        with pytest.raises(UserError, match=r"tells \d+ tokens apart and the teacher \d+") as caught:
            Logits("mse").prepare(*pair)
        assert caught.value.code == "RG204"


def test_saturated_logits_give_finite_losses() -> None:
    s, t = torch.tensor([[300.0, -300.0]]), torch.tensor([[-300.0, 300.0]])
    for kind in ("kl", "soft_ce", "sym_kl", "js"):
        assert torch.isfinite(logit_loss(s.half().float(), t, kind)).all()  # type: ignore[arg-type]


def test_perturbation() -> None:
    product, weight = normal(6, 5), normal(6, 5, seed=1)
    largest = np.abs((product - weight).numpy()).max()
    for eps in (0.0, 0.5, 100.0):
        assert float(perturbation_loss(product, weight, eps)) == pytest.approx((largest - eps) ** 2)
        assert float(perturbation_loss(product, weight, eps, "hinge")) == pytest.approx(max(0.0, largest - eps) ** 2)


def relation(x: np.ndarray, y: np.ndarray, heads: int, head: int, length: int, causal: bool) -> np.ndarray:
    """The relation of one head of one example, with padding cut off before the softmax."""
    width = x.shape[-1] // heads
    one, other = (v[:length, head * width : (head + 1) * width] for v in (x, y))
    scores = one @ other.T / np.sqrt(width)
    if causal:
        scores = np.where(np.tril(np.ones((length, length))) > 0, scores, -1e30)
    return softmax(scores)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_relations(causal: bool, padded: bool) -> None:
    """Widths of student and teacher differ; per example, head and row, padding cut off."""
    student, teacher = (normal(2, 5, 8), normal(2, 5, 8, seed=1)), (normal(2, 5, 12, seed=2), normal(2, 5, 12, seed=3))
    heads = 4
    lengths = [5, 3] if padded else [5, 5]
    examples = []
    for i, length in enumerate(lengths):
        total = 0.0
        for head in range(heads):
            p = relation(teacher[0][i].numpy(), teacher[1][i].numpy(), heads, head, length, causal)
            q = relation(student[0][i].numpy(), student[1][i].numpy(), heads, head, length, causal)
            with np.errstate(divide="ignore", invalid="ignore"):
                total += np.nan_to_num(p * (np.log(p) - np.log(q))).sum()
        examples.append(total / (heads * length))
    found = relation_loss(student, teacher, heads, MASK if padded else None, causal=causal)
    assert float(found) == pytest.approx(np.mean(examples), rel=1e-5)


@given(st.integers(0, 1000))
def test_relations_of_equal_models_cost_nothing_and_padding_changes_nothing(seed: int) -> None:
    x, y = normal(2, 5, 8, seed=seed), normal(2, 5, 8, seed=seed + 1)
    assert float(relation_loss((x, x), (x, x), 4, MASK)) == 0
    noise = torch.where(MASK[..., None], 0.0, 100.0)
    plain, padded = (relation_loss((y + n, y + n), (x - n, x - n), 4, MASK) for n in (0 * noise, noise))
    assert float(plain) == pytest.approx(float(padded), abs=1e-6)
    cut = relation_loss((y[1:, :3], y[1:, :3]), (x[1:, :3], x[1:, :3]), 4)
    whole = relation_loss((y[1:], y[1:]), (x[1:], x[1:]), 4, MASK[1:])
    assert float(cut) == pytest.approx(float(whole), abs=1e-6)


def test_relations_have_gradients_where_rows_are_padding() -> None:
    x = normal(2, 5, 8).float().requires_grad_()
    relation_loss((x, x), (normal(2, 5, 8, seed=3).float(),) * 2, 4, MASK, causal=True).backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert float(x.grad[1, 3:].abs().max()) == 0


def test_terms_on_real_models_are_what_the_functions_give() -> None:
    student, teacher = model("bert"), model("bert", seed=1)
    batch = {"input_ids": IDS, "attention_mask": MASK.long(), "labels": IDS.masked_fill(IDS % 3 > 0, -100)}
    term = Features()
    one, two = (look(m, batch, every_block(m)) for m in (student, teacher))
    expected = [((one[s] - two[s]).detach().numpy() ** 2)[MASK.numpy()].mean() for s in every_block(student)]
    term.prepare(student, teacher)
    assert float(term(one, batch, two)) == pytest.approx(np.mean(expected), rel=1e-5)
    hidden = student(input_ids=IDS, attention_mask=MASK.long(), output_hidden_states=True).hidden_states
    for signal, state in zip(every_block(student), hidden[1:], strict=True):
        assert torch.equal(one[signal], state)
    logits = Logits("kl", 2.0)
    logits.prepare(student, teacher)
    rows = logit_loss(one.logits, two.logits, "kl", 2.0)[IDS % 3 == 0]
    assert float(logits(one, batch, two)) == pytest.approx(float(rows.mean()), rel=1e-5)
    assert float(OwnLoss()(one, batch, None)) == pytest.approx(float(student(**batch).loss))


def test_labels_of_causal_models_count_at_the_position_before() -> None:
    student, teacher = model("gpt2"), model("gpt2", seed=1)
    labels = torch.tensor([[-100, -100, 7, 8, 9], [5, 6, 7, -100, -100]])
    batch = {"input_ids": IDS, "attention_mask": MASK.long(), "labels": labels}
    one, two = look(student, batch), look(teacher, batch)
    rows = logit_loss(one.logits, two.logits)
    counted = torch.cat([rows[0, 1:4], rows[1, 0:2]])
    assert float(Logits()(one, batch, two)) == pytest.approx(float(counted.mean()), rel=1e-5)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "vit"])
def test_queries_keys_and_values_are_those_of_the_model(family: str) -> None:
    """From what the tap caught, the attention of the model itself is computed again."""
    whole = model(family)
    batch: dict[str, Any] = {"input_ids": IDS} if family != "vit" else {"pixel_values": normal(2, 1, 8, 8).float()}
    signals = [Signal(kind) for kind in ("query", "key", "value")]
    seen = look(whole, batch, signals)
    q, k, v = (seen[s] for s in signals)
    assert q.shape[-1] == 32
    assert k.shape == v.shape
    if family == "llama":  # two heads of keys for four of queries, turned by position: values suffice
        assert v.shape[-1] == 16
        return
    heads = [t.unflatten(-1, (4, 8)).transpose(1, 2) for t in (q, k, v)]
    context = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=family == "gpt2")
    from regraft.axes.module_map import modules_of

    roles = modules_of(whole)
    output = whole.get_submodule(roles.part(roles.blocks[""][-1], "attention.output"))
    caught: list[torch.Tensor] = []
    handle = output.register_forward_pre_hook(lambda m, args: caught.append(args[0]))
    look(whole, batch)
    handle.remove()
    assert torch.allclose(context.transpose(1, 2).flatten(2), caught[0], atol=1e-5)


@pytest.mark.parametrize("relation", ["v1", "v2"])
def test_minilm_on_models_of_other_width_and_depth(relation: str) -> None:
    teacher = model("bert", num_hidden_layers=4, hidden_size=48, intermediate_size=96)
    student = model("bert", seed=1)
    batch = {"input_ids": IDS, "attention_mask": MASK.long()}
    term = MiniLM(relation, 8 if relation == "v2" else None)  # type: ignore[arg-type]
    term.prepare(student, teacher)
    one, two = look(student, batch, term.signals(student)), look(teacher, batch, term.teacher_signals(teacher))
    own = {s.kind: one[s] for s in term.signals(student)}
    other = {s.kind: two[s] for s in term.teacher_signals(teacher)}
    pairs = [("query", "key"), ("value", "value")] if relation == "v1" else [(k, k) for k in ("query", "key", "value")]
    heads = 4 if relation == "v1" else 8
    expected = sum(float(relation_loss((own[a], own[b]), (other[a], other[b]), heads, MASK)) for a, b in pairs)
    loss = term(one, batch, two)
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    loss.backward()
    trained = {name for name, p in student.named_parameters() if p.grad is not None}
    assert "bert.encoder.layer.1.attention.self.query.weight" in trained
    assert not any("cls." in name or "layer.1.output" in name for name in trained)


def test_minilm_refuses_what_it_cannot_compare() -> None:
    bert, other = model("bert"), model("bert", num_attention_heads=2)
    for term, student, teacher, words in (
        (MiniLM("v1"), other, bert, "student has 2 heads and the teacher 4"),
        (MiniLM("v1"), model("llama"), model("llama"), "turns or shifts attention by position"),
        (MiniLM("v2", 5), bert, bert, "5 relation heads do not divide the widths 32 and 32"),
        (MiniLM("v2"), bert, model("gpt2"), "sees what comes later"),
        (MiniLM("v2", None, 9), bert, bert, "no layer 9, it has 2"),
    ):
        with pytest.raises(UserError, match=words):
            term.prepare(student, teacher)


def test_terms_refuse_models_that_do_not_go_together() -> None:
    bert = model("bert")
    for term, student, teacher, words in (
        (Features(), bert, model("bert", num_hidden_layers=3), r"blocks \{'': 2\} and the teacher \{'': 3\}"),
        (Features("last"), bert, model("clip"), "the stacks"),
        (Logits(), bert, model("bert", vocab_size=50), "96 tokens apart and the teacher 50"),
        (Perturbation(), bert, model("bert"), "no low-rank layer"),
    ):
        with pytest.raises(UserError, match=words):
            term.prepare(student, teacher)
    wide = model("bert", hidden_size=48, intermediate_size=96)
    batch = {"input_ids": IDS}
    with pytest.raises(UserError, match=r"features are \(5, 32\) and the teacher's \(5, 48\)"):
        Features()(look(bert, batch, every_block(bert)), batch, look(wide, batch, every_block(wide)))
    with pytest.raises(UserError, match="has no logits"):
        _ = Seen(bert.bert, object()).logits
    with pytest.raises(UserError, match="computes no loss of its own"):
        OwnLoss().prepare(bert.bert, None)
    with pytest.raises(UserError, match="the data has no labels"):
        OwnLoss()(look(bert, batch), batch, None)
    with pytest.raises(UserError, match="features needs a teacher"):
        Sum(lambda e, s: {}, [(1.0, Features())])


def test_perturbation_of_a_model_is_the_mean_over_its_layers() -> None:
    teacher, student = model("gpt2"), model("gpt2")
    factorise(student)
    term = Perturbation(eps=0.01, every=2)
    term.prepare(student, teacher)
    seen, taught = Seen(student, None), Seen(teacher, None)
    expected = []
    for name, module in student.named_modules():
        if isinstance(module, LowRankLinear):
            product = module.up.weight.detach().numpy() @ module.down.weight.detach().numpy()
            weight = teacher.get_submodule(name).weight.detach().numpy().T  # Conv1D stores it the other way round
            expected.append((np.abs(product - weight).max() - 0.01) ** 2)
    assert float(term(seen, {}, taught)) == pytest.approx(np.mean(expected), rel=1e-4)
    term.at(1)
    assert float(term(seen, {}, taught)) == 0
    term.at(2)
    assert float(term(seen, {}, taught)) > 0


def test_weights_and_phases() -> None:
    phases = Phases(((0.0, 1.0), (0.5, 0.0)))
    assert [phases.at(x) for x in (0.0, 0.49, 0.5, 1.0)] == [1.0, 1.0, 0.0, 0.0]
    for wrong in ((), ((0.1, 1.0),), ((0.0, 1.0), (0.5, 2.0), (0.4, 3.0))):
        with pytest.raises(UserError, match="the phases of a weight begin at"):
            Phases(wrong)
    student, teacher = model("bert"), model("bert", seed=1)
    batch = {"input_ids": IDS, "labels": IDS}
    runner = Teacher(teacher)
    both = Sum(lambda e, s: batch, [(0.5, OwnLoss()), (phases, Features())], runner)
    both.prepare(student)
    loss, parts = both.loss(student, batch)
    assert float(loss) == pytest.approx(0.5 * float(parts["own"]) + float(parts["features"]), rel=1e-6)
    assert runner.passes == 1
    both.at(6, 10)
    loss, parts = both.loss(student, batch)
    assert set(parts) == {"own"}
    assert float(loss) == pytest.approx(0.5 * float(parts["own"]))
    assert runner.passes == 1
