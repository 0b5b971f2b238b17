"""What Cog builds from: cog.yaml, requirements, .dockerignore, and the schema of predict.py."""

from __future__ import annotations

import builtins
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import cog
import jsonschema
import pytest
from cog._adt import PrimitiveType
from cog_config import cog_config, container_environment
from cog_schema import JSON_TYPES, build_schema, read_concurrency, write_schema
from cog_server import server_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dmd2.settings import ROOT

PLATFORM_ONLY = re.compile(r"nvidia-|cuda-|triton")
COG_YAML_SCHEMA = ROOT / "tests" / "data" / "cog_config_schema_v1.0.json"
PINS = {
    path.name: dict(
        line.split("==") for line in path.read_text().splitlines() if line and line[0] != "#"
    )
    for path in (ROOT / "requirements.txt", ROOT / "requirements-dev.txt")
}


def test_cog_yaml_is_valid() -> None:
    schema = json.loads(COG_YAML_SCHEMA.read_text())
    jsonschema.validate(cog_config(), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**cog_config(), "pythons": 3}, schema)


def test_cog_yaml_says_what_the_design_promises() -> None:
    config = cog_config()
    build = config["build"]
    assert build["gpu"] is True
    assert (build["cuda"], build["python_version"]) == ("12.8", "3.11")
    assert build["sdk_version"] == PINS["requirements-dev.txt"]["cog"]
    assert (ROOT / build["python_requirements"]).is_file()
    assert "DMD2_MODEL=sdxl-4step" in config["environment"]
    assert container_environment()["COG_MAX_CONCURRENCY"] == "32"
    assert "concurrency" not in config, "deprecated: the decorator says it"
    assert config["predict"] == "predict.py:Predictor"
    assert not set(build) & {"system_packages", "python_packages"}


def test_every_shipped_dependency_is_pinned() -> None:
    """The whole closure of what requirements.txt names, and none contradicts another."""
    pins = {canonicalize_name(name): version for name, version in PINS["requirements.txt"].items()}
    assert pins["torch"] == "2.11.0"
    assert not {"cog", "coglet"} & set(pins), "Cog installs those itself"
    for name, version in pins.items():
        distribution = importlib.metadata.distribution(name)
        if name not in ("torch", "triton"):
            assert distribution.version == version, name
        for need in map(
            Requirement, pinned_torch_requires() if name == "torch" else distribution.requires or []
        ):
            if not PLATFORM_ONLY.match(need.name) and (
                need.marker is None or need.marker.evaluate({"extra": ""})
            ):
                pin = pins.get(canonicalize_name(need.name))
                assert pin is not None, f"{name} needs {need.name}"
                assert need.specifier.contains(pin), f"{name} needs {need}"


def pinned_torch_requires() -> list[str]:
    """What the container's torch needs; the one that is installed here may be another."""
    version = PINS["requirements.txt"]["torch"]
    lines = (ROOT / "tests" / "data" / f"torch-{version}-requires.txt").read_text().splitlines()[1:]
    installed = importlib.metadata.distribution("torch")
    if installed.version.partition("+")[0] == version:
        said = [line for line in installed.requires or [] if "extra ==" not in line]
        assert of_every_platform(lines) == of_every_platform(said)
    return lines


def of_every_platform(needs: list[str]) -> list[str]:
    """Without what only some builds of torch need."""
    return [line for line in needs if not PLATFORM_ONLY.match(line)]


def test_the_servers_of_a_checkout_see_no_package_that_the_container_lacks() -> None:
    """Of those that diffusers and transformers use where they find them."""
    code = "import sys, predict; print(*(name for name, it in sys.modules.items() if it))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=server_environment({}),
        capture_output=True,
        text=True,
    )
    loaded = {canonicalize_name(name) for name in done.stdout.split() if "." not in name}
    development = {canonicalize_name(name) for name in PINS["requirements-dev.txt"]}
    served = {canonicalize_name(name) for name in PINS["requirements.txt"]} | {"cog", "coglet"}
    assert {"predict", "torch", "diffusers"} <= loaded, done.stderr
    assert {"peft", "scipy"} <= development - served
    assert loaded & (development - served) == set()


def test_no_pin_contradicts_another() -> None:
    both = set(PINS["requirements.txt"]) & set(PINS["requirements-dev.txt"])
    assert both == {"torch"}


def ignored(path: str) -> bool:
    """Whether .dockerignore leaves a path out: the last pattern that matches it decides."""
    answer = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").strip()
        if not pattern or pattern.startswith("#"):
            continue
        regex = re.escape(pattern).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if re.fullmatch(f"{regex}(/.*)?", path):
            answer = not line.startswith("!")
    return answer


