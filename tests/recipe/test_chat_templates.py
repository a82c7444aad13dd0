"""Chat templates by name: what a conversation becomes, as transformers renders it."""

from __future__ import annotations

import pytest
import tokenizers
import transformers as hf
from jinja2 import TemplateError

from regraft.recipe.chat_templates import TEMPLATES

TALK = [("system", "Be brief."), ("user", " Hello. "), ("assistant", "Hi!"), ("user", "2+2?")]
EXPECTED = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Hello. <|im_end|>\n"
    "<|im_start|>assistant\nHi!<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHello.<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHi!<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "alpaca": "Be brief.\n\n### Instruction:\nHello.\n\n### Response:\nHi!\n\n### Instruction:\n2+2?\n\n"
    "### Response:\n",
    "mistral": "<s> [INST] Be brief.\n\n Hello.  [/INST] Hi!</s> [INST] 2+2? [/INST]",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|] Hello. \n[|assistant|]Hi![|endofturn|]\n[|user|]2+2?\n"
    "[|assistant|]",
}


def rendered(name: str, talk: list[tuple[str, str]], prompt: bool = True) -> str:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATES[name]
    messages = [{"role": role, "content": content} for role, content in talk]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation(name: str) -> None:
    assert rendered(name, TALK) == EXPECTED[name]


def test_without_a_system_message_and_without_a_prompt() -> None:
    assert rendered("alpaca", TALK[1:2], prompt=False) == "### Instruction:\nHello."
    assert rendered("exaone", TALK[1:2], prompt=False) == "[|system|][|endofturn|]\n[|user|] Hello. \n"
    assert rendered("mistral", TALK[1:3]) == "<s> [INST]  Hello.  [/INST] Hi!</s>"


def test_mistral_refuses_a_conversation_that_it_cannot_write() -> None:
    with pytest.raises(TemplateError, match="take turns"):
        rendered("mistral", TALK[2:])
