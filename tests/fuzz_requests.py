"""Random requests, good ones and those that are wrong in many ways, from an OpenAPI document."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from jsonschema import Draft7Validator

MAX_COST = 4 * 256 * 256  # pixels of all images of a request: more would take too long here
MAX_PIXELS = 4_000_000
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=20)  # half surrogates too
LORAS = (
    "lora_weights", "lora_scale", "extra_lora", "extra_lora_scale", "hf_api_token",
    "civitai_api_token",
)  # fmt: skip
JUNK: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), ANY_TEXT, st.just(10**400)
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=4,
)  # fmt: skip
SIDES = st.sampled_from([64] * 9 + [72, 128, 256, 512, 2048, 65, 100])
STEPS = st.sampled_from([2, 2, 2, 4, 4.0, 3])
BYTES = st.binary(max_size=3) | st.sampled_from(
    [b"1e400", b"NaN", b"null", b"-", b'"', b"{", b"[", b"]", b",", b":", b"\\u0000", b"\\ud800"]
)


@dataclass(frozen=True)
class Attempt:
    """One request.

    Attributes:
        body: what is sent.
        inputs: what it asks for, as far as that is known.
        by_put: whether it is sent under an id.
    """

    body: bytes
    inputs: dict[str, Any] | None = None
    by_put: bool = False


class Document:
    """The inputs of an OpenAPI document."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._schemas: dict[str, Any] = document["components"]["schemas"]
        self.properties: dict[str, Any] = self._schemas["Input"]["properties"]
        self._validator = Draft7Validator(document | {"$ref": "#/components/schemas/Input"})

    def forbidden(self, inputs: dict[str, Any]) -> set[str]:
        """The fields that must be given, or not as they are."""
        errors = self._validator.iter_errors(inputs)
        return {str(error.path[0]) if error.path else "prompt" for error in errors}

    def attempts(self) -> st.SearchStrategy[Attempt]:
        """Requests, good ones, and those that are wrong in many ways."""
        good, near, extra = self._good(), self._near(), st.dictionaries(ANY_TEXT, JUNK, max_size=2)
        known = weighted(
            (5, good),
            (3, st.builds(dict.__or__, good, near)),
            (1, near),
            (1, st.builds(dict.__or__, extra, good)),
        ).map(cheap)
        other = st.fixed_dictionaries({}, optional={"input": JUNK, "context": JUNK, "x": JUNK})
        edits = st.lists(
            st.tuples(st.floats(0, 1), st.integers(0, 3), BYTES), min_size=1, max_size=4
        )
        return weighted(
            (8, st.builds(lambda i, put: Attempt(to_body(i), i, put), known, st.booleans())),
            (2, st.builds(lambda i, e: Attempt(damaged(to_body(i), e)), good.map(cheap), edits)),
            (1, (other | JUNK).map(lambda body: Attempt(json.dumps(body).encode()))),
        )

    def _good(self) -> st.SearchStrategy[dict[str, Any]]:
        """Inputs that the document allows, of which most break no other rule either."""
        inside = {name: self._inside(name) for name in self.properties}
        paired = ("width", "height", "guidance_scale", "negative_prompt", "fast_decode", *LORAS)
        alone = {n: s for n, s in inside.items() if n not in paired and n != "prompt"}
        some = st.fixed_dictionaries({"prompt": inside["prompt"]}, optional=alone)
        sides, guidance = {"width": SIDES, "height": SIDES}, {"guidance_scale": st.floats(1.5, 10)}
        negative = {"negative_prompt": inside["negative_prompt"]}
        size = weighted((8, st.just({})), (8, st.fixed_dictionaries(sides)),
                        (1, st.fixed_dictionaries({}, optional=sides)))  # fmt: skip
        guided = weighted((6, st.just({})), (3, st.fixed_dictionaries(guidance, optional=negative)),
                          (1, st.fixed_dictionaries(negative)))  # fmt: skip
        return st.builds(lambda *parts: {**parts[0], **parts[1], **parts[2]}, some, size, guided)

    def _near(self) -> st.SearchStrategy[dict[str, Any]]:
        """One to three inputs, inside their bounds, outside, or of another kind."""
        names = st.lists(st.sampled_from(sorted(self.properties)), min_size=1, max_size=3)
        return names.flatmap(
            lambda chosen: st.fixed_dictionaries({name: self._around(name) for name in chosen})
        )

    def _inside(self, name: str) -> st.SearchStrategy[Any]:
        schema = self._schema(name)
        low, high = schema.get("minimum"), schema.get("maximum")
        if name == "num_inference_steps":
            return STEPS
        if "enum" in schema:
            return st.sampled_from(schema["enum"])
        if schema["type"] == "string":
            words = st.text(min_size=max(1, schema.get("minLength", 0)), max_size=15)
            longest = schema.get("maxLength", 500)
            return words | words.map(lambda word: (word * longest)[:longest])
        numbers = {"integer": st.integers, "number": st.floats}.get(schema["type"])
        return numbers(low, high) | st.sampled_from([low, high]) if numbers else st.booleans()

    def _around(self, name: str) -> st.SearchStrategy[Any]:
        schema = self._schema(name)
        edges = [schema[key] for key in ("minimum", "maximum") if key in schema]
        near = [edge + step for edge in edges for step in (-1, -0.5, 0, 0.5, 1, 1e308)]
        long = [] if "maxLength" not in schema else ["", "x" * (schema["maxLength"] + 1), "a\0b"]
        odd = st.sampled_from([*near, *long, True, "1", 2.0, -0.0, 5e-324, 2**53 + 1, 2**64])
        return st.one_of(odd, JUNK, self._inside(name))

    def _schema(self, name: str) -> dict[str, Any]:
        schema: dict[str, Any] = self.properties[name]
        return schema | (self._schemas[name] if "allOf" in schema else {})


def weighted(*choices: tuple[int, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    """One of the strategies, each as often as its number says: one_of would drop repetitions."""
    return st.sampled_from([each for n, each in choices for _ in range(n)]).flatmap(lambda s: s)


def to_body(inputs: dict[str, Any]) -> bytes:
    return json.dumps({"input": inputs}).encode()


def damaged(body: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    """The body with up to three bytes replaced, at each of some places."""
    for place, length, new in edits:
        at = int(place * len(body))
        body = body[:at] + new + body[at + length :]
    return body


def cheap(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs, with a small height where they would be served and take long."""
    width, height, num_outputs = (inputs.get(n, 1) for n in ("width", "height", "num_outputs"))
    numbers = (width, height, num_outputs)
    if not all(isinstance(n, int | float) and 0 < n <= 2048 for n in numbers):
        return inputs
    is_large = math.prod(numbers) > MAX_COST and width * height <= MAX_PIXELS
    return inputs | {"height": 64} if is_large else inputs
