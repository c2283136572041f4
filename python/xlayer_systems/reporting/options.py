"""Options of a system in plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

WIDTH = 110
_SIGNS = {"minimum": "≥", "maximum": "≤", "exclusiveMinimum": ">", "exclusiveMaximum": "<"}


def format_schema(schema: Mapping[str, Any]) -> str:
    """Formats the JSON schema of a system (`xlayer_systems.runs.system.System.schema`) as a list of its options."""
    properties = schema["properties"]
    lines = [f"{schema['title']}: {schema['description']}", "", "run"]
    lines += _list({name: found for name, found in properties.items() if name not in ("options", "config")})
    for section, title in (("config", "config (--set KEY=VALUE)"), ("options", "options (--set KEY=VALUE)")):
        if properties[section].get("properties"):
            lines += ["", title, *_list(properties[section]["properties"])]
    lines += ["", "presets, by what they change"]
    lines += [f"  {name:<16} {_changes(changes)}".rstrip() for name, changes in schema["presets"].items()]
    return "\n".join([*lines, "", f"quick changes {_changes(schema['quick'])}"])


def _list(properties: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, found in properties.items():
        head = f"  {name} = {_value(found['default'])}  ({_kind(found)})"
        lines.append(head)
        lines += textwrap.wrap(found["description"], WIDTH, initial_indent="      ", subsequent_indent="      ")
    return lines


def _kind(found: Mapping[str, Any]) -> str:
    if "enum" in found:
        return ", ".join(map(_value, found["enum"]))
    types = [found["type"]] if isinstance(found["type"], str) else found["type"]
    bounds = [f"{sign} {_value(found[name])}" for name, sign in _SIGNS.items() if name in found]
    return ", ".join([" or ".join("none" if name == "null" else name for name in types), *bounds])


def _changes(changes: Mapping[str, Any]) -> str:
    parts = []
    for section, fields in changes.items():
        if fields is None:
            parts.append(f"no {section}")
        else:
            parts += [f"{name}={_value(value)}" for name, value in fields.items()]
    return ", ".join(parts)


def _value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
