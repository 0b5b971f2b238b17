"""The Cog predictor: its inputs in, paths and metrics out. Everything else is in dmd2/."""

import logging
from typing import Optional

from cog import BasePredictor, Input, Path, Secret, concurrent

from dmd2.engine import report
from dmd2.engine.job import STAGES
from dmd2.engine.service import Service
from dmd2.request.generation_request import GenerationRequest
from dmd2.request.lora_rules import LoraInputs
from dmd2.server import logs, watchdog
from dmd2.server.janitor import COGLET_PREDICTIONS
from dmd2.server.upkeep import Upkeep
from dmd2.settings import Settings, unknown_variables

log = logging.getLogger("dmd2.predict")


class Predictor(BasePredictor):
    """What Cog loads: setup once, predict for each request."""

    def setup(self) -> None:
        """Load the model that DMD2_MODEL names; fetch it first only with DMD2_DOWNLOAD=1.

        What is made of the demo's own files alone is made without being asked.
        """
        self.settings = settings = Settings.from_environment()
        logs.configure(settings.log_format)
        for name in unknown_variables():
            log.warning("%s is set, and nothing reads it", name)
        with watchdog.watching():
            self.upkeep = Upkeep(settings, STAGES, [COGLET_PREDICTIONS])
            self.service = Service(settings, self.upkeep.space)
            self.upkeep.begin(self.service.card.name, self.service.engine.tally)

    def healthcheck(self) -> bool:
        """Whether the next request can be served; the log says why not."""
        problem = self.service.engine.problem() or self.upkeep.problem()
        if problem is not None:
            log.error("unhealthy: %s", problem)
        return problem is None

    # Cog reads this signature without running it: every bound must be a literal, and each rule
    # stands again in dmd2/request/, which a test compares.
    @concurrent(max=32)
    async def predict(
        self,
        prompt: str = Input(
            description="What the image shows; about 75 words are read, the metrics name any that are cut",
            min_length=1,
            max_length=4000,
        ),
        negative_prompt: str = Input(
            description="What the image should not show; allowed only with guidance_scale above 1",
            default="",
            max_length=4000,
        ),
        aspect_ratio: str = Input(
            description="Shape of the image at the model's own number of pixels; width and height override it",
            choices=[
                "1:1",
                "16:9",
                "9:16",
                "3:2",
                "2:3",
                "4:3",
                "3:4",
                "4:5",
                "5:4",
                "21:9",
                "9:21",
            ],
            default="1:1",
        ),
        width: Optional[int] = Input(
            description="Width in pixels, a multiple of 8; give height too, at most 4 million pixels together",
            ge=64,
            le=2048,
            default=None,
        ),
        height: Optional[int] = Input(
            description="Height in pixels, a multiple of 8; give width too, at most 4 million pixels together",
            ge=64,
            le=2048,
            default=None,
        ),
        num_outputs: int = Input(description="Number of images", ge=1, le=4, default=1),
        num_inference_steps: Optional[int] = Input(
            description="Sampling steps; only counts that the model was distilled for, or lists as community practice; by default its own",
            ge=1,
            default=None,
        ),
        guidance_scale: float = Input(
            description="Classifier-free guidance above 1, at twice the cost; the model needs none",
            ge=0,
            le=10,
            default=0,
        ),
        seed: Optional[int] = Input(
            description="Image i is made from seed + i; left out, it is drawn at random and reported",
            ge=0,
            le=4294967295,
            default=None,
        ),
        output_format: str = Input(
            description="File format", choices=["png", "jpg", "webp"], default="png"
        ),
        output_quality: int = Input(
            description="Quality of jpg and webp files, 100 is best", ge=0, le=100, default=90
        ),
        embed_metadata: bool = Input(
            description="Store the prompt, seed and other parameters inside each file; that AI made it is stored in any case",
            default=True,
        ),
        fast_decode: bool = Input(
            description="Decode with the tiny TAESDXL: faster, with less fine detail; refused where it is not installed",
            default=False,
        ),
        disable_safety_checker: bool = Input(
            description="Return images without having them classified", default=False
        ),
        lora_weights: str = Input(
            description="A LoRA for SDXL: owner/repo, civitai:model@version, an https URL or a file's name, as far as the server allows",
            default="",
            max_length=2000,
        ),
        lora_scale: Optional[float] = Input(
            description="Strength of lora_weights, 1 if left out", ge=-1, le=3, default=None
        ),
        extra_lora: str = Input(
            description="A second LoRA beside lora_weights", default="", max_length=2000
        ),
        extra_lora_scale: Optional[float] = Input(
            description="Strength of extra_lora, 1 if left out", ge=-1, le=3, default=None
        ),
        hf_api_token: Optional[Secret] = Input(
            description="Hugging Face token, for LoRAs that need one", default=None
        ),
        civitai_api_token: Optional[Secret] = Input(
            description="Civitai token, for LoRAs that need one", default=None
        ),
    ) -> list[Path]:
        """Make the images of one request; many may be under way at once."""
        inputs = {name: _revealed(value) for name, value in locals().items() if name != "self"}
        tally = self.upkeep.tally
        with tally.request(num_outputs), report.reporting_failures(log):
            loras = LoraInputs.taken_from(inputs)
            request = GenerationRequest.resolve(self.service.card, **inputs)
            self._tell(report.of_start(request, loras))
            result = await self.service.generate(request, loras)
            num_withheld = len(result.withheld)
            tally.made(result.seconds, request.num_outputs, len(result.flagged), num_withheld)
            self._tell(report.of_end(result))
        log.info("%s", report.summary_of(result, self.settings.log_prompts))
        return [Path(path) for path in result.paths]

    def _tell(self, told: report.Report) -> None:
        for line in told.lines:
            print(line)
        for name, value in told.metrics.items():
            self.record_metric(name, value)


def _revealed(value: object) -> object:
    """An input as it is: a secret's own text."""
    return value.get_secret_value() if isinstance(value, Secret) else value
