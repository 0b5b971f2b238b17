"""The input schema that `cog build` would write for predict.py, made without Cog's command line.

coglet, Cog's server, validates requests only against .cog/openapi_schema.json. Like Cog's own
parser this one reads predict.py without running it, so it takes literals only; unlike Cog's, it
refuses what it cannot read instead of dropping it.
"""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path
from typing import Any

JSON_TYPES = {
    "str": "string", "int": "integer", "float": "number", "bool": "boolean", "Secret": "string",
}  # fmt: skip
_SECRET = {"format": "password", "writeOnly": True, "x-cog-secret": True}
BOUNDS = {
    "ge": "minimum",
    "le": "maximum",
    "min_length": "minLength",
    "max_length": "maxLength",
    "description": "description",
}


def write_schema(root: Path) -> Path:
    """Write root/.cog/openapi_schema.json for root/predict.py, in one move."""
    path = root / ".cog" / "openapi_schema.json"
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    schema = build_schema((root / "predict.py").read_text(encoding="utf-8"))
    partial.write_text(json.dumps(schema), encoding="utf-8")
    partial.rename(path)
    return path


def build_schema(source: str) -> dict[str, Any]:
    """The OpenAPI 3.0.2 document for the Predictor.predict in a predict.py.

    Raises:
        ValueError: an input is annotated or bounded in a way that Cog could not read.
    """
    predict = _find_predict(ast.parse(source))
    schemas: dict[str, Any] = {}
    properties, required = {}, []
    arguments = predict.args.args[1:]
    if len(arguments) != len(predict.args.defaults):
        raise ValueError("every input of predict needs an Input(...)")
    for order, (argument, call) in enumerate(zip(arguments, predict.args.defaults, strict=True)):
        field = _input_fields(argument.arg, call)
        properties[argument.arg] = _property(argument, field, order, schemas)
        if "default" not in properties[argument.arg]:
            required.append(argument.arg)
    output = {"type": "array", "items": {"type": "string", "format": "uri"}, "title": "Output"}
    if predict.returns is None or ast.unparse(predict.returns) != "list[Path]":
        raise ValueError("predict must be annotated to return list[Path]")
    schemas = {
        "Input": {
            "title": "Input",
            "type": "object",
            "properties": properties,
            "required": required,
        },
        "Output": output,
        **schemas,
        **_RESPONSE_SCHEMAS,
    }
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": "0.1.0"},
        "paths": _PATHS,
        "components": {"schemas": schemas},
    }


def read_concurrency(source: str) -> int:
    """The N of @concurrent(max=N) on the Predictor.predict in a predict.py; 1 without it.

    Raises:
        ValueError: N is no literal, so that Cog could not read it.
    """
    for decorator in _find_predict(ast.parse(source)).decorator_list:
        match decorator:
            case ast.Call(func=name, keywords=[ast.keyword(arg="max", value=limit)]):
                if ast.unparse(name) in ("concurrent", "cog.concurrent"):
                    return int(ast.literal_eval(limit))
    return 1


def _find_predict(tree: ast.Module) -> ast.FunctionDef | ast.AsyncFunctionDef:
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Predictor"]
    for method in (m for predictor in classes for m in predictor.body):
        match method:
            case ast.FunctionDef(name="predict") | ast.AsyncFunctionDef(name="predict"):
                return method
    raise ValueError("there is no Predictor.predict")


def _input_fields(name: str, call: ast.expr) -> dict[str, Any]:
    """The keywords of an Input(...) call, each a literal."""
    if not isinstance(call, ast.Call) or ast.unparse(call.func) != "Input" or call.args:
        raise ValueError(f"{name}: write Input(...) with keywords only")
    try:
        fields = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except ValueError as error:
        raise ValueError(f"{name}: Input(...) takes literals only ({error})") from error
    if any(k.value.lineno != k.value.end_lineno for k in call.keywords if k.arg == "description"):
        raise ValueError(f"{name}: Cog reads a description on one line only")
    unknown = set(fields) - set(BOUNDS) - {"default", "choices"}
    if unknown:
        raise ValueError(f"{name}: Input({', '.join(sorted(unknown))}) is not known here")
    return fields


