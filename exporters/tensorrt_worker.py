"""The process that drives tensorrt-rtx: `python -m latentize.exporters.tensorrt_worker REQUEST` (see `tensorrt`).

REQUEST is JSON; the answer is JSON on the last line of standard output.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

#: Number of tokens that an engine is tuned for.
USUAL_TOKENS = 16


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Build the engine; the answer has the profile and the number of layers, or the error."""
    import tensorrt_rtx as trt

    logger = trt.Logger(trt.Logger.ERROR)
    if request.get("plugin"):
        from latentize.exporters.tensorrt_plugin import register

        register(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request["source"]):
        problems = [parser.get_error(i) for i in range(parser.num_errors)]
        return {"error": "; ".join(f"node {p.node_name()}: {p.desc()}" for p in problems[:3])}
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    shapes = {}
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        floating = tensor.dtype not in (trt.DataType.INT32, trt.DataType.INT64, trt.DataType.BOOL)
        shapes[tensor.name] = shape_range(tuple(tensor.shape), floating, request["max_batch"], request["max_tokens"])
        profile.set_shape(tensor.name, *shapes[tensor.name])
    config.add_optimization_profile(profile)
    if request["target"] != "portable":
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, request["target"]), 0)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        return {"error": "the builder found no implementation; its messages are above"}
    Path(request["engine"]).write_bytes(engine)
    plugins = sum(network.get_layer(i).type == trt.LayerType.PLUGIN_V3 for i in range(network.num_layers))
    return {"profile": shapes, "layers": network.num_layers, "plugins": plugins}


def shape_range(shape: tuple[int, ...], floating: bool, max_batch: int, max_tokens: int) -> list[list[int]]:
    """Smallest, usual and largest shape of an input whose free axes are -1.

    The first axis is the batch and every other free one counts tokens; floats [T, d] have no batch.
    """
    batched = not (floating and len(shape) == 2)

    def fill(batch: int, tokens: int) -> list[int]:
        free = [batch if axis == 0 and batched else tokens for axis in range(len(shape))]
        return [size if size >= 0 else free[axis] for axis, size in enumerate(shape)]

    return [fill(1, 1), fill(1, min(USUAL_TOKENS, max_tokens)), fill(max_batch, max_tokens)]


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
