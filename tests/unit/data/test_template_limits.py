from __future__ import annotations

import resource
import signal
import time

import pytest

from online_dpo.data import template_limits
from online_dpo.data.chat import render
from online_dpo.data.text import UnusablePrompt
from online_dpo.scoring.chat_templates import check_template
from support import tiny

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
BOMB = "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}"
HOSTILE = [ENDLESS, BOMB, "{{ 'x' * 10**11 }}", "{{ 9 ** (9 ** 9) }}", "{{ '%099999999999d' % 1 }}"]


def tokenizer(template: str):
    made = tiny.tokenizer()
    made.chat_template = template
    return made


@pytest.mark.parametrize("template", HOSTILE)
def test_a_hostile_template_is_stopped(template, monkeypatch):
    monkeypatch.setattr(template_limits, "SECONDS", 0.2)
    monkeypatch.setattr(template_limits, "MORE_BYTES", 2**28)
    template_limits._tried.clear()
    began, limit, handler = time.monotonic(), resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)
    with pytest.raises(UnusablePrompt, match=r"refuses the messages \((it was stopped|MemoryError|it computes powers)"):
        render(tokenizer(template), [{"role": "user", "content": "w1"}], {})
    assert time.monotonic() - began < 60.0
    assert resource.getrlimit(resource.RLIMIT_AS) == limit
    assert signal.getsignal(signal.SIGALRM) == handler and signal.getitimer(signal.ITIMER_REAL)[0] == 0.0


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in %}", "TemplateSyntaxError"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "RecursionError"),
        ("w1 w2", "leaves answers out"),
        (ENDLESS, "it was stopped after"),
    ],
)
def test_the_template_of_a_scorer_is_tried_before_anything_is_sampled(template, says, monkeypatch):
    monkeypatch.setattr(template_limits, "SECONDS", 0.2)
    with pytest.raises(ValueError, match=f"The chat template of reward model `r` .*{says}"):
        check_template(tokenizer(template), "reward model `r`")


def test_templates_that_want_other_messages_are_not_refused():
    check_template(tokenizer("{{ raise_exception('a system message first') }}"), "reward model `r`")
    check_template(tiny.tokenizer(chat=True), "reward model `r`")
