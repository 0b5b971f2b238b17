"""A Fréchet distance between sets of pictures, in a small feature space that never changes.

The features are those of a convolutional network with fixed random weights, pooled over a
coarse grid: colours, edges and where they are. Inception's features know photographs; these
know nothing, and so have no opinion on drawings.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import linalg
from torch import nn

_SEED = 2405
NUM_FEATURES = 128


@torch.no_grad()
def features(pictures: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Pictures [N, H, W, 3] as features [N, 128]."""
    network = _network()
    rows = []
    for start in range(0, len(pictures), 64):
        batch = torch.from_numpy(pictures[start : start + 64]).permute(0, 3, 1, 2)
        rows.append(network(batch.float() / 127.5 - 1))
    return torch.cat(rows).double().numpy()


def _network() -> nn.Module:
    """Three random convolutions, pooled to 2x2 cells of 32 channels."""
    layers: list[nn.Module] = []
    generator = torch.Generator().manual_seed(_SEED)
    for num_in, num_out, size in ((3, 32, 7), (32, 64, 5), (64, 32, 3)):
        conv = nn.Conv2d(num_in, num_out, size, stride=2, padding=size // 2, bias=False)
        std = (2 / (num_in * size * size)) ** 0.5
        nn.init.normal_(conv.weight, std=std, generator=generator)
        layers += [conv, nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())


def frechet_distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (arXiv 1706.08500, equation 6).

    Args:
        a: features [N, D], N well above D.
        b: features [M, D], likewise.
    """
    mean = float(((a.mean(0) - b.mean(0)) ** 2).sum())
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # The trace of the root is that of the root of a symmetric matrix, which is stable.
    root = linalg.sqrtm(cov_a).real
    values = np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)
    return mean + float(np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(values).sum())


def mean_distance(a: NDArray[np.float64]) -> float:
    """The mean Euclidean distance between two different rows of features [N, D]."""
    squares = (a**2).sum(1)
    distances = np.sqrt((squares[:, None] + squares - 2 * a @ a.T).clip(min=0))
    return float(distances.sum() / (len(a) * (len(a) - 1)))
