"""What a conversion leaves on disk: safetensors, and the JSON that rebuilds the architecture from them."""

from __future__ import annotations

import contextlib
import json
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentize import __version__, remote_code, store, tensors
from latentize.errors import LatentizeError, MissingExtraError, first_line
from latentize.moe import LatentExperts, LatentMoE
from latentize.remote_code import NO_SUPPORT, Support
from latentize.sources import Form, Source, evaluation_mode
from latentize.spec import MoESpec
from latentize.staging import MANIFEST, is_ours
from latentize.whole_files import write_text

SCHEMA_VERSION = 1
_ASSETS = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model",
           "chat_template*", "*processor_config.json", "generation_config.json")  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """Where a converted model came from, so that its structure can be built again.

    `config` (a transformers configuration as it was before conversion) rebuilds a `class_name` of transformers; else
    `path` does: a model.py with its `factory`, or a .pt2. `assets` is a folder whose tokenizer files are kept.
    `text` is the MODEL argument that opens the original.
    """

    form: Form
    class_name: str
    path: Path | None = None
    factory: str = ""
    text: str = ""
    config: Mapping[str, Any] | None = None
    assets: Path | None = None

    @classmethod
    def of(cls, model: nn.Module, source: Source | None = None) -> Origin:
        """The origin of a model as it is before conversion, opened from `source` where there is one."""
        origin = cls("module", type(model).__qualname__)
        if source is not None:
            origin = replace(origin, form=source.form, path=source.path, factory=source.factory, text=source.text)
        if type(model).__module__.startswith("transformers.") and hasattr(model, "config"):
            given = Path(getattr(model.config, "_name_or_path", "") or "/nonexistent")
            assets = source.path if source is not None and source.form == "hf" else given if given.is_dir() else None
            origin = replace(origin, config=_config_of(model), assets=assets)
            origin = replace(origin, form="hf") if source is None else origin
        return origin


@dataclass(frozen=True)
class SavedBlock:
    """One rewritten block: where it sits (`passes.site_to_json`) and its spec with its tensors."""

    site: Mapping[str, Any]
    spec: MoESpec


@dataclass(frozen=True)
class Manifest:
    """What latentize.json says, besides the blocks' specs that it decodes into empty tensors."""

    origin: Origin
    recipe: Mapping[str, Any]
    blocks: Mapping[str, SavedBlock]
    aliases: Mapping[str, str]
    folder: Path


def write(
    folder: Path, model: nn.Module, origin: Origin, blocks: Mapping[str, SavedBlock], recipe: Mapping[str, Any]
) -> Support:  # fmt: skip
    """Write a converted model into `folder`, which exists; with a modelling file where transformers alone opens it.

    Returns:
        Whether transformers alone opens it.

    Raises:
        LatentizeError: a tensor is missing, unexpected or not finite.
    """
    _check_blocks(model, blocks)
    aliases = tensors.save_state(model, folder)
    outlines = _described(blocks)
    support = NO_SUPPORT
    if origin.config is not None:
        support = remote_code.support(model, origin.class_name, outlines)
    _write_structure(folder, model, origin, outlines, support)
    manifest = {
        "format": "latentize",
        "schema_version": SCHEMA_VERSION,
        "versions": versions(),
        "origin": {
            "form": origin.form,
            "class_name": origin.class_name,
            "path": origin.path.name if origin.path is not None else "",
            "factory": origin.factory,
            "text": origin.text,
            "config": origin.config,
        },
        "recipe": dict(recipe),
        "blocks": outlines,
        "aliases": aliases,
    }
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1, default=str) + "\n")
    return support


def _described(blocks: Mapping[str, SavedBlock]) -> dict[str, dict[str, Any]]:
    """Blocks as JSON values: "site", and "spec" with its tensors' shapes and dtypes."""
    return {name: {"site": block.site, "spec": store.encode(block.spec, _outline)} for name, block in blocks.items()}


