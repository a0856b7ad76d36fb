"""Show the common recipe fields as parameters of `strop.train` on the page of the Python API."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
from strop.config.names import SHORT_FORMS
from strop.config.options import COMMON
from strop.config.schema import option_fields


class CommonOptions(griffe.Extension):
    """Add the fields in COMMON, with the types of Options and the meanings and defaults of docs/recipe.md."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        if pkg.name != "strop":
            return
        function, options = pkg["api.train"], pkg["config.options.Options"]
        fields, lines, parameters = dict(option_fields()), [], list(function.parameters)
        for name in COMMON:
            info = fields.get(SHORT_FORMS.get(name, name))
            text = f"fields of the section `{name}`, as a dictionary" if info is None else info.description
            has_default = info is not None and not info.is_required()
            parameter = griffe.Parameter(
                name,
                annotation=options.members[name].annotation,
                kind=griffe.ParameterKind.keyword_only,
                default=repr(info.default) if has_default else "...",
            )
            parameters.insert(len(lines) + 1, parameter)  # after `recipe`
            lines.append(f"    {name}: {text}.\n")
        function.parameters = griffe.Parameters(*parameters)
        recipe, mark, rest = function.docstring.value.partition("    callback: ")
        function.docstring.value = "".join([recipe, *lines, mark, rest])
