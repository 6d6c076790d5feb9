"""Writing ONNX files so that they are complete or absent, whatever their size."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from latentize.disk_errors import write_error
from latentize.errors import LatentizeError

if TYPE_CHECKING:
    import onnx_ir as ir


#: Bytes of weights that one file holds at most, with room for the graph: it is one message of less than 2 GiB.
INLINE = (1 << 31) - (1 << 26)


def write_model(model: ir.Model, path: Path, external_above: int) -> Path | None:
    """Write `model` to `path`, its weights to `path` + ".data" when they exceed `external_above` bytes.

    Both are written under temporary names in the same folder and then renamed, the weights first.

    Returns:
        the path of the weights, or None.

    Raises:
        ResourceError: the disk is full.
        LatentizeError: the folder cannot be written to, or `external_above` asks for more weights in one file than the
            format holds.
    """
    import onnx_ir as ir

    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    data_path = path.with_name(path.name + ".data") if weights > external_above else None
    if data_path is None and weights > INLINE:
        raise LatentizeError(
            f"{path}: {weights / 2**30:.2f} GiB of weights do not fit into one ONNX file, which holds less than 2 GiB; "
            f"let external_above be {INLINE} bytes or less, so that they go to {path.name}.data"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            ir.save(model, work / path.name, external_data=None if data_path is None else data_path.name)
            _put_in_place(work, path, data_path)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        left = f"it takes {weights / 2**20:.0f} MiB"
        raise write_error(path, error, left, "choose another folder") from None
    return data_path


def _put_in_place(work: Path, path: Path, data_path: Path | None) -> None:
    path.unlink(missing_ok=True)  # an old graph must never be seen with new weights
    old_data = path.with_name(path.name + ".data")
    if data_path is None:
        old_data.unlink(missing_ok=True)
    else:
        (work / data_path.name).replace(data_path)
    (work / path.name).replace(path)
