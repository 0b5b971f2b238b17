"""What a picture of the demo's world shows: a classifier that has seen drawings alone.

It is trained on the data set's drawings, made worse in the ways that a network's pictures are
worse (blurred, noisy, shifted in colour), and never on a network's pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from training.demo.icons import THINGS
from training.demo.language import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZES
from training.demo.pictures import World, painters
from training.demo.scenes import Scene, SceneObject, sample
from training.demo.vae import as_tensor
from training.run import Run, warm_up_and_decay

# What there can be in a picture: a thing, or a shape of a colour.
LABELS = (*THINGS, *(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS))
_WIDTHS = (32, 64, 96, 128)
_UNCLEAR = -1  # the class of what a scene does not have, which no loss reads


@dataclass(frozen=True)
class Reading:
    """What a picture shows.

    Attributes:
        labels: of LABELS, those that are there, the surest first.
        background: of BACKGROUNDS.
        size, position: of SIZES and POSITIONS; they mean something for one thing alone.
    """

    labels: tuple[str, ...]
    background: str
    size: str
    position: str


class Judge(nn.Module):
    """Pictures float32 [B, 3, 128, 128] in -1..1 to logits.

    Which labels are there is decided in each cell of 16 pixels, and the surest cell counts.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for num_in, num_out in zip((3, *_WIDTHS), _WIDTHS, strict=False):
            layers += [nn.Conv2d(num_in, num_out, 4, stride=2, padding=1), nn.ReLU()]
            layers += [nn.GroupNorm(8, num_out), nn.Conv2d(num_out, num_out, 3, padding=1)]
            layers += [nn.ReLU(), nn.GroupNorm(8, num_out)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(_WIDTHS[-1], 192, 3, padding=1), nn.ReLU())
        self.labels = nn.Conv2d(192, len(LABELS), 1)
        # Hardly any label is in any cell.
        nn.init.constant_(self.labels.get_parameter("bias"), -4.0)
        self.rest = nn.Linear(192 * 16, len(BACKGROUNDS) + len(SIZES) + len(POSITIONS))

    def forward(
        self, pictures: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits [B, n] of LABELS, each by itself, and of BACKGROUNDS, SIZES and POSITIONS."""
        features = self.layers(pictures)
        rest = self.rest(functional.adaptive_avg_pool2d(features, 4).flatten(1))
        background, size, position = torch.split(
            rest, [len(BACKGROUNDS), len(SIZES), len(POSITIONS)], dim=1
        )
        return self.labels(features).amax(dim=(2, 3)), background, size, position

    @torch.no_grad()
    def read(self, pictures: NDArray[np.uint8]) -> list[Reading]:
        """Read pictures, uint8 [N, 128, 128, 3]."""
        device = self.rest.weight.device
        readings = []
        for batch in torch.split(torch.from_numpy(pictures), 64):
            labels, *rest = (out.cpu() for out in self(as_tensor(batch.to(device))))
            for row, *best in zip(labels, *(logits.argmax(1) for logits in rest), strict=True):
                there = sorted(torch.nonzero(row > 0).flatten().tolist(), key=lambda i: -row[i])
                names = zip((BACKGROUNDS, SIZES, POSITIONS), best, strict=True)
                readings.append(
                    Reading(tuple(LABELS[i] for i in there), *(of[int(i)] for of, i in names))
                )
        return readings


def load_judge(weights: Path) -> Judge:
    """A trained judge from its file."""
    judge = Judge()
    judge.load_state_dict({name: w.float() for name, w in load_file(weights).items()})
    return judge.eval().requires_grad_(False)


def label_of(thing: SceneObject) -> str:
    """What LABELS calls a thing."""
    return thing.thing if thing.colour is None else f"{thing.colour} {thing.thing}"


def score(reading: Reading, scene: Scene) -> dict[str, bool]:
    """Whether a picture shows a scene, attribute by attribute.

    Always "background", "things" (all that were asked for are there), "alone" (and nothing
    else) and "all" (background, things and nothing else); of one thing "size", and "position"
    if the scene has one.
    """
    asked = {label_of(thing) for thing in scene.objects}
    scores = {
        "background": reading.background == scene.background,
        "things": asked <= set(reading.labels),
        "alone": set(reading.labels) <= asked,
    }
    scores["all"] = all(scores.values())
    if scene.size is not None:
        scores["size"] = reading.size == scene.size
    if scene.position is not None:
        scores["position"] = reading.position == scene.position
    return scores


def train_judge(run: Run, world: World, num_pictures: int) -> Judge:
    """Train on the data set's drawings, made worse anew each time."""
    torch.manual_seed(world.seed)
    judge, device = Judge(), run.accelerator.device
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up_and_decay(run.num_steps, 50))
    model, optimizer = run.accelerator.prepare(judge, optimizer)
    run.accelerator.register_for_checkpointing(schedule)
    with painters(world) as pool:
        pictures = torch.from_numpy(pool.pictures(range(num_pictures))).to(device)
    truths = [answers(sample(world.seed, index).scene) for index in range(num_pictures)]
    targets = [torch.stack(column).to(device) for column in zip(*truths, strict=True)]
    for step in run.steps():
        generator = run.generator(step)
        rows = torch.randint(num_pictures, (run.batch_size,), generator=generator).to(device)
        logits = model(made_worse(as_tensor(pictures[rows]), generator))
        labels, *classes = (target[rows] for target in targets)
        # Summed over the labels, of which nearly all are absent: their mean would hardly count.
        loss = len(LABELS) * functional.binary_cross_entropy_with_logits(logits[0], labels)
        for found, right in zip(logits[1:], classes, strict=True):
            loss = loss + functional.cross_entropy(found, right, ignore_index=_UNCLEAR)
        run.accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        run.log(loss=loss.detach())
    trained: Judge = run.accelerator.unwrap_model(model)
    return trained


def answers(scene: Scene) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a judge should answer: labels float32 [n], and three class numbers int64."""
    there = {label_of(thing) for thing in scene.objects}
    return (
        torch.tensor([float(label in there) for label in LABELS]),
        torch.tensor(BACKGROUNDS.index(scene.background)),
        _class(SIZES, scene.size),
        _class(POSITIONS, scene.position),
    )


def _class(classes: Sequence[str], name: str | None) -> torch.Tensor:
    return torch.tensor(_UNCLEAR if name is None else classes.index(name))


def made_worse(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures [B, 3, H, W] in -1..1, each blurred, noisy and shifted in colour by chance."""
    num, device = len(pictures), pictures.device

    def drawn(*shape: int) -> torch.Tensor:
        return torch.rand((num, *shape), generator=generator).to(device)

    blurred = functional.avg_pool2d(functional.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = drawn(1, 1, 1)
    worse = pictures + share * (blurred - pictures)
    worse = worse * (0.9 + 0.2 * drawn(3, 1, 1)) + 0.2 * (drawn(3, 1, 1) - 0.5)
    noise = torch.randn(pictures.shape, generator=generator).to(device)
    return worse + 0.1 * drawn(1, 1, 1) * noise
