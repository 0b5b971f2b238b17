"""scripts/download-weights: install a model and its safety checker, pinned and verified."""

from __future__ import annotations

import argparse
import os
import sys


def main() -> None:
    """Install, verify or list."""
    options = parse_arguments()
    from dmd2.errors import DMD2Error
    from dmd2.settings import Settings
    from dmd2.store.manifest import Manifest, gigabytes, verify
    from dmd2.store.provision import provide

    manifest = Manifest.read()
    if options.list:
        for model in manifest.models.values():
            print(f"{model.name:18} {gigabytes(model.download_size):>8}  {model.kind}")
        return
    if options.model not in manifest.models:
        sys.exit(f"{options.model!r} is not one of {', '.join(manifest.models)}")
    if options.lora_scale is not None and not manifest.models[options.model].lora_modules:
        sys.exit(f"--lora-scale: {options.model} has no LoRA to merge; leave it out")
    try:
        weights_dir = Settings.from_environment(
            {**os.environ, "DMD2_MODEL": options.model}
        ).weights_dir
        if not options.verify:
            provide(
                options.model,
                weights_dir,
                manifest,
                lora_scale=1.0 if options.lora_scale is None else options.lora_scale,
                check_safety=not options.no_safety_checker,
            )
            return
        problems = verify(manifest.models[options.model], weights_dir / options.model)
    except DMD2Error as error:
        sys.exit(str(error))
    if problems:
        sys.exit("\n".join([*problems, f"{options.model} is damaged: delete it and install again"]))
    print(f"{options.model} in {weights_dir / options.model} is whole")


def parse_arguments() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(prog="scripts/download-weights", description=__doc__)
    parser.add_argument("model", nargs="?", default="sdxl-4step", help="default: sdxl-4step")
    parser.add_argument("--verify", action="store_true", help="check every file's hash instead")
    parser.add_argument("--list", action="store_true", help="list the models and their sizes")
    parser.add_argument("--lora-scale", type=float, help="strength to merge a LoRA at (1.0)")
    parser.add_argument(
        "--no-safety-checker", action="store_true", help="for a server with DMD2_SAFETY=off"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
