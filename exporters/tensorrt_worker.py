"""The process that drives TensorRT: `python -m latentize.exporters.tensorrt_worker PARENT REQUEST` (see `tensorrt`).

It ends with the process PARENT, however that one ends. REQUEST is JSON; what comes back on standard output is JSON too:
a line for each step, and the answer as the last one.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from latentize.exporters import tensorrt_library
from latentize.exporters.tensorrt_profiles import Profile, fixed_problem, shapes
from latentize.exporters.tensorrt_timing import TimingCache

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Build the engine; the answer has its profiles and layers, or the error."""
    trt = tensorrt_library.load(request["library"])
    logger = trt.Logger(trt.Logger.ERROR)
    _register(trt, request)
    builder = trt.Builder(logger)
    network = builder.create_network(_flags(trt, request))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request["source"]):
        problems = [parser.get_error(i) for i in range(parser.num_errors)]
        return {"error": "; ".join(f"node {p.node_name()}: {p.desc()}" for p in problems[:3])}
    config = builder.create_builder_config()
    config.progress_monitor = _monitor(trt)
    profiles = []
    for batch, tokens in request["profiles"]:
        made, problem = _profile(trt, builder, network, Profile(tuple(batch), tuple(tokens)))
        if problem and request["strict"]:
            return {"error": problem}
        config.add_optimization_profile(made[0])
        profiles.append(made[1])
    if request["target"] in trt.ComputeCapability.__members__ if hasattr(trt, "ComputeCapability") else False:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, request["target"]), 0)
    elif request["target"] == "native" and hasattr(trt, "ComputeCapability"):
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.CURRENT, 0)
    cache = _timing_cache(trt, config, request)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        return {"error": "the builder found no implementation", "why": True}
    Path(request["engine"]).write_bytes(engine)
    if cache is not None:
        cache.keep()
    kinds = [network.get_layer(i).type for i in range(network.num_layers)]
    plugins = [kind.name for kind in kinds if "PLUGIN" in kind.name]
    return {
        "profiles": profiles, "layers": dict(Counter(kind.name for kind in kinds).most_common()),
        "plugins": len(plugins), "plan": _plan(trt, logger, engine), "timed_before": cache is not None and cache.served,
        "notes": cache.notes if cache is not None else [],
        "library": f"{tensorrt_library.LIBRARIES[request['library']]} {trt.__version__}",
    }  # fmt: skip


def end_with(parent: int) -> None:
    """Have the kernel kill this process when `parent`, which started it, is no more."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it is no more already
        sys.exit(1)


def _register(trt: Any, request: dict[str, Any]) -> None:
    if request["plugin"]:
        from latentize.exporters.tensorrt_plugin import register

        register(trt)
    if request["quick"]:
        import torch

        from latentize import store
        from latentize.exporters import tensorrt_quick
        from latentize.kernels_triton_steps import Problem

        problems = [store.decode(Problem, values, lambda _: torch.empty(0)) for values in request["quick"]]
        major, minor = torch.cuda.get_device_capability()
        trtp = tensorrt_library.load("tensorrt.plugin")
        tensorrt_quick.register(trtp, trt, problems, request["tokens"], 10 * major + minor)


def _flags(trt: Any, request: dict[str, Any]) -> int:
    """The full library is told to keep the graph's dtypes, which tensorrt-rtx does anyway, and to embed kernels."""
    known = trt.NetworkDefinitionCreationFlag
    names = ["STRONGLY_TYPED"] if request["library"] == "tensorrt" else []
    names += ["PREFER_AOT_PYTHON_PLUGINS"] if request["quick"] else []
    return sum(1 << int(getattr(known, name)) for name in names if hasattr(known, name))


def _profile(trt: Any, builder: Any, network: Any, profile: Profile) -> tuple[tuple[Any, dict[str, Any]], str]:
    """The library's profile with the shapes in it, and how it contradicts the graph ("" where it does not)."""
    made, problem = builder.create_optimization_profile(), ""
    of: dict[str, Any] = {}
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        floating = tensor.dtype not in (trt.DataType.INT32, trt.DataType.INT64, trt.DataType.BOOL)
        shape = tuple(tensor.shape)
        problem = problem or fixed_problem(tensor.name, shape, floating, profile)
        of[tensor.name] = shapes(shape, floating, profile)
        made.set_shape(tensor.name, *of[tensor.name])
    return (made, of), problem


def _monitor(trt: Any) -> Any:
    """Prints the steps of the outermost phases."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:  # noqa: ARG002
            self.steps[name] = steps

        def step_complete(self, name: str, step: int) -> bool:
            print(json.dumps({"step": step + 1, "of": self.steps.get(name, 0), "phase": name}), flush=True)
            return True

        def phase_finish(self, name: str) -> None:
            self.steps.pop(name, None)

    return Monitor()


def _timing_cache(trt: Any, config: Any, request: dict[str, Any]) -> TimingCache | None:
    """That of the full library, which builds on the GPU that it measures; tensorrt-rtx has none."""
    if request["library"] != "tensorrt":
        return None
    import torch

    major, minor = torch.cuda.get_device_capability()
    return TimingCache(trt, config, Path(request["cache"]), f"{torch.cuda.get_device_name()} {major}.{minor}")


def _plan(trt: Any, logger: Any, engine: Any) -> list[str] | None:
    """The layers that the engine runs; None where no GPU can load it."""
    import torch

    if not torch.cuda.is_available():
        return None
    loaded = trt.Runtime(logger).deserialize_cuda_engine(engine)
    if loaded is None:
        return None
    described = json.loads(loaded.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))
    return [layer if isinstance(layer, str) else str(layer.get("Name")) for layer in described.get("Layers", [])]


if __name__ == "__main__":
    end_with(int(sys.argv[1]))
    warnings.simplefilter("ignore", DeprecationWarning)
    print(json.dumps(main(json.loads(sys.argv[2]))))
