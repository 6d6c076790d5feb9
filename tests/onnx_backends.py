"""What runs exported graphs here."""

from latentize.exporters import onnxruntime_ops


def graphs() -> tuple[str, ...]:
    """onnxruntime by standard operators and, where a compiler is found, with latentize's own."""
    return ("onnxruntime", *(("onnxruntime + latentize",) if onnxruntime_ops.library() else ()))
