"""From settings to an engine that serves: the one way, for whoever needs one."""

from __future__ import annotations

from dmd2.engine.deadlines import Deadlines
from dmd2.engine.delivery import Space
from dmd2.engine.engine import Engine
from dmd2.engine.progress import ProgressFile
from dmd2.fast.tuning import Tuning
from dmd2.sampling.pipeline import Pipeline
from dmd2.settings import Settings
from dmd2.store.manifest import Manifest
from dmd2.store.provision import provided


def open_engine(settings: Settings, space: Space | None = None) -> Engine:
    """Provide the model, load it, make its engine and warm that up; whoever opens it closes it.

    Weights are fetched only where settings.download says so; what is made of the demo's own files
    alone is made without being asked. Logs, watchdog and janitor are the process's own affair.

    Args:
        settings: of the process.
        space: what bounds the bytes that all files take; None for no bound.

    Raises:
        DownloadError: weights that were to be fetched could not be.
        MissingWeightsError: the weights of the model, or of its safety checker, are not installed.
        ModelError: the model, or the device, cannot be used as asked.
    """
    check_safety = settings.safety != "off"
    with provided(
        settings.model,
        settings.weights_dir,
        Manifest.read(),
        download=settings.download,
        lora_scale=settings.lora_scale,
        check_safety=check_safety,
    ) as folder:
        pipeline = Pipeline.load(
            folder,
            settings.device,
            settings.dtype,
            settings.memory,
            components=settings.weights_dir,
            check_safety=check_safety,
        )
    if settings.lora_merged_bytes is not None:
        pipeline.weight_sets.max_bytes = settings.lora_merged_bytes
    engine = Engine(
        pipeline,
        settings.output_dir,
        safety=settings.safety,
        deadlines=Deadlines(settings.queue_timeout_s, settings.run_timeout_s),
        space=space,
        progress=None if settings.progress_file is None else ProgressFile(settings.progress_file),
    )
    try:
        engine.warm_up(settings.max_batch, Tuning(settings.tune, settings.compile))
    except Exception:
        engine.close()
        raise
    return engine
