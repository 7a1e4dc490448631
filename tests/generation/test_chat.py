from __future__ import annotations

import json
from pathlib import Path

import pytest

from onnxpress.errors import BadInputError
from onnxpress.generation.chat import find_template, render, special_tokens

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello {{ 7 * 7 }}"}]


def test_a_template_in_use() -> None:
    assert render(CHATML, HELLO, {}) == (
        "<|im_start|>system\nYou are helpful<|im_end|>\n<|im_start|>user\nHello {{ 7 * 7 }}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_it_renders_as_transformers_does() -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    template = """{{- bos_token }}
    {% for message in messages %}
        {% generation %}{{ message.content | trim }}{% endgeneration %}
        {% if loop.last %}{% break %}{% endif %}
    {% endfor %}
    {{ messages | tojson }}"""
    theirs, _ = utils.render_jinja_template(
        [HELLO], chat_template=template, bos_token="<s>", add_generation_prompt=True
    )
    assert render(template, HELLO, {"bos_token": "<s>"}) == theirs[0]


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ self._TemplateReference__context }}{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% set _ = messages.append(1) %}",
        "{% for i in range(99999999) %}x{% endfor %}",
        "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0]['content'] + 1 }}",
        "{% for %}",
    ],
)
def test_hostile_and_broken_templates(template: str) -> None:
    with pytest.raises(BadInputError, match="chat template"):
        render(template, HELLO, {})


def test_attributes_outside_the_sandbox_are_undefined() -> None:
    assert render("{{ raise_exception.__globals__ }}{{ messages.__class__ }}", HELLO, {}) == ""


def test_where_templates_live(tmp_path: Path) -> None:
    assert find_template(tmp_path) is None
    config = {"chat_template": [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]}
    config |= {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert find_template(tmp_path) == "D"
    assert special_tokens(tmp_path) == {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "chat_template.jinja").write_text("J")
    assert find_template(tmp_path) == "J"
