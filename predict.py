"""The Cog predictor: its inputs in, paths and metrics out. Everything else is in dmd2/."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any, Optional

from cog import BasePredictor, Input, Path, Secret, concurrent

from dmd2 import __version__
from dmd2.engine.job import STAGES, GenerationResult
from dmd2.engine.opening import open_engine
from dmd2.errors import DeadlineError, InvalidRequestError, UnsafeContentError
from dmd2.loras.fetching import LoraFetcher
from dmd2.loras.library import LoraLibrary
from dmd2.request.generation_request import GenerationRequest
from dmd2.request.lora_rules import LoraInputs, LoraUse
from dmd2.server import health, logs, watchdog
from dmd2.server.janitor import ALL_NAMES, COGLET_PREDICTIONS, OUTPUT_NAMES, Janitor
from dmd2.server.output_space import OutputSpace
from dmd2.server.request_tally import RequestTally
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
            metrics_port = None
            if settings.metrics_port is not None:  # else prometheus_client is not even imported
                from dmd2.server.metrics import MetricsPort

                metrics_port = MetricsPort(settings.metrics_host, settings.metrics_port)
            max_bytes = settings.max_output_bytes or health.space_for_outputs(settings.output_dir)
            space = OutputSpace(
                settings.output_dir,
                max_bytes,
                [COGLET_PREDICTIONS],
                in_flight_s=settings.queue_timeout_s + settings.run_timeout_s,
            )
            self.engine = open_engine(settings, space)
            self.loras = LoraLibrary(LoraFetcher(settings), self.engine.lora_names)
            swept = [(settings.output_dir, OUTPUT_NAMES), (COGLET_PREDICTIONS, ALL_NAMES)]
            self.janitor = Janitor(swept, settings.keep_outputs_s)
            self.tally = RequestTally(STAGES)
            if metrics_port is not None:
                facts = {"model": self.engine.card.name, "version": __version__}
                metrics_port.serve(facts, self.tally, self.engine.tally, space)

    def healthcheck(self) -> bool:
        """Whether the next request can be served; the log says why not."""
        problem = self.engine.problem() or health.disk_problem(self.settings.output_dir)
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
        with self.tally.request(num_outputs):
            result = await self._generate(inputs)
            self._report_end(result)
        self._log_end(result)
        return [Path(path) for path in result.paths]

    async def _generate(self, inputs: dict[str, Any]) -> GenerationResult:
        try:
            lora_inputs = LoraInputs.taken_from(inputs)
            request = GenerationRequest.resolve(self.engine.card, **inputs)
            self._report_start(request, lora_inputs)
            async with self._loras(lora_inputs) as loras:
                return await self.engine.generate(replace(request, loras=loras))
        except Exception as error:
            if not isinstance(error, InvalidRequestError | UnsafeContentError):
                log.exception("a prediction failed")
            error.args = (_without_trigger(str(error)),)
            raise

    @asynccontextmanager
    async def _loras(self, inputs: LoraInputs) -> AsyncIterator[tuple[LoraUse, ...]]:
        limit_s = self.settings.queue_timeout_s
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(limit_s):
                    loras = await stack.enter_async_context(self.loras.using(inputs))
            except TimeoutError:
                raise DeadlineError(
                    f"{' and '.join(inputs.wanted)} took longer to get than DMD2_QUEUE_TIMEOUT_S, "
                    f"which is {limit_s:g}"
                ) from None
            yield loras

    def _report_start(self, request: GenerationRequest, lora_inputs: LoraInputs) -> None:
        print(f"{request.model.name}: seed {request.seed}, {request.width}x{request.height}")
        for note in (*request.notes, *lora_inputs.notes):
            print(f"note: {note}")
        self.record_metric("model", request.model.name)
        self.record_metric("seeds", request.seeds)
        self.record_metric("width", request.width)
        self.record_metric("height", request.height)
        self.record_metric("steps", request.num_inference_steps)

    def _report_end(self, result: GenerationResult) -> None:
        num_images = result.request.num_outputs
        self.tally.made(result.seconds, num_images, len(result.flagged), len(result.withheld))
        for note in result.notes:
            print(f"note: {note}")
        self.record_metric("seconds", {k: round(v, 4) for k, v in result.seconds.items()})
        self.record_metric("batch_sizes", result.batch_sizes)
        self.record_metric("ways", result.ways)
        if loras := result.request.loras:
            self.record_metric(
                "loras", [{"name": x.name, "sha256": x.sha256, "scale": x.scale} for x in loras]
            )
        self.record_metric("images", len(result.paths))
        if result.unread:
            self.record_metric("unread", result.unread)
        if any(score is not None for score in result.nsfw_scores) or result.flagged:
            self.record_metric("nsfw_scores", result.nsfw_scores)
            self.record_metric("flagged", result.flagged)
            self.record_metric("withheld", result.withheld)

    def _log_end(self, result: GenerationResult) -> None:
        request, seconds = result.request, sum(result.seconds.values())
        prompt = f": {request.prompt!r}" if self.settings.log_prompts else ""
        log.info(
            "%d images of %dx%d from seed %d in %.3f s%s",
            len(result.paths),
            request.width,
            request.height,
            request.seed,
            seconds,
            prompt,
        )


def _revealed(value: object) -> object:
    """An input as it is: a secret's own text."""
    return value.get_secret_value() if isinstance(value, Secret) else value


def _without_trigger(message: str) -> str:
    """The message in a spelling that coglet does not take for the caller's cancellation."""
    return re.sub("cancelled", "canceled", message, flags=re.IGNORECASE)