def load_blocks(manifest: Manifest, model: nn.Module | None = None) -> tuple[nn.Module, dict[str, LatentMoE]]:
    """The converted model in a folder that latentize wrote, and the blocks in it by the names of the original's.

    Args:
        manifest: what the folder says of itself.
        model: a freshly built original, for models that cannot be rebuilt from the folder; it is used up.

    Raises:
        LatentizeError: the folder is damaged, or the original's structure is needed and not given.
    """
    from latentize import passes

    base = rebuild(manifest) if model is None else model
    modules = {name: LatentMoE(block.spec) for name, block in manifest.blocks.items()}
    sites = {name: block.site for name, block in manifest.blocks.items()}
    rewritten = passes.replace_blocks_from_sites(base, sites, modules) if modules else base
    tensors.load_state(rewritten, manifest.folder, manifest.aliases)
    evaluation_mode(rewritten)
    return rewritten, modules


def read_manifest(folder: Path) -> Manifest:
    """What latentize.json in a folder says.

    Raises:
        LatentizeError: the folder is not ours, or of another version.
    """
    if not is_ours(folder):
        raise LatentizeError(f"{folder}: not a folder that latentize wrote (no {MANIFEST} of ours in it); give OUT")
    data = json.loads((folder / MANIFEST).read_text())
    if data.get("schema_version") != SCHEMA_VERSION:
        raise LatentizeError(
            f"{folder}: {MANIFEST} has schema version {data.get('schema_version')!r}, this latentize reads "
            f"{SCHEMA_VERSION}; convert the model again, or use the version that wrote it"
        )
    try:
        o = data["origin"]
        path = folder / Path(o["path"]).name if o["path"] else None
        origin = Origin(o["form"], o["class_name"], path, o["factory"], o["text"], o["config"], folder)
        blocks = {
            name: SavedBlock(block["site"], store.decode(MoESpec, block["spec"], _empty))
            for name, block in data["blocks"].items()
        }
        return Manifest(origin, data["recipe"], blocks, data["aliases"], folder)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LatentizeError(
            f"{folder}: {MANIFEST} is damaged ({first_line(error)}); convert the model again"
        ) from error


def rebuild(manifest: Manifest) -> nn.Module:
    """The original's structure, its weights not yet loaded.

    Raises:
        LatentizeError: the folder does not say how to build it.
    """
    origin, folder = manifest.origin, manifest.folder
    if origin.config is not None:
        return _rebuild_transformers(origin, folder)
    if origin.form == "file" and origin.path is not None:
        from latentize.source_file import open_file

        return open_file(origin.path, origin.factory, origin=_origin_file(origin)).model
    if origin.form == "pt2" and origin.path is not None:
        from latentize.source_pt2 import check_archive, load_module

        check_archive(origin.path)
        return load_module(origin.path)[0]
    raise LatentizeError(
        f"{folder}: the model came from Python as a {origin.class_name}, which cannot be rebuilt from files; "
        f"build it as before and call latentize.load({str(folder)!r}, model=it)"
    )


def is_artefact(path: Path) -> bool:
    """Whether a path is a folder that latentize wrote."""
    return path.is_dir() and is_ours(path)


def open_artefact(folder: Path) -> Source:
    """A converted model as a `Source`, with the inputs, calibration and evaluation of its original where known."""
    from latentize import source_file, source_hf, source_pt2

    manifest = read_manifest(folder)
    origin, model = manifest.origin, load_blocks(manifest)[0]
    if origin.form == "file" and origin.path is not None:
        source = source_file.open_file(origin.path, origin.factory, origin=_origin_file(origin))
        return replace(source, model=model, path=folder, factory="")
    if origin.form == "pt2" and origin.path is not None:
        args, kwargs = source_pt2.load_module(origin.path)[1]
        return Source("pt2", folder, model, tuple(args), dict(kwargs))
    return Source("hf", folder, model, (), source_hf.token_inputs(model, folder))


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    import importlib.metadata

    found = {"latentize": __version__, "torch": torch.__version__, "python": platform.python_version()}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["transformers"] = importlib.metadata.version("transformers")
    return found


