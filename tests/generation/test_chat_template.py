"""Chat templates render as transformers renders them."""

from __future__ import annotations

import datetime
import functools
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st

from edgecompose.errors import BundleError, GenerationError
from edgecompose.generation.chat_template import ChatTemplate, self_contained

TOKENS: dict[str, Any] = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": '<pad "\\é😀>',
    "additional_special_tokens": ["<a>", "<b>"],
}
#: Written for these tests with the constructs that the templates of these models have.
TEMPLATES = {
    "llama 3.2": """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set first = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set first = "" %}
{%- endif %}
{{- "<|start|>system<|end|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today: " + date_string + "\\n\\n" + first + "<|eot|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start|>' + message['role'] + '<|end|>\\n\\n'+ message['content'] | trim + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|end|>\\n\\n' }}
{%- endif %}
""",
    "qwen 2.5": """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nBe helpful.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "qwen 3": """{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and not(message.content.startswith('<r>')) %}
        {%- set ns.multi_step = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + thought + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}""",
    "gemma": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported')\
 }}{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Roles must alternate') }}{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model'\
 %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim\
 + '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}""",
    "mistral": """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("After the optional system message, roles must alternate user/assistant/user/...") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
""",
    "phi 3.5": """{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}{{'<|system|>
' + message['content'] + '<|end|>
'}}{% elif message['role'] == 'user' %}{{'<|user|>
' + message['content'] + '<|end|>
'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>
' + message['content'] + '<|end|>
'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>
' }}{% else %}{{ eos_token }}{% endif %}""",
    "phi 4": """{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and message\
['tools'] is not none %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' }}{% else %}{% generation %}\
{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endgeneration %}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}""",
    "smollm3": """{# defaults #}
{%- if enable_thinking is not defined -%}
{%- set enable_thinking = true -%}
{%- endif -%}
{%- if enable_thinking -%}
  {%- set mode = "/think" -%}
{%- else -%}
  {%- set mode = "/no_think" -%}
{%- endif -%}
{%- set today = strftime_now("%d %B %Y") -%}
{{- "<|im_start|>system\\nToday: " ~ today ~ "\\nMode: " ~ mode ~ "<|im_end|>\\n" -}}
{%- for message in messages -%}
    {%- set content = message.content if message.content is string else "" -%}
    {%- if message.role == "user" -%}
        {{ "<|im_start|>" + message.role + "\\n"  + content + "<|im_end|>\\n" }}
    {%- elif message.role == "assistant" -%}
        {%- generation -%}
        {%- if mode == "/think" -%}
            {{ "<|im_start|>assistant\\n" + content.lstrip("\\n") + "<|im_end|>\\n" }}
        {%- else -%}
            {%- set content = "<think>\\n\\n</think>\\n" + content -%}
            {{ "<|im_start|>assistant\\n" + content + "<|im_end|>\\n" }}
        {%- endif -%}
        {%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ "<|im_start|>assistant\\n" }}
{%- endif -%}
""",
    "granite 3": """{%- if messages[0]['role'] == 'system' %}
     {%- set system_message = messages[0]['content'] %}
     {%- set loop_messages = messages[1:] %}
{%- else %}
     {%- set system_message = "Knowledge Cutoff Date: April 2024.\\nToday's Date: " + strftime_now('%B %d, %Y') + "." %}
     {%- if tools and documents %}
         {%- set system_message = system_message + " Tools and documents." %}
     {%- elif documents %}
         {%- set system_message = system_message + " Documents." %}
     {%- endif %}
     {%- set loop_messages = messages %}
{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system_message + '<|end_of_text|>
' }}
{%- if documents is not none %}
    {{- '<|start_of_role|>documents<|end_of_role|>' + documents | tojson(indent=4) }}
{%- endif %}
{%- for message in loop_messages %}
    {{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] | tojson + '<|end_of_text|>
' }}
    {%- if loop.last and add_generation_prompt %}
        {{- '<|start_of_role|>assistant<|end_of_role|>' }}
    {%- endif %}
{%- endfor %}""",
    "command-r": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}\
{% set system_message = messages[0]['content'] %}{% elif false == true %}{% set loop_messages = messages %}\
{% set system_message = 'You are Command-R' %}{% else %}{% set loop_messages = messages %}\
{% set system_message = false %}{% endif %}{% if system_message != false %}{{ '<|START|><|SYSTEM|>' + system_message +\
 '<|END|>' }}{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0)\
 %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% set content = message['content'] %}{% if message['role'] == 'user' %}{{ '<|START|><|USER|>' + content.strip() +\
 '<|END|>' }}{% elif message['role'] == 'assistant' %}{{ '<|START|><|BOT|>' + content.strip() + '<|END|>' }}{% endif %}\
{% endfor %}{% if add_generation_prompt %}{{ '<|START|><|BOT|>' }}{% endif %}""",
    "hermes": """   {%- macro json_to_type(spec) -%}
{{ spec | tojson(separators=(',', ':'), sort_keys=True) }}
{%- endmacro -%}
{{bos_token}}{{ '<|im_start|>system\\n' }}
{%- if tools is iterable and tools | length > 0 %}{%- for tool in tools %}{{ tool|tojson }}{% endfor %}{% endif %}
  {% for message in messages %}
    {%- if loop.index > 4 %}{% break %}{% endif %}
    {% if message.role == "tool" %}{% continue %}{% endif %}
{{ json_to_type(message) }} {{ additional_special_tokens | join(',') }} {{ pad_token }} {{ sep_token }}
  {% endfor %}
{%- if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}
""",
}
CONTENT = st.text(
    st.sampled_from(["a", "B", " ", "\n", "<", ">", "&", "'", '"', "é", "😀", "{", "}", "%", "\\", "\t", "1"]),
    max_size=8,
) | st.sampled_from(["<think>\nwhy\n</think>\n\nso", "{{ 1 + 1 }}", "<b> & é'", "", "</s>", "<|im_end|>", "\u2028"])
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "user", "system", "tool"]), "content": CONTENT}
    ),
    min_size=1,
    max_size=6,
)
TURNS = st.lists(CONTENT, min_size=1, max_size=5).map(
    lambda contents: [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
)
HELLO = [{"role": "user", "content": "<b> & é'"}]


@functools.cache
def _theirs() -> Any:
    empty = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=empty, **TOKENS)


@functools.cache
def _ours(name: str) -> ChatTemplate:
    return ChatTemplate(self_contained(TEMPLATES[name], TOKENS))


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@given(messages=TURNS | MESSAGES, prompt=st.booleans())
def test_prompts_are_those_of_transformers(name: str, messages: list[dict[str, str]], prompt: bool) -> None:
    try:
        expected = _theirs().apply_chat_template(
            messages, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=prompt
        )
    except Exception as error:  # a template is a program and may raise anything
        with pytest.raises(GenerationError) as refused:
            _ours(name).render(messages, add_generation_prompt=prompt)
        assert str(error) in str(refused.value)
    else:
        assert _ours(name).render(messages, add_generation_prompt=prompt) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% if tools is not none %}tools{% endif %}{% if documents is not none %}documents{% endif %}", ""),
        ("{{ messages[0].content | tojson }}", '"<b> & é\'"'),
        (
            "{{ {'b': [1], 'a': 'é'} | tojson(indent=1, ensure_ascii=True, sort_keys=true) }}",
            '{\n "a": "\\u00e9",\n "b": [\n  1\n ]\n}',
        ),
        ("{% generation %}a{% endgeneration %}\n{%- generation -%} b {%- endgeneration %}c", "abc"),
        ("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}", "21"),
        ("{% for m in messages %}{% generation %}{{ loop.index }}{% endgeneration %}{% endfor %}", "1"),
        ("{{ strftime_now('%Y') }}", str(datetime.datetime.now().year)),
    ],
)
def test_what_templates_of_models_use(source: str, expected: str) -> None:
    assert ChatTemplate(source).render(HELLO) == expected


@pytest.mark.parametrize(
    "start", ["", "\n", "  ", "\n  {% if true %}x{% endif %}", "  {% if true %}x{% endif %}", "{#- c #}\n"]
)
def test_variables_are_set_without_a_trace(start: str) -> None:
    template = f"{start}{{{{ bos_token }}}}|{{{{ pad_token }}}}|{{{{ sep_token }}}}|{{{{ cls_token is defined }}}}"
    whole = self_contained(template, TOKENS)
    assert ChatTemplate(whole).render(HELLO) == _theirs().apply_chat_template(
        HELLO, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert "eos_token" not in whole
    assert self_contained("plain", TOKENS) == "plain"


@pytest.mark.parametrize(
    "source", ["{% generation %}", "{% endgeneration %}", "{% if %}", "{% generation %}{% endfor %}"]
)
def test_a_template_that_is_no_jinja_is_a_bundle_error(source: str) -> None:
    with pytest.raises(BundleError, match="not valid Jinja"):
        ChatTemplate(source).render(HELLO)


@pytest.mark.parametrize("name", ["gemma", "mistral", "command-r"])
def test_a_refusal_says_what_the_template_says(name: str) -> None:
    talk = [{"role": "assistant", "content": "a"}, *HELLO]
    with pytest.raises(GenerationError, match=r"chat template refused.*[Rr]oles must alternate"):
        _ours(name).render(talk)
    if name == "gemma":
        with pytest.raises(GenerationError, match="System role not supported"):
            _ours(name).render([{"role": "system", "content": "a"}, *HELLO])


def test_messages_are_not_changed_by_a_template() -> None:
    messages = [{"role": "user", "content": "a"}]
    with pytest.raises(GenerationError):
        ChatTemplate("{{ messages[0].update(role='x') }}").render(messages)
    assert messages == [{"role": "user", "content": "a"}]
