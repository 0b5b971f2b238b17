"""What a training run is made of: typed, frozen, and all in one place per model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

FOUR_STEPS = (999, 749, 499, 249)
ONE_STEP = (399,)


@dataclass(frozen=True)
class VaeConfig:
    """A VAE's shape and training.

    Attributes:
        block_out_channels: from full resolution down.
        norm_num_groups: of every GroupNorm.
        batch_size: pictures in a step, over all processes.
        num_steps: in all.
        num_pictures: that it is trained on, again and again.
        learning_rate: at its height.
        num_warm_up_steps: until then.
        num_whitened: pictures over which its latents are made white at the end.
        kl_weight: of the mean KL divergence of a latent value from a standard normal one.
        seed: of the start.
    """

    block_out_channels: tuple[int, int, int, int]
    norm_num_groups: int
    batch_size: int
    num_steps: int
    num_pictures: int
    learning_rate: float
    num_warm_up_steps: int
    num_whitened: int
    kl_weight: float
    seed: int


@dataclass(frozen=True)
class JudgeConfig:
    """The training of what reads the demo's pictures.

    Attributes:
        batch_size: pictures in a step, over all processes.
        num_steps: in all.
        num_pictures: that it is trained on, again and again.
    """

    batch_size: int
    num_steps: int
    num_pictures: int


@dataclass(frozen=True)
class TeacherConfig:
    """Teacher pre-training.

    Attributes:
        batch_size: scenes in a step, over all processes.
        num_steps: in all.
        num_scenes: of the data set; after them it begins again with other captions.
        learning_rate: at its height.
        num_warm_up_steps: until then.
        caption_dropout: the share of captions dropped, for classifier-free guidance.
        ema_decay: of the moving average that becomes the model.
    """

    batch_size: int
    num_steps: int
    num_scenes: int
    learning_rate: float
    num_warm_up_steps: int
    caption_dropout: float
    ema_decay: float


@dataclass(frozen=True)
class WarmStartConfig:
    """The regression that a 1-step student's distillation begins with.

    Attributes:
        num_pairs: of noise and the teacher's image, a multiple of the distillation's batch size.
        num_ode_steps: of the teacher for each, with the distillation's guidance.
        num_steps: of the student.
        learning_rate: at its height.
    """

    num_pairs: int
    num_ode_steps: int
    num_steps: int
    learning_rate: float


@dataclass(frozen=True)
class DistillConfig:
    """A distillation with DMD2.

    Attributes:
        timesteps: the student's, falling; a single one for a 1-step student.
        lora_rank: of a LoRA student; None moves all weights.
        lora_alpha: the LoRA is scaled by alpha / rank.
        batch_size: images in a step, over all processes.
        micro_batch_size: images that a pass takes at once; 0 takes all of a process.
        num_steps: of the student.
        student_learning_rate, fake_learning_rate: of the student, and of the fake score
            network with its critic, at the start; they fall along a cosine.
        guidance_scale: the teacher's, which the student takes over.
        num_fake_updates: of the fake score network, for one of the student.
        gan_weight: of the GAN in the student's loss; 0 trains without a GAN.
        critic_weight: of the critic in the fake score network's loss.
        score_range: the shares of 1000 timesteps between which the scores are compared.
        backward_simulation: whether later steps start from the student's own images; else
            from noised data.
        max_grad_norm: to which gradients are clipped.
        ema_decay: of the moving average of the student that becomes the model; None for the
            last weights themselves. FSDP, under which each process has a part, knows no other.
        warm_start: of a 1-step student; None begins with the teacher's weights.
        seed: of everything random.
    """

    timesteps: tuple[int, ...]
    batch_size: int
    num_steps: int
    student_learning_rate: float
    fake_learning_rate: float
    guidance_scale: float
    lora_rank: int | None = None
    lora_alpha: float = 8.0
    micro_batch_size: int = 0
    num_fake_updates: int = 5
    gan_weight: float = 5e-3
    critic_weight: float = 1e-2
    score_range: tuple[float, float] = (0.02, 0.98)
    backward_simulation: bool = True
    max_grad_norm: float = 10.0
    ema_decay: float | None = 0.99
    warm_start: WarmStartConfig | None = None
    seed: int = 1


@dataclass(frozen=True)
class SubjectConfig:
    """The training of a LoRA on drawings of one thing.

    Attributes:
        num_drawings: of it, all of them in every step.
        rank: of every module; alpha is the same.
        num_steps: in all.
        learning_rate: at its height.
        seed: of the drawings, the start and the noise.
    """

    num_drawings: int
    rank: int
    num_steps: int
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class DemoConfig:
    """Everything about the making of a demo model.

    Attributes:
        seed: of the data set, the starts and the noise.
        unet_channels, unet_layers_per_block, unet_transformer_layers, unet_heads: the UNet's.
        text_widths, text_layers: of the two text encoders.
        vae, judge, teacher: the first phases.
        students: by the name of the folder that each is made in.
        subject: of a LoRA for what the demo does not know.
    """

    seed: int
    unet_channels: tuple[int, int, int]
    unet_layers_per_block: int
    unet_transformer_layers: tuple[int, int, int]
    unet_heads: tuple[int, int, int]
    text_widths: tuple[int, int]
    text_layers: tuple[int, int]
    vae: VaeConfig
    judge: JudgeConfig
    teacher: TeacherConfig
    students: Mapping[str, DistillConfig]
    subject: SubjectConfig


_FOUR_STEP_STUDENT = DistillConfig(
    timesteps=FOUR_STEPS,
    batch_size=32,
    num_steps=200,
    student_learning_rate=1e-4,
    fake_learning_rate=5e-4,
    guidance_scale=2.0,
    num_fake_updates=3,
)
_ONE_STEP_STUDENT = replace(
    _FOUR_STEP_STUDENT,
    timesteps=ONE_STEP,
    num_steps=250,
    student_learning_rate=2e-4,
    warm_start=WarmStartConfig(num_pairs=4096, num_ode_steps=8, num_steps=700, learning_rate=5e-4),
)

DEMO = DemoConfig(
    seed=1,
    unet_channels=(64, 96, 136),
    unet_layers_per_block=1,
    unet_transformer_layers=(1, 1, 2),
    unet_heads=(1, 2, 4),
    text_widths=(16, 48),
    text_layers=(2, 3),
    vae=VaeConfig(
        block_out_channels=(16, 32, 64, 96),
        norm_num_groups=8,
        batch_size=64,
        num_steps=2500,
        num_pictures=8192,
        learning_rate=2e-3,
        num_warm_up_steps=100,
        num_whitened=1024,
        kl_weight=2e-4,
        seed=1,
    ),
    judge=JudgeConfig(batch_size=64, num_steps=4000, num_pictures=24_576),
    teacher=TeacherConfig(
        batch_size=32,
        num_steps=28_000,
        num_scenes=20480,
        learning_rate=1e-3,
        num_warm_up_steps=300,
        caption_dropout=0.12,
        ema_decay=0.999,
    ),
    students={
        "4step": _FOUR_STEP_STUDENT,
        "1step": _ONE_STEP_STUDENT,
        "lora": replace(
            _FOUR_STEP_STUDENT, lora_rank=16, student_learning_rate=1e-3, num_steps=200
        ),
    },
    subject=SubjectConfig(num_drawings=20, rank=8, num_steps=300, learning_rate=1e-3, seed=1),
)

_QUICK_STUDENTS = {
    name: replace(DEMO.students[name], batch_size=4, num_steps=2) for name in ("4step", "lora")
} | {
    "1step": replace(
        DEMO.students["1step"],
        batch_size=4,
        num_steps=2,
        warm_start=WarmStartConfig(num_pairs=16, num_ode_steps=2, num_steps=2, learning_rate=1e-4),
    )
}

# As DMD2 was published for SDXL (arXiv 2405.14867; experiments/sdxl of github.com/tianweiy/DMD2),
# in updates of the student: 19,000 (4 steps) and 24,000 (1 step) of the fake score, each fifth.
SDXL_FULL = DistillConfig(
    timesteps=FOUR_STEPS,
    batch_size=128,
    micro_batch_size=2,
    num_steps=3_800,
    student_learning_rate=5e-7,
    fake_learning_rate=5e-7,
    guidance_scale=8.0,
    ema_decay=None,
)
SDXL_ONE_STEP_STEPS = 4_800
# For how long is not published.
SDXL_LORA = replace(
    SDXL_FULL,
    lora_rank=64,
    lora_alpha=8.0,
    student_learning_rate=5e-5,
    fake_learning_rate=5e-5,
)
# Published with batches of 256 and 10,000 pairs, which are whole batches of 128 here.
SDXL_WARM_START = WarmStartConfig(
    num_pairs=10_240, num_ode_steps=50, num_steps=2_000, learning_rate=1e-5
)
# The whole way in about a minute on two cores, with smaller networks; the pictures are beyond
# recognition.
QUICK = replace(
    DEMO,
    unet_channels=(16, 16, 32),
    vae=replace(
        DEMO.vae,
        block_out_channels=(8, 16, 16, 16),
        batch_size=4,
        num_steps=2,
        num_warm_up_steps=1,
        num_pictures=32,
        num_whitened=32,
    ),
    judge=replace(DEMO.judge, batch_size=8, num_steps=2, num_pictures=64),
    teacher=replace(DEMO.teacher, batch_size=16, num_steps=4, num_scenes=64, num_warm_up_steps=2),
    students=_QUICK_STUDENTS,
    subject=replace(DEMO.subject, num_drawings=4, num_steps=2),
)
