"""The one seam between the two flavours of the library: `tensorrt` where it is installed, else `tensorrt-rtx`."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from latentize.errors import LatentizeError, MissingExtraError

#: Module name -> package name, the preferred one first.
LIBRARIES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
#: Compute capabilities before 12.0 on which tensorrt-rtx runs engines; from 12.0 on it runs on all.
_RTX = ((8, 0), (8, 6), (8, 9))


def find(feature: str) -> str:
    """The module of the library that is installed here.

    Raises:
        MissingExtraError: neither is.
    """
    for module in LIBRARIES:
        if importlib.util.find_spec(module) is not None:
            return module
    raise MissingExtraError("tensorrt-rtx", "tensorrt", f"{feature} (or the full 'tensorrt', which needs a GPU)")


def load(module: str) -> Any:
    """The library.

    Raises:
        LatentizeError: it is installed and cannot be loaded.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise LatentizeError(
            f"{LIBRARIES.get(module, module)} is installed and cannot be loaded ({error}); repair it, or remove it to "
            "use the other flavour"
        ) from error


def require_capability(module: str, capability: tuple[int, int], device: str) -> None:
    """Check that a library runs engines on a device of this compute capability.

    Raises:
        LatentizeError: it does not.
    """
    if module == "tensorrt_rtx" and capability < (12, 0) and capability not in _RTX:
        known = ", ".join("{}.{}".format(*each) for each in _RTX)
        raise LatentizeError(
            f"{device} has compute capability {capability[0]}.{capability[1]}, on which tensorrt-rtx runs no engine: "
            f"it knows {known} and 12.0 or newer; use the full tensorrt"
        )
