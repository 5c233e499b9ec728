"""Chat templates against recorded renderings, and templates that must not harm."""

import datetime
import json
from pathlib import Path

import jinja2
import pytest

from memdlm_jax.data import chat

FOLDER = Path(__file__).parents[1] / "golden" / "tokenizer_llada"
GOLDEN = json.loads((FOLDER / "golden_tokenizer.json").read_text())["chat"]
PUBLISHED = json.loads((FOLDER / "tokenizer_config.json").read_text())["chat_template"]
BOS = {"bos_token": "<|startoftext|>"}
HELLO = [{"role": "user", "content": "Hello"}]
TALK = [
    {"role": "system", "content": "You are a helpful assistant"},
    *HELLO,
    {"role": "assistant", "content": "Hi there"},
    {"role": "user", "content": "How are you?"},
]


@pytest.mark.parametrize("case", GOLDEN)
@pytest.mark.parametrize("opened", [True, False])
def test_llada_renders_as_recorded(case, opened):
    suffix = f"text_add_gen_{str(opened).lower()}"
    assert chat.render_chat(PUBLISHED, case["messages"], opened, BOS) == case[suffix]
    assert chat.render_chat(chat.LLADA, case["messages"], opened, BOS) == case[f"dllm_{suffix}"]


def test_llada_does_not_open_a_second_answer():
    ended = chat.render_chat(chat.LLADA, TALK[:3], True, BOS)
    assert ended == chat.render_chat(chat.LLADA, TALK[:3], False, BOS)
    assert ended.endswith("Hi there<|eot_id|>")


def test_llada_moe_renders_as_the_public_servers_do():
    """The long text is what llama.cpp prints for its example conversation."""
    assert chat.render_chat(chat.LLADA_MOE, TALK) == (
        "<role>SYSTEM</role>You are a helpful assistant\ndetailed thinking off<|role_end|>"
        "<role>HUMAN</role>Hello<|role_end|><role>ASSISTANT</role>Hi there<|role_end|>"
        "<role>HUMAN</role>How are you?<|role_end|><role>ASSISTANT</role>"
    )
    assert chat.render_chat(chat.LLADA_MOE, HELLO, False) == (
        "<role>SYSTEM</role>detailed thinking off<|role_end|><role>HUMAN</role>Hello<|role_end|>"
    )


def test_chatml():
    assert chat.render_chat(chat.CHATML, TALK[1:3]) == (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi there<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("tokens", "template"),
    [
        (
            "<role> <|mdm_mask|> <|start_header_id|> <|end_header_id|> <|eot_id|>",
            chat.LLADA,
        ),
        ("<|mdm_mask|> <role>", ""),
        ("<|mask|> <|role_end|>", chat.LLADA_MOE),
        ("<|mask|> <|im_start|> <|im_end|>", chat.CHATML),
        ("<|im_start|> <|im_end|>", ""),
        ("<|mask|> <|user|> <|assistant|>", ""),
    ],
)
def test_a_family_is_known_by_its_tokens(tokens, template):
    assert chat.family_template(tokens.split().__contains__) == template


@pytest.mark.parametrize(
    "source",
    [
        "{% for x in ['a', 'b'] %}{{ loop.index }}/{{ loop.length }}{{ x }}{{ loop.last }}"
        "{% else %}none{% endfor %}{% for x in [] %}{% else %}none{% endfor %}",
        "{% for m in messages %}{{ m.role ~ ':' ~ (m.content | upper) ~ loop.revindex }}"
        "{% endfor %}",
        "{% for m in messages recursive %}{{ m.role }}{{ loop(messages[2:]) if loop.first "
        "and loop.depth == 1 else '' }}{% endfor %}",
        "{% macro f(x) %}<{{ x * 2 + '%' }}>{% endmacro %}{{ f('a') }}{{ 7 % 4 ** 2 }}",
        "{{ messages | map(attribute='role') | join(', ') }}{{ 'a b'.split() | last }}",
    ],
)
def test_the_guards_change_no_harmless_template(source):
    plain = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    for _ in range(2):
        assert chat.render_chat(source, TALK) == plain.from_string(source).render(messages=TALK)


def test_functions_of_public_templates():
    source = (
        "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i > 2 %}{% break %}"
        "{% endif %}{{ i }}{% endfor %}\n"
        "  {% if tools is none %}\n"
        "{{ messages[0] | tojson }}{{ {'b': '<é>', 'a': 1} | tojson(sort_keys=true) }}\n"
        "  {% endif %}\n"
        "{{ strftime_now('%d %b %Y') }}{{ missing }}"
    )
    now = datetime.datetime(2025, 3, 9)
    assert chat.render_chat(source, HELLO, now=now) == (
        '02{"role": "user", "content": "Hello"}{"a": 1, "b": "<é>"}\n09 Mar 2025'
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{% for %}", "is no valid Jinja in line 2"),
        ("{{ 'a' | nothing }}", "No filter named 'nothing'"),
        ("{{ raise_exception('no system turn, please') }}", "no system turn, please"),
        ("{{ messages[7].content.x }}", "no element 7"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for a in range(10 ** 6) %}{% endfor %}", "Range too big"),
        (
            "{% set r = range(999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
            "more than 100000 steps",
        ),
        (
            "{% macro f(n) %}{{ f(n - 1) + f(n - 1) if n else '' }}{% endmacro %}{{ f(99) }}",
            "more than 100000 steps",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 'a' * 10 ** 10 }}", "too long"),
        ("{{ 9 ** 9 ** 9 }}", "too large"),
        ("{{ '%99999999999d' % 1 }}", "'%' on text"),
        ("{{ 'a'.ljust(10 ** 10) }}", "too large"),
        ("{{ 'a' | center(10 ** 10) }}", "too large"),
        (
            "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}"
            "{% endfor %}",
            "more than 10000000 characters",
        ),
        (
            "{% set x = 'a' * 10 ** 6 %}{% for i in range(99) %}{{ x }}{% endfor %}",
            "more than 10000000 characters",
        ),
    ],
)
def test_a_bad_template_is_one_clear_error(source, message):
    with pytest.raises(ValueError, match="chat template") as error:
        chat.ChatTemplate(source).render(HELLO)
    assert message in str(error.value)


def test_a_template_cannot_change_the_conversation():
    messages = [dict(HELLO[0])]
    with pytest.raises(ValueError, match="unsafe"):
        chat.render_chat("{{ messages[0].update(content='x') }}", messages)
    assert messages == HELLO


def test_hidden_spans_come_back():
    texts = ["ab\ue000cd", "x", ""]
    hidden, marks = chat.hide(texts, [[(1, 2), (3, 5)], [(0, 1)], []])
    pieces = [chat.split_hidden(text, marks) for text in hidden]
    assert pieces == [["a", 0, "\ue000", 1, ""], ["", 2, ""], [""]]


@pytest.mark.parametrize(
    "source",
    [
        "{{ '{:>600000000}'.format('x') }}",
        "{{ '%600000000d'|format(1) }}",
        "{{ messages|tojson(indent=300000000) }}",
        "{% set a = 'a' * 9000 %}{{ a.replace('a', a) }}",
        "{% set a = 'a' * 9000 %}{{ a|replace('a', a) }}",
        "{% set a = 'a' * 9000 %}{{ a.join(a) }}",
        "{% set a = 'a' * 9000 %}{{ a|join(a) }}",
    ],
)
def test_large_texts_are_refused_before_they_are_made(source):
    with pytest.raises(ValueError, match=r"too (large|often)"):
        chat.render_chat(source, [{"role": "user", "content": "hi"}])
