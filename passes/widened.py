"""Run models in fp64 without a second copy of their weights: each parameter is widened when it is read."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from latentize.passes.double import in_own_dtype, widen


class Widened:
    """Makes models that read their parameters in fp64, and keeps the few that were read last for the next reader."""

    #: Parameters that are kept: the weights of stacked experts, which may be read once for each of them.
    KEPT = 4

    def __init__(self) -> None:
        self._kept: OrderedDict[int, tuple[Tensor, Tensor]] = OrderedDict()  # as stored and in fp64, by the first's id

    def copy(self, model: nn.Module) -> nn.Module:
        """The model in eval mode, computing in fp64 with the model's own parameters and copies of its buffers.

        Modules that keep their parameters elsewhere than in attributes, in a list for example, do not run like this.
        """
        copied = in_own_dtype(model)
        for module in copied.modules():
            module.__dict__["_parameters"] = _Parameters(module._parameters, self)
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_floating_point():
                    module._buffers[name] = buffer.double()
        return widen(copied)

    def read(self, parameter: Tensor) -> Tensor:
        """A parameter in fp64."""
        key = id(parameter)
        if key not in self._kept:
            while len(self._kept) >= self.KEPT:
                self._kept.popitem(last=False)
            self._kept[key] = parameter, parameter.detach().double()
        self._kept.move_to_end(key)
        return self._kept[key][1]


class _Parameters(dict[str, nn.Parameter | None]):
    """Parameters as they are stored to whoever goes through them, in fp64 to whoever asks for one by name."""

    def __init__(self, stored: dict[str, nn.Parameter | None], widened: Widened) -> None:
        super().__init__(stored)
        self._widened = widened

    def __getitem__(self, name: str) -> Tensor | None:  # type: ignore[override]
        value = super().__getitem__(name)
        return value if value is None or not value.is_floating_point() else self._widened.read(value)
