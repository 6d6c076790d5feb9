"""A Hugging Face model directory: config.json and safetensors, never pickles, never code from the directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from latentize.errors import LatentizeError, MissingExtraError, first_line
from latentize.sources import Source, out_of_memory

#: Example inputs: sequences and tokens in each.
_BATCH, _TOKENS = 2, 64


def open_directory(path: Path) -> Source:
    """The model in a directory, with token ids drawn from its vocabulary as example inputs.

    Raises:
        LatentizeError: the directory is not a model, needs code of its own, holds pickles, or its tensors do not fit.
    """
    config = read_config(path)
    _check_files(path)
    model_class = _model_class(path, config)
    try:
        model, info = model_class.from_pretrained(
            path, local_files_only=True, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:
        if out_of_memory(error):
            raise
        raise LatentizeError(f"{path}: transformers cannot load it: {first_line(error)}") from error
    _check_loading(path, info)
    return Source("hf", path, model.eval(), (), token_inputs(model, path))


def read_config(path: Path) -> dict[str, Any]:
    """The directory's config.json.

    Raises:
        LatentizeError: there is none, or it is not a JSON object.
    """
    file = path / "config.json"
    if not file.is_file():
        raise LatentizeError(f"{path}: not a model folder: it has no config.json; give a Hugging Face model directory")
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise LatentizeError(f"{file}: cannot be read as JSON: {first_line(error)}") from None
    if not isinstance(config, dict):
        raise LatentizeError(f"{file}: expected a JSON object, found {type(config).__name__}")
    return config


def token_inputs(model: Any, path: Path) -> dict[str, Any]:
    """Keyword inputs of a model that reads token ids: input_ids [2, 64] int64 drawn from its vocabulary.

    Raises:
        LatentizeError: the model does not read token ids.
    """
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
    if getattr(model, "main_input_name", "input_ids") != "input_ids" or not vocabulary:
        raise LatentizeError(
            f"{path}: {type(model).__name__} reads {model.main_input_name!r}, not token ids; write a model.py whose "
            "build_model() loads this folder and whose example_inputs() returns what it reads"
        )
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _TOKENS
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(int(vocabulary), (_BATCH, min(_TOKENS, int(longest))), generator=generator)
    return {"input_ids": ids, "use_cache": False} if hasattr(model.config, "use_cache") else {"input_ids": ids}


def _check_files(path: Path) -> None:
    if any(path.glob("*.safetensors")):
        return
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
    if pickles:
        raise LatentizeError(
            f"{path}: its weights are pickles ({pickles[0]}), which can run any code when opened, so they are not; "
            "convert them to safetensors first"
        )
    raise LatentizeError(f"{path}: no .safetensors file in it; download the model's weights into the folder")


def _model_class(path: Path, config: dict[str, Any]) -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingExtraError("transformers", "hf", "opening a Hugging Face model directory") from None
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "quantised")
        raise LatentizeError(f"{path}: its weights are quantised ({method}); give the unquantised checkpoint")
    kind = config.get("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        own = " and it brings its own code (auto_map), which is not run" if "auto_map" in config else ""
        raise LatentizeError(
            f"{path}: transformers {transformers.__version__} does not know model_type {kind!r}{own}; "
            "write a model.py whose build_model() returns the model"
        )
    for name in config.get("architectures") or []:
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    return transformers.AutoModelForCausalLM


def _check_loading(path: Path, info: dict[str, Any]) -> None:
    for problem in ("missing_keys", "mismatched_keys"):
        if info.get(problem):
            names = sorted(str(key) for key in info[problem])
            raise LatentizeError(
                f"{path}: {problem.replace('_', ' ')} in the checkpoint: {names[0]} and {len(names) - 1} more; "
                "the weights and config.json must belong together"
            )
