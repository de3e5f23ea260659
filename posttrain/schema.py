"""The JSON schema of a configuration file, so that an editor completes and checks it while it is typed."""

from __future__ import annotations

from typing import Any

from posttrain.pipeline import PipelineConfig
from posttrain.registry import STAGES, load

_INTERPOLATION = {"type": "string", "pattern": r"\$\{.+\}"}


def json_schema() -> dict[str, Any]:
    """One schema for both forms: a pipeline (`stages:`) or a single stage (`stage: KIND`)."""
    definitions: dict[str, Any] = {}
    singles, blocks = [], []
    for kind, spec in STAGES.items():
        schema = _definition(load(spec.config), definitions, kind)
        schema["properties"] = {"stage": {"const": kind, "description": spec.help}, **schema["properties"]}
        block = {**schema, "title": f"{kind} (in a pipeline)"}
        single = {**schema, "title": f"{kind} (a file of its own)"}
        single["properties"] = {
            **schema["properties"],
            "run_dir": {"type": "string", "description": "Where the run is written; --output wins."},
            "vars": {"type": "object", "description": "Values of your own, for ${vars.x} elsewhere."},
        }
        single["required"] = ["stage", *schema.get("required", [])]
        definitions[f"{kind}_block"], definitions[f"{kind}_file"] = block, single
        blocks.append({"$ref": f"#/$defs/{kind}_block"})
        singles.append({"$ref": f"#/$defs/{kind}_file"})
    pipeline = _definition(PipelineConfig, definitions, "pipeline")
    pipeline["properties"]["stages"]["additionalProperties"] = {"anyOf": blocks}
    definitions["pipeline"] = pipeline
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "posttrain configuration",
        "if": {"required": ["stages"]},
        "then": {"$ref": "#/$defs/pipeline"},
        "else": {"anyOf": singles},
        "$defs": definitions,
    }


def _definition(model: Any, definitions: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The schema of `model`; what it refers to goes to `definitions` under names that carry `prefix`."""
    schema = model.model_json_schema(ref_template=f"#/$defs/{prefix}_{{model}}")
    for name, nested in schema.pop("$defs", {}).items():
        definitions[f"{prefix}_{name}"] = _allow_interpolation(nested)
    return _allow_interpolation(schema)


def _allow_interpolation(schema: dict[str, Any]) -> dict[str, Any]:
    """Let every property also be text with a `${...}` in it, which is resolved before validation."""
    for name, value in schema.get("properties", {}).items():
        described = {key: value[key] for key in ("description", "default", "title") if key in value}
        bare = {key: item for key, item in value.items() if key not in described}
        if value.get("type") != "string" or "enum" in value:
            schema["properties"][name] = {**described, "anyOf": [bare, _INTERPOLATION]}
    return schema