def test_the_image_holds_what_it_needs_and_nothing_else() -> None:
    for path in (
        "predict.py", "cog.yaml", "dmd2/engine/engine.py", "weights/manifest.json", "LICENSE",
        "weights/sdxl-4step/unet/config.json", "weights/demo/dmd2.json", ".cog/openapi_schema.json",
    ):  # fmt: skip
        assert not ignored(path), path
    for path in (
        ".git/HEAD", ".venv/bin/python", "tests/conftest.py", "README.md", "scripts/predict",
        "dmd2/__pycache__/engine.pyc", "weights/.downloads/x",
        "weights/.installing-sdxl-4step/unet/config.json", "output.png",
        "weights/tokenizer/vocab.json",
    ):  # fmt: skip
        assert ignored(path), path


def predict_with(signature: str) -> str:
    return f"class Predictor:\n    async def predict(self, {signature}) -> list[Path]: ...\n"


def test_the_schema_mirrors_cogs_own() -> None:
    schemas = build_schema(
        predict_with(
            'text: str = Input(description="Words", min_length=1), '
            "count: Optional[int] = Input(ge=1, le=4, default=None), "
            'kind: str = Input(choices=["a", "b"], default="a"), '
            "on: bool = Input(default=True)"
        )
    )["components"]["schemas"]
    assert schemas["Input"] == {
        "title": "Input",
        "type": "object",
        "required": ["text"],
        "properties": {
            "text": {
                "x-order": 0, "title": "Text", "type": "string", "description": "Words",
                "minLength": 1,
            },
            "count": {
                "x-order": 1, "title": "Count", "type": "integer", "default": None,
                "nullable": True, "minimum": 1, "maximum": 4,
            },
            "kind": {
                "x-order": 2, "allOf": [{"$ref": "#/components/schemas/kind"}], "default": "a",
            },
            "on": {"x-order": 3, "title": "On", "type": "boolean", "default": True},
        },
    }  # fmt: skip
    assert schemas["kind"]["enum"] == ["a", "b"]
    assert schemas["Output"]["items"] == {"type": "string", "format": "uri"}


@pytest.mark.parametrize("annotation", JSON_TYPES)
def test_a_type_is_written_as_cogs_sdk_writes_it(annotation: str) -> None:
    """A secret with what marks it as one, by which pages know that it is to be hidden."""
    python_type = {"Secret": cog.Secret}.get(annotation) or getattr(builtins, annotation)
    expected = PrimitiveType.from_type(python_type).json_type()
    for signature, more in (
        (f"a: {annotation} = Input()", {}),
        (f"a: Optional[{annotation}] = Input(default=None)", {"default": None, "nullable": True}),
    ):
        written = build_schema(predict_with(signature))["components"]["schemas"]["Input"]
        assert written["properties"]["a"] == {"x-order": 0, "title": "A", **expected, **more}


@pytest.mark.parametrize(
    ("decorator", "limit"),
    [("", 1), ("@concurrent(max=5)\n    ", 5), ("@cog.concurrent(max=6)\n    ", 6)],
)
def test_the_concurrency_is_read_as_cog_reads_it(decorator: str, limit: int) -> None:
    source = f"class Predictor:\n    {decorator}async def predict(self): ...\n"
    assert read_concurrency(source) == limit


def test_a_concurrency_that_cog_could_not_read_is_refused() -> None:
    with pytest.raises(ValueError, match="malformed"):
        read_concurrency("class Predictor:\n    @concurrent(max=N)\n    def predict(self): ...")


@pytest.mark.parametrize(
    ("signature", "said"),
    [
        ("a: int = Input(le=LIMIT)", "literals only"),
        ("a: int = Input(default=None)", r"Optional\[int\]"),
        ("a: int = Input(gt=3)", "gt"),
        ('a: int = Input(description="one "\n"two")', "one line"),
        ("a: int = 3", "Input"),
        ("a: int", "every input"),
        ("a: Image = Input()", "Image"),
        ("a = Input()", "not a type"),
    ],
)
def test_what_cog_could_not_read_is_refused(signature: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_schema(predict_with(signature))


def test_every_reference_of_the_schema_exists(tmp_path: Path) -> None:
    (tmp_path / "predict.py").write_text((ROOT / "predict.py").read_text())
    schema = json.loads(write_schema(tmp_path).read_text())
    names = set(schema["components"]["schemas"])

    def references(value: Any) -> set[str]:
        if isinstance(value, dict):
            own = {value["$ref"].rsplit("/", 1)[1]} if "$ref" in value else set()
            return own.union(*map(references, value.values()))
        return set().union(*map(references, value)) if isinstance(value, list) else set()

    assert references(schema) <= names
    assert [p.name for p in (tmp_path / ".cog").iterdir()] == ["openapi_schema.json"]
