"""Training the demo's VAE: SDXL's AutoencoderKL, small, from near the identity to sharp edges."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn import functional

from training.config import VaeConfig
from training.demo.pictures import World, painters
from training.demo.scenes import IMAGE_SIZE
from training.graphs import graphed
from training.run import Run, warm_up_and_decay

SCALING_FACTOR = 0.13025  # SDXL's, so that the demo takes the same way through the container


def new_vae(config: VaeConfig) -> AutoencoderKL:
    """A VAE whose every block starts near the identity; the default start stalls for long.

    Down-sampling starts as the mean over 2x2, up-sampling as a copy, every residual is damped,
    and the posterior's log variance starts at -5.
    """
    vae = AutoencoderKL(
        block_out_channels=config.block_out_channels,
        layers_per_block=1,
        norm_num_groups=config.norm_num_groups,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        sample_size=IMAGE_SIZE,
        scaling_factor=SCALING_FACTOR,
        force_upcast=False,
    )
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, ResnetBlock2D):
                module.conv2.weight.mul_(0.1)
                if module.conv_shortcut is not None:
                    nn.init.orthogonal_(module.conv_shortcut.weight)
            elif isinstance(module, Downsample2D):
                _start_as(module.conv, slice(0, 2), 0.25)
            elif isinstance(module, Upsample2D):
                _start_as(module.conv, slice(1, 2), 1.0)
        vae.encoder.conv_out.bias[4:].fill_(-5.0)
        vae.encoder.conv_out.weight[4:].mul_(0.1)
        for conv, num_channels in ((vae.quant_conv, 8), (vae.post_quant_conv, 4)):
            conv.weight.copy_(torch.eye(num_channels)[..., None, None])
            conv.bias.zero_()
    return vae


def _start_as(conv: nn.Conv2d, where: slice, value: float) -> None:
    """Make a 3x3 convolution copy each channel with value at the places where."""
    conv.weight.mul_(0.1)
    channels = torch.arange(conv.weight.shape[0])
    conv.weight[channels, channels, where, where] += value


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean absolute error in which a pixel weighs 1 + 10 times the contrast around it.

    Args:
        output: [B, 3, H, W].
        target: likewise, in -1..1.
    """
    around = functional.max_pool2d(target, 5, 1, 2) + functional.max_pool2d(-target, 5, 1, 2)
    weight = 1 + 10 * (around / 2).amax(dim=1, keepdim=True)
    return ((output - target).abs() * weight).mean()


def train_vae(config: VaeConfig, run: Run, world: World) -> AutoencoderKL:
    """Train on the data set's pictures; returns the VAE whitened."""
    torch.manual_seed(config.seed)
    vae = new_vae(config)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, warm_up_and_decay(config.num_steps, config.num_warm_up_steps)
    )
    accelerator = run.accelerator
    # The whole of the way there and back is one forward, as DDP needs it.
    model, optimizer = accelerator.prepare(_RoundTrip(vae), optimizer)
    accelerator.register_for_checkpointing(schedule)
    with painters(world) as pool:
        drawn = torch.from_numpy(pool.pictures(range(config.num_pictures + config.num_whitened)))
    whitening, pictures = torch.split(
        drawn.to(accelerator.device), [config.num_whitened, config.num_pictures]
    )
    latent_shape = (run.batch_size, 4, IMAGE_SIZE // 8, IMAGE_SIZE // 8)
    sample = (as_tensor(pictures[: run.batch_size]), torch.zeros(latent_shape).to(pictures.device))
    forward = graphed(model, accelerator, sample)
    for step in run.steps():
        generator = run.generator(step)
        rows = torch.randint(len(pictures), (run.batch_size,), generator=generator)
        images = as_tensor(pictures[rows.to(pictures.device)])
        noise = torch.randn(latent_shape, generator=generator).to(accelerator.device)
        with accelerator.autocast():
            output, mean, log_variance = forward(images, noise)
        mean, log_variance = mean.float(), log_variance.float()
        reconstruction = reconstruction_loss(output.float(), images)
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        accelerator.backward(reconstruction + config.kl_weight * kl)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        run.log(
            reconstruction=reconstruction.detach(), kl=kl.detach(),
            error=(output.detach().float() - images).abs().mean() * 127.5,
            std=mean.detach().std(),
        )  # fmt: skip
    vae = accelerator.unwrap_model(model).vae
    whiten(vae, as_tensor(whitening))
    return vae


class _RoundTrip(nn.Module):
    """Encode, draw from the posterior with the noise given, decode."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(
        self, images: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        posterior = self.vae.encode(images).latent_dist
        latents = posterior.mean + posterior.std * noise
        return self.vae.decode(latents).sample, posterior.mean, posterior.logvar


def as_tensor(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] in -1..1."""
    return (pictures.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()


@torch.no_grad()
def whiten(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Fold into the two 1x1 convolutions what gives latents of zero mean and unit covariance.

    Diffusion starts from white noise; a channel that hardly varies would be lost in it. After
    this, scaling_factor times the posterior's mean is white over the pictures given.
    """
    batches = [images[start : start + 32] for start in range(0, len(images), 32)]
    means = torch.cat([vae.encode(batch).latent_dist.mean for batch in batches])
    rows = means.permute(0, 2, 3, 1).reshape(-1, 4).double()
    mean, covariance = rows.mean(0), torch.cov(rows.T)
    values, vectors = torch.linalg.eigh(covariance)
    whitener = vectors @ torch.diag(values.rsqrt()) @ vectors.T / SCALING_FACTOR
    colourer = torch.linalg.inv(whitener)

    quant, post = vae.quant_conv, vae.post_quant_conv
    weight, bias = quant.weight[:, :, 0, 0].double(), quant.bias.double()
    # The posterior's variances are mixed as the means are; their covariances are left out.
    scale = (whitener**2).sum(1).log()
    quant.weight[:4, :, 0, 0] = (whitener @ weight[:4]).float()
    quant.bias[:4] = (whitener @ (bias[:4] - mean)).float()
    quant.bias[4:] = (bias[4:] + scale).float()
    weight = post.weight[:, :, 0, 0].double()
    post.bias += (weight @ mean).float()
    post.weight[:, :, 0, 0] = (weight @ colourer).float()
