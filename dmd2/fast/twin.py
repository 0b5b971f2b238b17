"""A second module tree on a model's own weights, in which modules can be replaced."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any


def twin(model: Any) -> Any:
    """A copy of the modules that shares every parameter and buffer by reference.

    What is changed in place in the model's weights is seen by the twin. It must not be moved or
    cast: that would change the model's weights too.
    """
    tensors = chain(model.parameters(), model.buffers())
    # What deepcopy finds in its memo it takes for copied.
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
