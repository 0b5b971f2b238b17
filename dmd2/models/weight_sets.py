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

from dmd2.errors import LoraError
from dmd2.loras.delta import merge
from dmd2.loras.names import ModuleNames
from dmd2.request.lora_rules import LoraKey, LoraUse, key_of

log = logging.getLogger(__name__)


class WeightSets:
    """The merged weights of the LoRA sets used last, for the parts of one model.

    Args:
        modules: by model part; who wants no LoRA uses their parameters as they are.

    Attributes:
        names: of all that a LoRA may change.
        max_bytes: that merged weights may take beside the model's, at first as many as those take;
            a set in use is kept in any case.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._parameters = {part: dict(each.named_parameters()) for part, each in modules.items()}
        self.names = ModuleNames.of(self._parameters)
        self.max_bytes = sum(p.nbytes for of in self._parameters.values() for p in of.values())
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

    def has(self, part: str, key: LoraKey) -> bool:
        """Whether using a set of LoRAs would merge nothing."""
        return not key or (part, key) in self._merged

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
        names = " and ".join(f"{lora.name} at {lora.scale:g}" for lora in loras)
        try:
            merged = merge(weights, [(lora.deltas.get(part, {}), lora.scale) for lora in loras])
        except LoraError as error:
            raise error.of_field("lora_weights", names) from None
        seconds = time.perf_counter() - began
        log.info("merged %s into %d weights of %s in %.3f s", names, len(merged), part, seconds)
        return merged

    def _make_room(self, part: str, loras: Sequence[LoraUse]) -> None:
        """Let go of the sets that were used longest ago, before another is made."""
        parameters = self._parameters[part]
        names = {name for lora in loras for name in lora.deltas.get(part, ())}
        wanted = sum(parameters[name].nbytes for name in names)
        while self._merged and self._bytes_of_merged() + wanted > self.max_bytes:
            self._merged.popitem(last=False)

    def _bytes_of_merged(self) -> int:
        return sum(values.nbytes for each in self._merged.values() for values in each.values())
