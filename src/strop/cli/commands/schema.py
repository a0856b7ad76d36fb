"""`strop schema`: print the JSON schema of a recipe."""

from __future__ import annotations

import json


def schema() -> None:
    """Print the JSON schema of a recipe."""
    from strop.config.schema import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=2))
