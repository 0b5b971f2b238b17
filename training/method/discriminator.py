"""DMD2's GAN: a small critic on the bottleneck of the fake score network.

The teacher's score is not perfect, and a student that follows it alone inherits its errors. The
critic compares the student's noised images with noised images of the data (arXiv 2405.14867,
section 4.3), and so lets the student become better than its teacher.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional


class BottleneckCritic(nn.Module):
    """Features [B, C, h, w] of the UNet's middle to one logit each [B]; above 0 is "real".

    Args:
        num_channels: C.
        norm_num_groups: of the GroupNorms, a divisor of C.
    """

    def __init__(self, num_channels: int, norm_num_groups: int = 8) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(num_channels, num_channels, 3, padding=1),
            nn.GroupNorm(norm_num_groups, num_channels),
            nn.SiLU(),
            nn.Conv2d(num_channels, num_channels, 3, stride=2, padding=1),
            nn.GroupNorm(norm_num_groups, num_channels),
            nn.SiLU(),
        )
        self.to_logit = nn.Linear(num_channels, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits [B] of features [B, C, h, w]."""
        logits: torch.Tensor = self.to_logit(self.layers(features).mean(dim=(2, 3)))
        return logits[:, 0]


class _Seen:
    """What passed the middle of a UNet; features is [B, C, h, w]."""

    features: torch.Tensor


class _ReachedBottleneckError(Exception):
    """Ends a forward pass of which only the first half is wanted."""


@contextmanager
def bottleneck_of(unet: Any, *, stop_there: bool = False) -> Iterator[_Seen]:
    """Within, a forward pass leaves the output of the UNet's middle block in features.

    Args:
        unet: a UNet2DConditionModel.
        stop_there: end the pass, and the block that is guarded, at that point.
    """
    seen = _Seen()

    def look(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        seen.features = output
        if stop_there:
            raise _ReachedBottleneckError

    handle = unet.mid_block.register_forward_hook(look)
    try:
        yield seen
    except _ReachedBottleneckError:
        pass
    finally:
        handle.remove()


def critic_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """-log D(real) - log(1 - D(fake)), with D the sigmoid of the logits: a scalar."""
    return functional.softplus(-real_logits).mean() + functional.softplus(fake_logits).mean()


def student_gan_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """The non-saturating -log D(fake) (arXiv 1406.2661, section 3): a scalar."""
    return functional.softplus(-fake_logits).mean()
