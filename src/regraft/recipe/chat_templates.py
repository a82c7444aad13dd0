"""Chat templates that recipes may call by name, as in mergekit: how a conversation becomes text, in Jinja.

A conversation is `messages`, each with a `role` and a `content`; `add_generation_prompt` asks for the beginning of an
answer. What the names stand for is what the models of these families were trained with.
"""

from __future__ import annotations

from regraft.recipe.fields import Field

_CHATML = r"""
{%- for message in messages -%}
    {{ '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<|im_start|>assistant\n' }}
{%- endif -%}
"""

_LLAMA3 = r"""
{{- bos_token -}}
{%- for message in messages -%}
    {{ '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\n\n' ~ message.content | trim ~ '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif -%}
"""

_ALPACA = r"""
{%- set headings = {'user': '### Instruction:\n', 'user_context': '### Input:\n', 'assistant': '### Response:\n'} -%}
{%- for message in messages -%}
    {{- '\n\n' if not loop.first -}}
    {{- headings.get(message.role, '') ~ message.content | trim -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '\n\n' if messages -}}
    {{ headings.assistant }}
{%- endif -%}
"""

_MISTRAL = r"""
{%- set system = messages[0].content ~ '\n\n' if messages and messages[0].role == 'system' else '' -%}
{%- set turns = messages[1:] if system else messages -%}
{{- bos_token -}}
{%- for message in turns -%}
    {%- if message.role != ['user', 'assistant'][loop.index0 % 2] -%}
        {{ raise_exception('user and assistant have to take turns, beginning with user, after an optional system') }}
    {%- elif message.role == 'user' -%}
        {{ ' [INST] ' ~ (system if loop.first else '') ~ message.content ~ ' [/INST]' }}
    {%- else -%}
        {{ ' ' ~ message.content ~ eos_token }}
    {%- endif -%}
{%- endfor -%}
"""

_EXAONE = r"""
{%- if messages and messages[0].role != 'system' -%}
    {{ '[|system|][|endofturn|]\n' }}
{%- endif -%}
{%- for message in messages -%}
    {{ '[|' ~ message.role ~ '|]' ~ message.content ~ ('' if message.role == 'user' else '[|endofturn|]') ~ '\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '[|assistant|]' }}
{%- endif -%}
"""

TEMPLATES = {
    "alpaca": _ALPACA.strip(),
    "chatml": _CHATML.strip(),
    "exaone": _EXAONE.strip(),
    "llama3": _LLAMA3.strip(),
    "mistral": _MISTRAL.strip(),
}


def chat_template(field: Field, or_else: str = "") -> str:
    """The template that a recipe gives as a name or as Jinja text.

    Args:
        or_else: what else the field may say, for the message.

    Raises:
        UserError: RG303 if it is neither.
    """
    text = field.text("a chat template")
    if text in TEMPLATES:
        return TEMPLATES[text]
    if "{" not in text:
        fix = f"write {or_else}one of {', '.join(TEMPLATES)}, or the Jinja text itself"
        raise field.error("RG303", f"the chat template {text!r} is neither a known name nor Jinja text", fix)
    return field.node.text
