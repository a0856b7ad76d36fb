"""Templates of model files are bounded in memory and time."""

from __future__ import annotations

import jinja2
import pytest

from strop.data.rendering.sandbox import BoundedTemplate


@pytest.mark.parametrize("doubled", ["ns.x ~ ns.x", "ns.x + ns.x"])
@pytest.mark.parametrize("start", ["'a'", "[1]"])
def test_repeated_doubling_of_a_text_is_refused(doubled: str, start: str) -> None:
    source = (
        f"{{% set ns = namespace(x={start}) %}}{{% for i in range(60) %}}{{% set ns.x = {doubled} %}}{{% endfor %}}"
    )
    with pytest.raises(jinja2.TemplateRuntimeError, match="a text of more than"):
        BoundedTemplate(source).render()


def test_concatenation_and_addition_equal_those_of_jinja() -> None:
    source = "{{ a ~ 1 ~ none ~ b ~ missing ~ true ~ [1] }}|{{ 'x' ~ ('y' ~ 'z') }}|{{ 'p' + 'q' + a }}|{{ [1] + [2] }}"
    given = {"a": "ä", "b": 2.5}
    assert BoundedTemplate(source).render(**given) == jinja2.Environment().from_string(source).render(**given)
