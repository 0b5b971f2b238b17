"""A model's weights with LoRAs added, put in the place of its own by pointers.

The served weights are never written to: a merged tensor lies beside them, and a parameter is made
to point at it for the calls that want it. What was taken out comes back bit for bit, whatever
happened between. Half precision is rounded once, from the sum in float32.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from dmd2.errors import MergeError
from dmd2.loras.delta import merge
from dmd2.loras.names import ModuleNames
from dmd2.request.lora_rules import FIELDS, LoraKey, LoraUse, key_of, shown_of

log = logging.getLogger(__name__)


class WeightSets:
    """The merged weights of the LoRA sets used last, for the parts of one model.

    Args:
        modules: by model part; who wants no LoRA uses their parameters as they are.

    Attributes:
        names: of all that a LoRA may change.
        max_bytes: that merged weights may take beside the model's, at first as many as those take,
            of each memory that has some of them; a set in use is kept in any case.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._parameters = {part: dict(each.named_parameters()) for part, each in modules.items()}
        self.names = ModuleNames.of(self._parameters)
        self._nbytes = {
            part: {name: p.nbytes for name, p in of.items()}
            for part, of in self._parameters.items()
        }
        # Text encoders may lie in the host's memory, and so do their merged weights then.
        self._places = {
            part: {p.device for p in of.values()} for part, of in self._parameters.items()
        }
        self.max_bytes = max(
            sum(sum(self._nbytes[part].values()) for part in modules if self._places[part] == place)
            for place in self._places.values()
        )
        self._merged: OrderedDict[tuple[str, LoraKey], dict[str, torch.Tensor]] = OrderedDict()

    @contextmanager
    def using(self, part: str, loras: Sequence[LoraUse]) -> Iterator[None]:
        """Within it a part's parameters have the values that LoRAs give them.

        Raises:
            InvalidRequestError: such a value is more than the parameter's dtype can hold.
        """
        parameters, merged = self._parameters[part], self._values(part, loras)
        served = {name: parameters[name].data for name in merged}
        try:
            for name, values in merged.items():
                parameters[name].data = values
            yield
        finally:
            for name, values in served.items():
                parameters[name].data = values

    def to_merge(self, parts: Sequence[str], loras: Sequence[LoraUse]) -> float:
        """What using LoRAs in parts would merge now, by bytes: 1 is as much as the whole UNet."""
        if not loras:
            return 0.0
        key = key_of(loras)
        missing = [part for part in parts if (part, key) not in self._merged]
        nbytes = sum(self._bytes_touched(part, loras) for part in missing)
        return nbytes / sum(self._nbytes["unet"].values())

    def let_go(self) -> bool:
        """Forget all that was merged, where memory is short; whether there was any."""
        had_any = bool(self._merged)
        self._merged.clear()
        return had_any

    def _values(self, part: str, loras: Sequence[LoraUse]) -> dict[str, torch.Tensor]:
        if not loras:
            return {}
        key = (part, key_of(loras))
        if key not in self._merged:
            self._make_room(part, loras)
            self._merged[key] = self._merge(part, loras)
        self._merged.move_to_end(key)
        return self._merged[key]

    def _merge(self, part: str, loras: Sequence[LoraUse]) -> dict[str, torch.Tensor]:
        began = time.perf_counter()
        weights = {name: parameter.data for name, parameter in self._parameters[part].items()}
        try:
            merged = merge(weights, [(lora.deltas.get(part, {}), lora.scale) for lora in loras])
        except MergeError as error:
            raise error.of_field([*FIELDS][error.place], shown_of([loras[error.place]])) from None
        seconds = time.perf_counter() - began
        shown = shown_of(loras)
        log.info("merged %s into %d weights of %s in %.3f s", shown, len(merged), part, seconds)
        return merged

    def _make_room(self, part: str, loras: Sequence[LoraUse]) -> None:
        """Let go of the sets that were used longest ago, before another is made."""
        wanted, place = self._bytes_touched(part, loras), self._places[part]
        there = [key for key in self._merged if self._places[key[0]] == place]
        nbytes = {key: sum(values.nbytes for values in self._merged[key].values()) for key in there}
        while there and sum(nbytes[key] for key in there) + wanted > self.max_bytes:
            del self._merged[there.pop(0)]

    def _bytes_touched(self, part: str, loras: Sequence[LoraUse]) -> int:
        names = {name for lora in loras for name in lora.deltas.get(part, ())}
        return sum(nbytes for name, nbytes in self._nbytes[part].items() if name in names)
