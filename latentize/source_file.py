"""model.py: a Python file of the user's that builds a model and says how to call it."""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from latentize.errors import LatentizeError, first_line
from latentize.sources import Source, as_inputs, out_of_memory

FACTORY = "build_model"


def open_file(path: Path, factory: str = "", *, origin: Path | None = None) -> Source:
    """The model that a model.py builds.

    Args:
        path: the file.
        factory: the function that builds the model; "" means `build_model`.
        origin: where the file used to be, when `path` is a copy; its own data is looked for there.

    Raises:
        LatentizeError: the file has no such function, or code in it fails (with the line).
    """
    module = run_file(path, origin)
    build = _factory(module, path, factory)
    with user_code(path, f"{build.__name__}()"):
        model = build()
    if not isinstance(model, nn.Module):
        raise LatentizeError(
            f"{path.name}: {build.__name__}() returned {type(model).__name__}; return a torch.nn.Module"
        )
    plain = _uncompiled(model)
    args, kwargs = _example_inputs(module, path)
    source = Source("file", path, plain, args, kwargs, factory or FACTORY)
    if plain is not model:
        source.notes.append(f"{build.__name__}() returned a compiled model: the module that it was made from was taken")
    if callable(getattr(module, "calibration_data", None)):
        source.calibration = _guarded_iterable(module.calibration_data, path)
    if callable(getattr(module, "evaluate", None)):
        source.evaluate = _guarded_evaluate(module.evaluate, path)
    return source


def _uncompiled(model: nn.Module) -> nn.Module:
    """The module behind one that torch.compile returned; any other itself."""
    compiled = sys.modules.get("torch._dynamo.eval_frame")  # not there unless something was compiled
    inner = getattr(model, "_orig_mod", None)
    if compiled is not None and isinstance(model, compiled.OptimizedModule) and isinstance(inner, nn.Module):
        return inner
    return model


def run_file(path: Path, origin: Path | None = None) -> ModuleType:
    """The module that a model.py defines; its `__file__` is `origin` where that folder still exists.

    Raises:
        LatentizeError: the file cannot be read, or fails (with the line).
    """
    home = origin if origin is not None and origin.parent.is_dir() else path
    name = f"_model_{path.stem}"
    module = ModuleType(name)
    module.__file__ = str(home.resolve())
    sys.modules[name] = module  # dataclasses look their module up
    folder = str(home.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    with user_code(path, "importing it"):
        code = compile(path.read_bytes(), str(path), "exec")
        exec(code, module.__dict__)  # noqa: S102  running the user's own file is the job
    return module


@contextmanager
def user_code(path: Path, doing: str) -> Iterator[None]:
    """Turn whatever the user's code raises into one line that names the file and line.

    Raises:
        LatentizeError: the code failed.
    """
    try:
        yield
    except (KeyboardInterrupt, GeneratorExit, LatentizeError):
        raise
    except OSError as error:
        if error.filename == str(path):
            raise LatentizeError(f"{path}: cannot be read ({error.strerror})") from error
        raise LatentizeError(_explain(error, path, doing)) from error
    except BaseException as error:
        if out_of_memory(error):
            raise
        raise LatentizeError(_explain(error, path, doing)) from error


def _explain(error: BaseException, path: Path, doing: str) -> str:
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{path.name}:{error.lineno}: syntax error: {error.msg}; correct the file"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    where = f"{path.name}:{lines[-1]}" if lines else path.name
    return f"{where}: {first_line(error)} (in {doing}); correct the file"


def _factory(module: ModuleType, path: Path, wanted: str) -> Callable[[], Any]:
    name = wanted or FACTORY
    found = getattr(module, name, None)
    if callable(found):
        function: Callable[[], Any] = found
        return function
    candidates = _candidates(module)
    options = " or ".join(f"{path.name}:{candidate}" for candidate in candidates)
    if found is not None:
        raise LatentizeError(f"{path.name}: {name} is a {type(found).__name__}; name a function that returns the model")
    if not candidates:
        raise LatentizeError(f"{path.name}: no {name}() found; define `def {name}() -> torch.nn.Module`")
    if len(candidates) == 1:
        raise LatentizeError(f"{path.name}: no {name}() found; define it, or say {options}")
    raise LatentizeError(f"{path.name}: no {name}() found, and several candidates: say {options}")


def _candidates(module: ModuleType) -> list[str]:
    """Functions and module classes of the file that can be called without arguments and may build a model."""
    known = {"example_inputs", "calibration_data", "evaluate", "main"}
    found = []
    for name, value in vars(module).items():
        if name.startswith("_") or name in known or getattr(value, "__module__", None) != module.__name__:
            continue
        if not (inspect.isfunction(value) or (inspect.isclass(value) and issubclass(value, nn.Module))):
            continue
        parameters = inspect.signature(value).parameters.values()
        required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if not required:
            found.append(name)
    return found


def _example_inputs(module: ModuleType, path: Path) -> tuple[tuple[Any, ...], dict[str, Any]]:
    function = getattr(module, "example_inputs", None)
    if not callable(function):
        raise LatentizeError(
            f"{path.name}: no example_inputs() found; define `def example_inputs()` returning a tuple of arguments "
            "or a dict of keyword arguments"
        )
    with user_code(path, "example_inputs()"):
        value = function()
    return as_inputs(value, f"{path.name}: example_inputs()")


def _guarded_iterable(function: Callable[[], Iterable[Any]], path: Path) -> Callable[[], Iterable[Any]]:
    def batches() -> Iterator[Any]:
        with user_code(path, "calibration_data()"):
            yield from function()

    return batches


def _guarded_evaluate(function: Callable[[nn.Module], Any], path: Path) -> Callable[[nn.Module], dict[str, float]]:
    def evaluate(model: nn.Module) -> dict[str, float]:
        with user_code(path, "evaluate()"):
            values = function(model)
        if not isinstance(values, dict) or not values:
            raise LatentizeError(
                f"{path.name}: evaluate() returned {values!r:.60}; return a dict of numbers, the first lower is better"
            )
        with user_code(path, "reading what evaluate() returned"):
            return {str(name): float(value) for name, value in values.items()}

    return evaluate
