"""What makes room for an image that alone does not fit into the device's memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from dmd2.errors import DeviceMemoryError
from dmd2.fast.runner import Runner
from dmd2.models import device_work
from dmd2.models.weight_sets import WeightSets
from dmd2.request.generation_request import GenerationRequest
from dmd2.sampling.sample import Sample


class _HasModels(Protocol):
    unet: Runner
    weight_sets: WeightSets


Owner = TypeVar("Owner", bound=_HasModels)
Asked = TypeVar("Asked", Sequence[Sample], Sequence[GenerationRequest], Sample)
More = ParamSpec("More")
Result = TypeVar("Result")


def making_room(
    method: Callable[Concatenate[Owner, Asked, More], Result],
) -> Callable[Concatenate[Owner, Asked, More], Result]:
    """Let a method give up what is kept, and try once more with that memory.

    Weights with LoRAs go first, which are merged again when they are asked for. Where there are
    none, what the UNet's way keeps goes for good, though only for one image: several are tried one
    by one by whoever asked for them, so that a batch which is too large costs no way. Memory that
    the second try does not find either is an error, and the way is lost all the same.

    Args:
        method: takes an image, several, or requests first; its second call has to do what its first
            did.

    Raises:
        DeviceMemoryError: what the method raises, by itself or at its second call.
    """

    @wraps(method)
    def guarded(self: Owner, asked: Asked, /, *args: More.args, **kwargs: More.kwargs) -> Result:
        try:
            return method(self, asked, *args, **kwargs)
        except DeviceMemoryError:
            room_was_made = self.weight_sets.let_go()
            is_alone = isinstance(asked, Sample) or len(asked) == 1
            if not (room_was_made or (is_alone and self.unet.keeps_memory)):
                raise
        if room_was_made:
            device_work.give_back_memory()
        else:
            self.unet.drop("left too little memory for an image")
        return method(self, asked, *args, **kwargs)

    return guarded