def _check_blocks(model: nn.Module, blocks: Mapping[str, SavedBlock]) -> None:
    here = {tensor.data_ptr() for tensor in model.state_dict(keep_vars=True).values() if isinstance(tensor, Tensor)}
    for name, block in blocks.items():
        lost = [part for part, tensor in block.spec.tensors().items() if tensor.data_ptr() not in here]
        if lost:
            raise LatentizeError(
                f"block {name!r}: {lost[0]} is missing from the model's state; save the converted model itself"
            )
    count = sum(isinstance(module, LatentExperts) for module in model.modules())
    if count > len(blocks):
        raise LatentizeError(
            f"the model holds {count} latent blocks and only {len(blocks)} are described, the others being unexpected; "
            "convert all blocks in one go, from the original"
        )


def _write_structure(
    folder: Path, model: nn.Module, origin: Origin, blocks: Mapping[str, Mapping[str, Any]], support: Support
) -> None:
    if origin.config is not None:
        _write_transformers(folder, model, origin, blocks, support)
    if origin.path is None or not origin.path.is_file():
        return
    if origin.form == "file":
        shutil.copyfile(origin.path, folder / origin.path.name)
    elif origin.form == "pt2":
        from latentize.source_pt2 import copy_graph

        copy_graph(origin.path, folder / origin.path.name)


def _write_transformers(
    folder: Path, model: Any, origin: Origin, blocks: Mapping[str, Mapping[str, Any]], support: Support
) -> None:
    remote_code.write(folder, model.config, origin.class_name, blocks, support)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
    if origin.assets is not None:
        copy_assets(origin.assets, folder)


def copy_assets(source: Path, folder: Path) -> None:
    """Copy the tokenizer and the like of a transformers model in `source` to `folder`, which keeps what it has."""
    for file in (file for pattern in _ASSETS for file in source.glob(pattern)):
        if file.is_file() and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)


def _config_of(model: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    for name in ("_attn_implementation", "_experts_implementation"):
        value = getattr(model.config, name, None)
        if isinstance(value, str):
            config[name] = value
    return config


def _rebuild_transformers(origin: Origin, folder: Path) -> nn.Module:
    try:
        import transformers
        from transformers.initialization import no_init_weights
    except ImportError:
        raise MissingExtraError("transformers", "hf", f"loading a {origin.class_name}") from None
    values = _plain_floats(dict(origin.config or {}))
    model_class = getattr(transformers, origin.class_name, None)
    if model_class is None or values.get("model_type") not in transformers.CONFIG_MAPPING:
        raise LatentizeError(
            f"{folder}: transformers {transformers.__version__} has no {origin.class_name}; install the version that "
            f"{MANIFEST} names, or build the original and pass it as model="
        )
    chosen = {name.removeprefix("_"): values.pop(name) for name in ("_attn_implementation", "_experts_implementation")
              if name in values}  # fmt: skip
    config = transformers.CONFIG_MAPPING[values["model_type"]].from_dict(values)
    with no_init_weights():
        model: Any = model_class._from_config(config, **chosen)
    if (folder / "generation_config.json").exists() and hasattr(model, "generation_config"):
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    rebuilt: nn.Module = model
    return rebuilt


def _plain_floats(value: Any) -> Any:
    """A configuration's values with the infinities that transformers writes as {"__float__": "Infinity"} put back."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _plain_floats(item) for key, item in value.items()}
    return [_plain_floats(item) for item in value] if isinstance(value, list) else value


def _origin_file(origin: Origin) -> Path | None:
    """The path of the model.py that was converted, where its data may still be."""
    if not origin.text:
        return None
    path = Path(origin.text.removesuffix(f":{origin.factory}"))
    return path if path.suffix == ".py" else None


def _outline(_path: str, tensor: Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}


def _empty(outline: Mapping[str, Any]) -> Tensor:
    return torch.empty(outline["shape"], dtype=getattr(torch, outline["dtype"]))
