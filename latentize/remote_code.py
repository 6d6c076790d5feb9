"""A converted transformers model that `from_pretrained(..., trust_remote_code=True)` rebuilds without latentize.

`modeling_latent.py` is made of the very sources that the package runs, so that there is nothing to keep alike.
"""

from __future__ import annotations

import ast
import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

FILE = "modeling_latent.py"
#: The modules that the file is made of; each needs only those before it.
_MODULES = (
    "latentize.activations",
    "latentize.spec",
    "latentize.routing",
    "latentize.reference",
    "latentize.ops_plain",
    "latentize.moe",
    "latentize.store",
    "latentize.passes.sites",
    "latentize.passes.blocks",
    "latentize.passes.boundaries",
    "latentize.modeling",
)
_HEAD = '''"""{name}: {base} of transformers with LatentMoE blocks, written by latentize (Apache 2.0).

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

needs torch and transformers alone. config.json says where the blocks sit and what they compute.
"""

from __future__ import annotations

'''


@dataclass(frozen=True)
class Support:
    """The Auto classes of transformers that rebuild a converted model on their own, or why none does."""

    auto: tuple[str, ...] = ()
    reason: str = ""


def support(config: Any, class_name: str, sites: Mapping[str, Mapping[str, Any]]) -> Support:
    """Whether transformers alone can rebuild a converted model.

    Args:
        config: the model's configuration.
        class_name: the transformers class of the original.
        sites: where its blocks sit, as JSON values by block name.
    """
    for name, site in sites.items():
        if site["kind"] == "graph":
            return Support(reason=f"block {name!r} was rewritten as a graph")
        if site["kind"] == "parts" and site["router"]["prefix"]:
            return Support(reason=f"the router of block {name!r} transforms its input first")
    auto = _auto_classes(config, class_name)
    return Support(auto) if auto else Support(reason=f"no Auto class of transformers knows {class_name}")


def write(folder: Path, config: Any, class_name: str, blocks: Mapping[str, Mapping[str, Any]]) -> None:
    """Write config.json and, where transformers alone can rebuild the model, the modelling file that does.

    Args:
        folder: where; it exists.
        config: the converted model's configuration, left as it is.
        class_name: the transformers class of the original.
        blocks: "site" and "spec" as JSON values, by block name.
    """
    found = support(config, class_name, {name: block["site"] for name, block in blocks.items()})
    if found.auto:
        config = copy.deepcopy(config)
        name = f"Latent{class_name}"
        config.auto_map = {auto: f"{FILE.removesuffix('.py')}.{name}" for auto in found.auto}
        config.latentize = {key: dict(value) for key, value in blocks.items()}
        config.architectures = [name]
        (folder / FILE).write_text(source(class_name), encoding="utf-8")
    config.save_pretrained(folder)


def source(class_name: str) -> str:
    """The text of the modelling file for a model of a transformers class."""
    name = f"Latent{class_name}"
    imports: set[str] = set()
    bodies = [_body(inspect.getsource(import_module(module)), imports) for module in _MODULES]
    head = _HEAD.format(name=name, base=class_name) + "\n".join(sorted(imports)) + "\n"
    last = f'class {name}(LatentModel, transformers.{class_name}):\n    """The converted model."""\n'
    return "\n\n".join([head, *bodies, last])


def _body(text: str, imports: set[str]) -> str:
    """A module's text without its docstring and imports, which are added to `imports` unless they are our own."""
    lines = text.splitlines()
    drop: set[int] = set()
    for number, node in enumerate(ast.parse(text).body):
        docstring = number == 0 and isinstance(node, ast.Expr)
        if docstring or isinstance(node, (ast.Import, ast.ImportFrom)):
            drop.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(("latentize", "__future__")):
            imports.update(f"from {node.module} import {ast.unparse(alias)}" for alias in node.names)
        elif isinstance(node, ast.Import):
            imports.update(f"import {ast.unparse(alias)}" for alias in node.names)
    imports.add("import transformers")
    return "\n".join(line for number, line in enumerate(lines, 1) if number not in drop).strip() + "\n"


def _auto_classes(config: Any, class_name: str) -> tuple[str, ...]:
    """The Auto classes of transformers under which a model class is known for this configuration."""
    from transformers.models.auto import modeling_auto

    found = []
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        names = getattr(mapping, "_model_mapping", {})
        if name.startswith("Auto") and names.get(config.model_type) == class_name:
            found.append(name)
    return tuple(found)
