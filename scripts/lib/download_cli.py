"""scripts/download-weights: install a model and its safety checker, pinned and verified.

With --base or --lora it makes a model of weights of yours, which DMD2_MODEL and --model then take
by its name. DMD2's weights are non-commercial (CC BY-NC), whatever they are merged into.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dmd2.store.manifest import Manifest


def main() -> None:
    """Install, verify or list."""
    options = parse_arguments()
    from dmd2.errors import DMD2Error
    from dmd2.settings import Settings
    from dmd2.store.manifest import Manifest, gigabytes

    manifest = Manifest.read()
    if options.list:
        for model in manifest.models.values():
            print(f"{model.name:18} {gigabytes(model.download_size):>8}  {model.kind}")
        return
    try:
        weights_dir = Settings.from_environment(
            {**os.environ, "DMD2_MODEL": options.model}
        ).weights_dir
        if options.verify:
            verify(options.model, weights_dir, manifest)
        else:
            install(options, weights_dir, manifest)
    except DMD2Error as error:
        sys.exit(str(error))


def install(options: argparse.Namespace, weights_dir: Path, manifest: Manifest) -> None:
    """Install an entry of the manifest, or a model of the user's own."""
    from dmd2.store.provision import provide, provide_own

    name, is_own = options.model, bool(options.base or options.lora)
    if name not in manifest.models:
        sys.exit(f"{name!r} is not one of {', '.join(manifest.models)}")
    if options.lora_scale is not None and not manifest.models[name].lora_modules:
        sys.exit(f"--lora-scale: {name} has no LoRA to merge; leave it out")
    if options.name is not None and not is_own:
        sys.exit(f"--name: {name} keeps its name; this is for --base and --lora")
    scale = 1.0 if options.lora_scale is None else options.lora_scale
    check_safety = not options.no_safety_checker
    if not is_own:
        provide(name, weights_dir, manifest, lora_scale=scale, check_safety=check_safety)
        return
    from dmd2.store.derived import OwnWeights

    own = OwnWeights(options.base, tuple(options.lora), options.name)
    folder = provide_own(
        name, own, weights_dir, manifest, lora_scale=scale, check_safety=check_safety
    )
    print(f"DMD2_MODEL={folder.name} and --model {folder.name} run it", file=sys.stderr)


def verify(name: str, weights_dir: Path, manifest: Manifest) -> None:
    """Say whether an installed model is whole."""
    from dmd2.store import manifest as store

    folder = weights_dir / name
    if name not in manifest.models and not folder.is_dir():
        sys.exit(f"{name!r} is not one of {', '.join(manifest.models)}, nor in {weights_dir}")
    problems = store.verify(manifest.models.get(name), folder)
    if problems:
        sys.exit("\n".join([*problems, f"{name} is damaged: delete it and install again"]))
    print(f"{name} in {folder} is whole")


def parse_arguments() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="scripts/download-weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", default="sdxl-4step", help="default: sdxl-4step")
    parser.add_argument("--verify", action="store_true", help="check every file's hash instead")
    parser.add_argument("--list", action="store_true", help="list the models and their sizes")
    parser.add_argument("--lora-scale", type=float, help="strength to merge DMD2's LoRA at (1.0)")
    parser.add_argument(
        "--base",
        metavar="FILE|OWNER/REPO",
        help="an SDXL checkpoint of yours that DMD2's LoRA is merged into, for sdxl-4step-lora: a "
        ".safetensors file, a folder in diffusers' layout, or one of either on the Hugging Face "
        "hub, as OWNER/REPO or OWNER/REPO/FILE.safetensors with @REVISION where you like. Its UNet "
        "and text encoders are taken; its VAE is replaced by the one that is safe in float16",
    )
    parser.add_argument(
        "--lora",
        metavar="FILE[:SCALE]",
        action="append",
        default=[],
        help="a LoRA of yours to merge in, at SCALE (1.0, from -1 to 3), here or on the hub; may "
        "be given several times",
    )
    parser.add_argument("--name", help="of the model of yours; by default the file's, without end")
    parser.add_argument(
        "--no-safety-checker", action="store_true", help="for a server with DMD2_SAFETY=off"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
