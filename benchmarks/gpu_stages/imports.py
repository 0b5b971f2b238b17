"""What nearly every stage imports: done once, before the stages' processes fork from it."""

import diffusers  # noqa: F401
import peers  # noqa: F401
import random_model  # noqa: F401
import torch  # noqa: F401

import dmd2.engine.opening  # noqa: F401
