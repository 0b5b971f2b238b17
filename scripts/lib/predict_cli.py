"""scripts/predict: one prediction through Cog's server, like `cog predict`, without Docker."""

from __future__ import annotations

import argparse
import base64
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
# Whoever waits at a terminal decides how long: SDXL on a CPU takes minutes for an image.
DEADLINES = {"DMD2_RUN_TIMEOUT_S": "604800", "DMD2_KEEP_OUTPUTS_S": "700000"}
STAGES = ("encode", "sample", "decode", "save")


def main() -> None:
    """Parse, start the server, predict, save, stop."""
    options = parse_arguments()
    inputs = read_inputs(options)
    target = output_target(options.output, str(inputs.get("output_format", "png")))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped too
    try:
        save(predict(inputs, options), target)
    except KeyboardInterrupt:
        sys.exit(130)


def predict(inputs: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The server's answer to one request; whatever fails ends the program with the reason."""
    import httpx
    from cog_server import running
    from default_model import choose_model
    from progress_bar import progress_bar
    from unknown_words import remark_on

    from dmd2.request.generation_request import MAX_OUTPUTS

    environment = dict(split_pair(pair, "-e") for pair in options.env)
    if "DMD2_MAX_BATCH" not in os.environ:
        # All that one request can share; finding out what pays would take longer than the request.
        environment.setdefault("DMD2_MAX_BATCH", str(MAX_OUTPUTS))
    if "DMD2_TUNE" not in os.environ:  # nor would one request win back what choosing ways takes
        environment.setdefault("DMD2_TUNE", "off")
    if not (os.environ.keys() | environment.keys()) & DEADLINES.keys():
        environment |= DEADLINES
    environment["DMD2_MODEL"] = choose_model(options.model, {**os.environ, **environment})
    if not inputs.get("lora_weights"):  # which may teach it more words
        remark_on(str(inputs["prompt"]), environment["DMD2_MODEL"])
    with tempfile.TemporaryDirectory() as scratch:
        environment.setdefault("DMD2_OUTPUT_DIR", scratch)
        progress = Path(scratch) / "progress"
        environment["DMD2_PROGRESS_FILE"] = str(progress)
        log_path = Path(scratch) / "server.log"
        with log_path.open("wb") as log, running(environment, log) as server:
            try:
                health = server.wait_until_set_up(options.setup_timeout)
                if health["status"] != "READY":
                    sys.exit(f"setup failed:\n{health['setup']['logs']}")
                with progress_bar(progress):
                    response = server.predict(inputs)
            except (RuntimeError, TimeoutError, httpx.TransportError) as error:
                sys.exit(f"{log_path.read_text(errors='replace')[-4000:]}\n{error}")
    if response.get("status") != "succeeded":
        sys.exit(f"the prediction failed: {response.get('error') or response.get('detail')}")
    return response


def parse_arguments() -> argparse.Namespace:
    """The flags of `cog predict` that make sense without Docker, and --model."""
    parser = argparse.ArgumentParser(prog="scripts/predict", description=__doc__)
    parser.add_argument(
        "-i", "--input", action="append", default=[], metavar="NAME=VALUE",
        help="an input, such as prompt=..., seed=7, num_outputs=4 (README lists them)",
    )  # fmt: skip
    parser.add_argument("--json", metavar="JSON|@FILE", help="inputs as one JSON object")
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="default: output.png, or .jpg, .webp"
    )
    parser.add_argument("--model", metavar="NAME|FOLDER", help="a manifest entry or a model folder")
    parser.add_argument(
        "-e", "--env", action="append", default=[], metavar="NAME=VALUE",
        help="an environment variable for the server",
    )  # fmt: skip
    parser.add_argument("--setup-timeout", type=float, default=600, metavar="SECONDS")
    return parser.parse_args()


def read_inputs(options: argparse.Namespace) -> dict[str, Any]:
    """The inputs with their types, from --json and then -i.

    A name or a value that the schema does not know ends the program: the server would drop it.
    """
    from cog_schema import build_schema

    schema = build_schema((ROOT / "predict.py").read_text(encoding="utf-8"))
    known = schema["components"]["schemas"]["Input"]["properties"]
    inputs = json_object(options.json) if options.json else {}
    for pair in options.input:
        name, value = split_pair(pair, "-i")
        inputs[name] = typed(name, value, known.get(name, {}).get("type", "string"))
    unknown = sorted(set(inputs) - set(known))
    if unknown:
        sys.exit(f"unknown input {unknown[0]!r}; the inputs are {', '.join(known)}")
    if "prompt" not in inputs:
        sys.exit('a prompt is needed: scripts/predict -i prompt="a red circle"')
    return inputs


def json_object(text: str) -> dict[str, Any]:
    """The object in --json's text, or in the file that it names with @."""
    try:
        value = json.loads(Path(text[1:]).read_text() if text.startswith("@") else text)
    except (OSError, ValueError) as error:
        sys.exit(f"--json {text}: {error}")
    if not isinstance(value, dict):
        sys.exit(f"--json {text}: a JSON object is needed")
    return value


def split_pair(pair: str, flag: str) -> tuple[str, str]:
    """NAME=VALUE in two."""
    name, equals, value = pair.partition("=")
    if not equals:
        sys.exit(f"{flag} {pair}: write NAME=VALUE")
    return name, value


def typed(name: str, value: str, json_type: str) -> Any:
    """A flag's text as the JSON type that the schema asks for."""
    if json_type == "string":
        return value
    if json_type == "boolean" and value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        return {"integer": int, "number": float}[json_type](value)
    except (KeyError, ValueError):
        sys.exit(f"{name}={value}: a value of type {json_type} is needed")


def output_target(output: str | None, output_format: str) -> Path:
    """Where to save; a suffix that belies the format ends the program."""
    target = Path(output or f"output.{output_format}")
    suffixes = {"jpg": (".jpg", ".jpeg")}.get(output_format, (f".{output_format}",))
    if target.suffix.lower() not in suffixes:
        sys.exit(f"{target} is to hold a {output_format}; name it so or add -i output_format=...")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def save(response: dict[str, Any], target: Path) -> None:
    """Write the images and print each one's path and seed, and the seconds of each stage."""
    metrics, outputs = response["metrics"], response["output"]
    print(response["logs"], end="", file=sys.stderr)
    seeds = metrics["seeds"]
    kept = [index for index in range(len(seeds)) if index not in metrics.get("withheld", [])]
    for index, output in zip(kept, outputs, strict=True):
        path = target if len(seeds) == 1 else target.with_suffix(f".{index}{target.suffix}")
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_bytes(base64.b64decode(output.partition(",")[2], validate=True))
        partial.rename(path)
        size = f"{metrics['width']}x{metrics['height']}"
        print(f"{path}  seed {seeds[index]}  {size}  {metrics['model']}")
    stages = "  ".join(f"{name} {metrics['seconds'][name]:.2f} s" for name in STAGES)
    print(f"{stages}  total {metrics['predict_time']:.2f} s")


if __name__ == "__main__":
    main()
