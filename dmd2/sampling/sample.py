"""An image under way, and what steers it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dmd2.fast.ways import PLAIN, Part
from dmd2.models.text_encoder import TextEmbeds
from dmd2.request.lora_rules import LoraUse
from dmd2.sampling.sampler import Trajectory


@dataclass(frozen=True)
class Conditioning:
    """What steers the images of one request.

    Attributes:
        embeds: one entry, or two with classifier-free guidance: negative, then positive.
        add_time_ids: [1, 6] in the model's dtype.
        guidance_scale: acts where there are two entries.
    """

    embeds: tuple[TextEmbeds, ...]
    add_time_ids: torch.Tensor
    guidance_scale: float


@dataclass(frozen=True, eq=False)
class Sample:
    """One image under way.

    Attributes:
        fast_decode: chooses what makes its pixels.
        check: whether the safety checker, where there is one, classifies them.
        loras: added to the UNet's weights for its steps.
        ways: for each part of the work, by which ways it was done: a name for each step.
    """

    trajectory: Trajectory
    conditioning: Conditioning
    fast_decode: bool
    check: bool
    loras: tuple[LoraUse, ...] = ()
    ways: dict[Part, list[str]] = field(default_factory=lambda: {"step": [], "decode": []})

    @property
    def is_guided(self) -> bool:
        """Whether each step takes two predictions."""
        return len(self.conditioning.embeds) > 1

    def took_a_way(self, part: Part) -> bool:
        """Whether something else than the plain models had a hand in it."""
        return any(way != PLAIN for way in self.ways[part])

    def from_start(self, timesteps: tuple[int, ...] | None = None) -> Sample:
        """The same image before its first step, at its own timesteps or at others."""
        trajectory = self.trajectory.from_start(timesteps)
        return replace(self, trajectory=trajectory, ways={"step": [], "decode": []})


def unet_call(
    samples: Sequence[Sample], timesteps: torch.Tensor, dtype: torch.dtype
) -> Callable[[Any], torch.Tensor]:
    """What a UNet is asked for the next step of samples, as a function of the UNet.

    Args:
        samples: B images of one size, all guided or none.
        timesteps: int64 [1000], each at its own place, on the device.
        dtype: the UNet's.

    Returns:
        The function, which returns the predicted noise [B, 4, H/8, W/8] in that dtype; of guided
        images [2 B, ...], for each the unconditional one first.
    """
    inputs = [(s, embeds) for s in samples for embeds in s.conditioning.embeds]
    latents = torch.stack([s.trajectory.latents for s, _ in inputs]).to(dtype)
    times = torch.stack([timesteps[s.trajectory.timestep] for s, _ in inputs])
    prompt_embeds = torch.cat([embeds.prompt_embeds for _, embeds in inputs])
    added_cond_kwargs = {
        "text_embeds": torch.cat([embeds.pooled_prompt_embeds for _, embeds in inputs]),
        "time_ids": torch.cat([s.conditioning.add_time_ids for s, _ in inputs]),
    }

    def call(unet: Any) -> torch.Tensor:
        noise_pred: torch.Tensor = unet(
            latents,
            times,
            encoder_hidden_states=prompt_embeds,
            added_cond_kwargs=added_cond_kwargs,
            return_dict=False,
        )[0]
        return noise_pred

    return call
