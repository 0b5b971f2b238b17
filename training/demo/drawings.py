"""The drawings of the demo's things: Fluent Emoji, flat (Microsoft, MIT), from an npm package.

The repository has none of them: `npm pack` fetches the package once, by version and sha256, and
resvg rasterises what is asked for.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import resvg_py
from numpy.typing import NDArray
from PIL import Image

_SUPERSAMPLING = 4


@dataclass(frozen=True)
class Package:
    """A release of a set of drawings on npm.

    Attributes:
        name, version: npm's.
        sha256: of its archive.
    """

    name: str
    version: str
    sha256: str

    @property
    def archive(self) -> str:
        """The file name that npm gives it."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


FLUENT_EMOJI = Package(
    "@iconify-json/fluent-emoji-flat",
    "1.2.6",
    "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
)


class DrawingsError(RuntimeError):
    """The drawings could not be fetched, or are not the ones that are pinned."""


class Drawings:
    """The SVG drawings of a set, by name.

    Args:
        bodies: what is inside each `<svg>`.
        side: of the square that they are drawn in, in their own units.
    """

    def __init__(self, bodies: Mapping[str, str], side: int) -> None:
        self._bodies, self._side = bodies, side
        self.picture = cache(self._picture)

    @classmethod
    def fetched(cls, folder: Path, package: Package = FLUENT_EMOJI) -> Drawings:
        """The package's, which is fetched into a folder unless it lies there.

        Raises:
            DrawingsError: npm is missing or fails, or the archive is another than the pinned one.
        """
        path = folder / package.archive
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _pack(package, path)
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if digest != package.sha256:
            raise DrawingsError(
                f"{path} has sha256 {digest}, and {package.sha256} is pinned: delete it"
            )
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            member = archive.extractfile("package/icons.json")
            assert member is not None
            icons = json.load(member)
        return cls({name: icon["body"] for name, icon in icons["icons"].items()}, icons["width"])

    def _picture(self, name: str, size: int) -> NDArray[np.float32]:
        """A drawing with its coverage, float32 [size, size, 4] in 0..1, colours premultiplied.

        Raises:
            KeyError: there is no drawing of that name.
        """
        side = size * _SUPERSAMPLING
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self._side} {self._side}" '
            f'width="{side}" height="{side}">{self._bodies[name]}</svg>'
        )
        png = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True)
        with Image.open(io.BytesIO(png)) as image:
            large = image.convert("RGBa").reduce(_SUPERSAMPLING)
        picture: NDArray[np.float32] = np.asarray(large, np.float32) / np.float32(255)
        return picture


@dataclass(frozen=True)
class Source:
    """Where a set of drawings lies, or is to lie; processes can be sent it.

    Attributes:
        folder: of the archive.
        package: that it is.
    """

    folder: Path
    package: Package = FLUENT_EMOJI

    @classmethod
    def of(cls, archive: Path) -> Source:
        """An archive like npm's, with drawings of the same names, whatever else it holds."""
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        return cls(archive.parent, Package(archive.name.removesuffix("-0.tgz"), "0", digest))

    def drawings(self) -> Drawings:
        """The drawings, fetched at most once; errors are those of Drawings.fetched."""
        return _fetched(self)


@cache
def _fetched(source: Source) -> Drawings:
    return Drawings.fetched(source.folder, source.package)


def _pack(package: Package, path: Path) -> None:
    """Have npm fetch a package's archive."""
    way_out = f"or put {package.archive} of {package.name} {package.version} into {path.parent}"
    if shutil.which("npm") is None:
        raise DrawingsError(
            f"the demo's drawings come from npm, which is not here: install it, {way_out}"
        )
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        done = subprocess.run(
            ["npm", "pack", "--ignore-scripts", f"{package.name}@{package.version}"],
            cwd=scratch,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise DrawingsError(
                f"npm could not fetch {package.name}@{package.version}: "
                f"{done.stderr.strip()[-400:]}. Try again, {way_out}"
            )
        (Path(scratch) / package.archive).rename(path)