def _property(
    argument: ast.arg, field: dict[str, Any], order: int, schemas: dict[str, Any]
) -> dict[str, Any]:
    """One input's schema; an enum for its choices goes into schemas, as Cog does it."""
    name = argument.arg
    annotation = ast.unparse(argument.annotation) if argument.annotation else ""
    nullable = annotation.startswith("Optional[")
    python_type = annotation.removeprefix("Optional[").removesuffix("]")
    if python_type not in JSON_TYPES:
        raise ValueError(f"{name}: {annotation!r} is not a type that this schema knows")
    if "default" in field and field["default"] is None and not nullable:
        raise ValueError(f"{name}: with default=None, annotate Optional[{annotation}]")
    schema: dict[str, Any] = {"x-order": order}
    if "choices" in field:
        schemas[name] = {
            "title": name,
            "description": "An enumeration.",
            "enum": field["choices"],
            "type": JSON_TYPES[python_type],
        }
        schema["allOf"] = [{"$ref": f"#/components/schemas/{name}"}]
    else:
        schema |= {"title": name.replace("_", " ").title(), "type": JSON_TYPES[python_type]}
        schema |= _SECRET if python_type == "Secret" else {}
    if "default" in field:
        schema["default"] = field["default"]
    if nullable:
        schema["nullable"] = True
    return schema | {BOUNDS[key]: field[key] for key in BOUNDS if key in field}


def _ok(schema: dict[str, Any]) -> dict[str, Any]:
    content = {"application/json": {"schema": schema}}
    return {"200": {"description": "Successful Response", "content": content}}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


_INVALID = {
    "422": {
        "description": "Validation Error",
        "content": {"application/json": {"schema": _ref("HTTPValidationError")}},
    }
}
_PATHS = {
    "/": {"get": {"summary": "Root", "operationId": "root__get", "responses": _ok({})}},
    "/health-check": {
        "get": {
            "summary": "Healthcheck",
            "operationId": "healthcheck_health_check_get",
            "responses": _ok({}),
        }
    },
    "/predictions": {
        "post": {
            "summary": "Predict",
            "description": "Run a single prediction on the model",
            "operationId": "predict_predictions_post",
            "requestBody": {"content": {"application/json": {"schema": _ref("PredictionRequest")}}},
            "responses": _ok(_ref("PredictionResponse")) | _INVALID,
        }
    },
    "/predictions/{prediction_id}/cancel": {
        "post": {
            "summary": "Cancel",
            "operationId": "cancel_predictions__prediction_id__cancel_post",
            "parameters": [
                {
                    "required": True,
                    "schema": {"title": "Prediction Id", "type": "string"},
                    "name": "prediction_id",
                    "in": "path",
                }
            ],
            "responses": _ok({}) | _INVALID,
        }
    },
}
_TEXT = {"type": "string"}
_TIME = {"type": "string", "format": "date-time"}
_RESPONSE_SCHEMAS: dict[str, Any] = {
    "PredictionRequest": {
        "title": "PredictionRequest",
        "type": "object",
        "properties": {"id": {"title": "Id", **_TEXT}, "input": _ref("Input")},
    },
    "PredictionResponse": {
        "title": "PredictionResponse",
        "type": "object",
        "properties": {
            "input": _ref("Input"),
            "output": _ref("Output"),
            "id": {"title": "Id", **_TEXT},
            "version": {"title": "Version", **_TEXT},
            "created_at": {"title": "Created At", **_TIME},
            "started_at": {"title": "Started At", **_TIME},
            "completed_at": {"title": "Completed At", **_TIME},
            "status": {"title": "Status", **_TEXT},
            "error": {"title": "Error", **_TEXT},
            "logs": {"title": "Logs", **_TEXT},
            "metrics": {"title": "Metrics", "type": "object"},
        },
    },
    "Status": {
        "title": "Status",
        "description": "An enumeration.",
        "enum": ["starting", "processing", "succeeded", "canceled", "failed"],
        "type": "string",
    },
    "HTTPValidationError": {
        "title": "HTTPValidationError",
        "type": "object",
        "properties": {
            "detail": {"title": "Detail", "type": "array", "items": _ref("ValidationError")}
        },
    },
    "ValidationError": {
        "title": "ValidationError",
        "required": ["loc", "msg", "type"],
        "type": "object",
        "properties": {
            "loc": {
                "title": "Location",
                "type": "array",
                "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
            },
            "msg": {"title": "Message", "type": "string"},
            "type": {"title": "Error Type", "type": "string"},
        },
    },
}
