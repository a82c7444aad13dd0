"""What the claims on instruction and domain vectors measure of a decoder."""

from __future__ import annotations

import random

import torch

from claims import language_models as lm
from claims import text
from claims.shared import State

# (tokens of raw text, questions, general questions that are answered token by token, tokens of an answer)
SIZES = {"laptop": (30_000, 250, 60, 36), "smoke": (500, 6, 3, 4)}


class Examination:
    """Held-out text and questions of one seed; each measure takes the state of a model."""

    def __init__(self, seed: int, scale: str) -> None:
        base = text.decoder(seed=seed, scale=scale)
        raw, count, self.answered, self.tokens = SIZES[scale]
        self.model, self.tokenizer = text.read(base), text.tokenizer_of(base)
        self.pad, self.end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        self.general, self.domain = (text.ids(base, domain, seed, scale)[1][:raw] for domain in (False, True))
        generic, special = (text.questions(domain, seed, scale)[1] for domain in (False, True))
        self.generic = generic[:count]
        draws = random.Random(seed + 3)
        self.choices = [[f, *draws.sample([g for g in special if g is not f], 3)] for f in special[:count]]

    def __call__(self, state: State) -> dict[str, float]:
        """All measures by name."""
        return {
            "general loss": self.general_loss(state),
            "domain loss": self.domain_loss(state),
            "answer loss": self.answer_loss(state),
            "format": self.format(state),
            "domain questions": self.domain_questions(state),
        }

    def general_loss(self, state: State) -> float:
        """Loss per token of held-out raw text outside the domain."""
        self.model.load_state_dict(state)
        return lm.loss_on(self.model, self.general, text.LENGTH, len(self.general))

    def domain_loss(self, state: State) -> float:
        """Loss per token of held-out raw text of the domain."""
        self.model.load_state_dict(state)
        return lm.loss_on(self.model, self.domain, text.LENGTH, len(self.domain))

    def answer_loss(self, state: State) -> float:
        """Loss per token of the answers to held-out general questions."""
        self.model.load_state_dict(state)
        return float(lm.answer_losses(self.model, text.dialogues(self.tokenizer, self.generic), self.pad).mean())

    def domain_questions(self, state: State) -> float:
        """How often an answer is more likely after the right question than after those about three other functions."""
        self.model.load_state_dict(state)
        pairs = [(other, choices[0]) for choices in self.choices for other in choices]
        rows = [lm.dialogue(self.tokenizer, text.ask(asked), right.summary) for asked, right in pairs]
        losses = lm.answer_losses(self.model, rows, self.pad).view(-1, 4)
        return float((losses[:, 0] < losses[:, 1:].min(1).values).float().mean())

    @torch.inference_mode()
    def format(self, state: State) -> float:
        """How often a greedy answer to a general question is one line of text and ends as instructed."""
        self.model.load_state_dict(state)
        heads = [lm.dialogue(self.tokenizer, text.ask(f))[0] for f in self.generic[: self.answered]]
        right = 0
        for length in sorted({len(head) for head in heads}):  # equal lengths, so that nothing is padded
            group = torch.tensor([head for head in heads if len(head) == length])
            mask = torch.ones_like(group)
            made = self.model.generate(group, attention_mask=mask, max_new_tokens=self.tokens, do_sample=False)
            for row in made[:, length:].tolist():
                answer = self.tokenizer.decode(row[: row.index(self.end)]) if self.end in row else ""
                right += bool(answer.strip()) and "\n" not in answer
        return right / len(heads)
