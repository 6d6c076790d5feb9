"""What `gpu_check.py` checks of whole models and exported graphs on the device."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from gpu_correct import TOLERANCE, Skipped, Where, block, error
from gpu_speed import FAMILIES, TINY, exact, random_block


def check_model(where: Where) -> str:
    """The trained sample converted, moved to the device, generating the text that it generates on CPU."""
    if where.quick:
        raise Skipped("the whole sample is not run in a dry run")
    import latentize

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "samples"))
    import stdlib_lm

    original, inputs = stdlib_lm.build_model(), stdlib_lm.example_inputs()
    batches = [batch for batch, _ in zip(stdlib_lm.calibration_data(), range(16), strict=False)]
    recipe = latentize.Recipe(compression=2, variant="fixed", heal_steps=0)
    model = latentize.convert(original, kwargs=inputs, recipe=recipe, calibration=batches).model.eval()
    prompt = inputs["input_ids"][:1, :32]

    def generate(device: str) -> list[int]:
        ids = prompt.to(device)
        out = model.to(device).generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)
        return out[0].tolist()

    with torch.no_grad():
        exact = model(**inputs).logits.double()
        expected = generate("cpu")
        tensors = (name for name, value in inputs.items() if isinstance(value, torch.Tensor))
        on_device = inputs | {name: inputs[name].to(where.device) for name in tensors}
        model.to(where.device)
        found = error(model(**on_device).logits.cpu(), exact)
        same = generate(where.device) == expected
    assert found < 1e-4, f"logits differ by {found:.1e}"
    return f"logits on CPU and {where.device} differ by {found:.1e}; 64 bytes: {'the same' if same else 'not the same'}"


def check_onnxruntime(where: Where) -> str:  # noqa: ARG001 - as every check
    """An exported block on onnxruntime's CUDA provider."""
    try:
        import onnxruntime

        from latentize.exporters.onnx import export_onnx
    except ImportError as missing:
        raise Skipped(f"{missing.name} is not installed") from missing
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise Skipped("this onnxruntime has no CUDA provider: install onnxruntime-gpu")
    module = block(Where("cpu", (torch.float32,), True), torch.float32)
    x = torch.randn(11, 48)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "block.onnx"
        export_onnx(module, (x,), {}, path)
        session = onnxruntime.InferenceSession(path, providers=["CUDAExecutionProvider"])
        provider = session.get_providers()[0]
        (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert provider == "CUDAExecutionProvider", f"the session fell back to {provider}"
    found = error(torch.from_numpy(output), module(x).double())
    assert found < 2e-3, f"onnxruntime on CUDA differs by {found:.1e}"  # it multiplies fp32 in tf32
    return f"differs from PyTorch by {found:.1e}"


def check_tensorrt(where: Where) -> str:
    """An engine built for this device and run on it, where the library supports the device."""
    if where.device == "cpu":
        raise Skipped("running an engine needs a CUDA device")
    from latentize.errors import LatentizeError
    from latentize.exporters import tensorrt_library
    from latentize.exporters.tensorrt import NATIVE, build
    from latentize.exporters.tensorrt_profiles import Profile
    from latentize.exporters.tensorrt_run import EngineSession
    from latentize.inputs import Inputs

    try:
        library = tensorrt_library.find("this check")
        tensorrt_library.require_capability(library, torch.cuda.get_device_capability(), torch.cuda.get_device_name())

        from latentize.exporters.onnx import export_onnx
    except LatentizeError as reason:
        raise Skipped(str(reason)) from reason
    except ImportError as missing:
        raise Skipped(f"{missing.name} is not installed") from missing
    module = block(Where("cpu", (torch.float32,), True), torch.float32)
    x = torch.randn(11, 48)
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(module, (x,), {}, Path(folder) / "model.onnx")
        (engine,) = build(Path(folder), targets=(NATIVE,), profiles=(Profile((1, 1, 1), (1, 16, 32)),))
        (output,) = EngineSession(Path(folder) / engine.file)(Inputs((x,)))
    found = error(output, module(x).double())
    assert found < 2e-3, f"the engine differs by {found:.1e}"
    return f"engine for this device differs from PyTorch by {found:.1e}"


def check_embedded(where: Where) -> str:
    """An engine of the full library that carries its kernels, run where no plugin is registered."""
    if where.device == "cpu":
        raise Skipped("building with the full library needs a CUDA device")
    from latentize.errors import LatentizeError
    from latentize.exporters import tensorrt_library
    from latentize.exporters.tensorrt import build
    from latentize.exporters.tensorrt_profiles import Profile
    from latentize.exporters.tensorrt_run import EngineSession
    from latentize.inputs import Inputs

    try:
        if tensorrt_library.find("this check") != "tensorrt":
            raise Skipped("the full tensorrt is not installed")
    except LatentizeError as missing:
        raise Skipped(str(missing)) from missing
    from latentize.exporters.onnx import export_onnx

    module = block(Where("cpu", (torch.float32,), True), torch.float32)
    worst = 0.0
    for usual in (1, 32):  # the decode and the prefill form
        with tempfile.TemporaryDirectory() as folder:
            export_onnx(module, (torch.randn(11, 48),), {}, Path(folder) / "model.onnx")
            profiles = (Profile((1, 1, 1), (1, usual, 32)),)
            (engine,) = build(Path(folder), profiles=profiles, experts="embedded")
            session = EngineSession(Path(folder) / engine.file)
            for tokens in (1, 11, 32):
                x = torch.randn(tokens, 48)
                (output,) = session(Inputs((x,)))
                worst = max(worst, error(output, module(x).double()))
    assert worst < 2e-3, f"the engine differs by {worst:.1e}"
    return f"both forms differ from PyTorch by {worst:.1e} at most"


def check_plugin(where: Where) -> str:
    """The TensorRT plugin's layer on raw device buffers, at the sizes that engines are made for."""
    from latentize.exporters.tensorrt_plugin import Layer

    device, dtype = torch.device(where.device), where.dtypes[1]
    sizes = (TINY["tiny"] if where.quick else FAMILIES["Nemotron-3 Super"])[1][0]
    block = random_block(sizes, where, dtype)
    e = block.experts
    names = [name for name in ("gate", "up", "down") if getattr(e, name) is not None]
    layer = Layer(("hidden", "indices", "weights", *names), e.activation)
    worst = 0.0
    for tokens in (2,) if where.quick else (1, 16, 256):
        hidden = torch.randn(tokens, sizes.latent, device=device).to(dtype)
        indices = torch.rand(tokens, sizes.experts, device=device).argsort(1)[:, : sizes.top_k].contiguous()
        weights = torch.rand(indices.shape, device=device).to(dtype)
        inputs = [hidden, indices, weights, *(getattr(e, name) for name in names)]
        shapes, pointers = [tuple(t.shape) for t in inputs], [t.data_ptr() for t in inputs]
        workspace = torch.empty(layer.workspace_bytes(shapes, dtype), dtype=torch.uint8, device=device)
        output = torch.full_like(hidden, float("nan"))
        layer.run(shapes, dtype, pointers, output.data_ptr(), workspace.data_ptr(), device)
        found = error(output, exact(hidden, indices, weights, block))
        assert found < TOLERANCE[dtype], f"T {tokens}: {found:.1e}, allowed {TOLERANCE[dtype]:.1e}"
        worst = max(worst, found / TOLERANCE[dtype])
    return f"{sizes}, {dtype}: {worst:.2f} of the tolerance"


CHECKS: dict[str, Callable[[Where], str]] = {
    "sample model": check_model,
    "onnxruntime": check_onnxruntime,
    "TensorRT": check_tensorrt,
    "TensorRT plugin": check_plugin,
    "TensorRT, embedded kernels": check_embedded,
}
