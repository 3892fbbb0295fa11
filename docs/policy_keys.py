"""Write ``docs/policy-keys.md`` from the JSON Schema of policy files: ``python docs/policy_keys.py``."""

from pathlib import Path
from typing import Any

from ssprop_fx import Policy

PAGE = Path(__file__).with_name("policy-keys.md")
INTRODUCTION = """# Every key of a policy file

Made by `python docs/policy_keys.py` from the schema that `ssprop-fx policy schema` prints. [The policy file](policy.md)
explains how the keys work together.
"""


def values(schema: dict[str, Any]) -> str:
    """What a key may be, in words."""
    if "anyOf" in schema:
        return " or ".join(values(option) for option in schema["anyOf"])
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("type") == "array":
        return f"a list of {values(schema['items'])}"
    kind = {"integer": "whole number", "number": "number", "boolean": "`true`, `false`", "string": "text", "null": "`null`"}
    bounds = [
        f"{sign} {schema[key]:g}"
        for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
        if key in schema
    ]
    return " ".join([kind[schema["type"]], ", ".join(bounds)]).strip()


def table(properties: dict[str, Any]) -> str:
    """A line for each key."""
    lines = ["| key | default | values | meaning |", "|---|---|---|---|"]
    for key, schema in properties.items():
        value = schema.get("default")
        default = "" if value is None else "see there" if isinstance(value, dict) else f"`{str(value).lower()}`"
        lines.append(f"| `{key}` | {default} | {values(schema)} | {schema.get('description', '')} |")
    return "\n".join(lines)


def page() -> str:
    """The page's text."""
    schema = Policy.json_schema()
    parts = [INTRODUCTION, "## At the top\n", table(schema["properties"])]
    for name, part in schema["$defs"].items():
        parts += [f"\n## {name}\n", f"{part['description']}\n", table(part["properties"])]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
