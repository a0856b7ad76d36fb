"""A template of a model file takes neither all memory nor all time."""

from __future__ import annotations

import jinja2
import pytest

from strop.data.rendering.sandbox import BoundedTemplate


@pytest.mark.parametrize("doubled", ["ns.x ~ ns.x", "ns.x + ns.x"])
@pytest.mark.parametrize("start", ["'a'", "[1]"])
def test_a_text_that_is_doubled_again_and_again(doubled: str, start: str) -> None:
    source = (
        f"{{% set ns = namespace(x={start}) %}}{{% for i in range(60) %}}{{% set ns.x = {doubled} %}}{{% endfor %}}"
    )
    with pytest.raises(jinja2.TemplateRuntimeError, match="a text of more than"):
        BoundedTemplate(source).render()


def test_what_is_joined_and_added_is_as_jinja_has_it() -> None:
    source = "{{ a ~ 1 ~ none ~ b ~ missing ~ true ~ [1] }}|{{ 'x' ~ ('y' ~ 'z') }}|{{ 'p' + 'q' + a }}|{{ [1] + [2] }}"
    given = {"a": "ä", "b": 2.5}
    assert BoundedTemplate(source).render(**given) == jinja2.Environment().from_string(source).render(**given)
