"""A converted transformers model that `from_pretrained(..., trust_remote_code=True)` rebuilds without latentize.

`modeling_latent.py` is made of the very sources that the package runs, so that there is nothing to keep alike.
"""

from __future__ import annotations

import ast
import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

FILE = "modeling_latent.py"
#: The modules that the file is made of; each needs only those before it.
_MODULES = (
    "latentize.errors",
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


#: For what is not a transformers model.
NO_SUPPORT = Support()


def support(model: nn.Module, class_name: str, blocks: Mapping[str, Mapping[str, Any]]) -> Support:
    """Whether transformers alone can rebuild a converted model: tried, on the meta device.

    Args:
        model: the converted model, with its configuration.
        class_name: the transformers class of the original.
        blocks: "site" and "spec" as JSON values, by block name.
    """
    config: Any = model.config
    for name, block in blocks.items():
        site = block["site"]
        if site["kind"] == "graph":
            return Support(reason=f"block {name!r} was rewritten as a graph")
        if site["kind"] == "parts" and site["router"]["prefix"]:
            return Support(reason=f"the router of block {name!r} transforms its input first")
    auto = _auto_classes(config, class_name)
    if not auto:
        return Support(reason=f"no Auto class of transformers knows {class_name}")
    reason = _other_shapes(model, class_name, described(config, class_name, blocks, auto))
    return Support(reason=reason) if reason else Support(auto)


def _other_shapes(model: nn.Module, class_name: str, config: Any) -> str:
    """Which tensor of the rebuilt model would differ, as in one whose other MoE blocks have other sizes; "" if none."""
    import transformers

    from latentize.modeling import LatentModel

    rebuilt = type(class_name, (LatentModel, getattr(transformers, class_name)), {})
    with torch.device("meta"):
        built = rebuilt(config)
    wanted, found = ({n: t.shape for n, t in m.state_dict().items()} for m in (model, built))
    odd = next((n for n in [*wanted, *found] if wanted.get(n) != found.get(n)), None)
    if odd is None:
        return ""
    return f"with the new configuration {odd} would be {list(found.get(odd, ()))}, not {list(wanted.get(odd, ()))}"


def described(config: Any, class_name: str, blocks: Mapping[str, Mapping[str, Any]], auto: Sequence[str]) -> Any:
    """A copy of the configuration that says where the blocks sit, and which class of the modelling file opens it."""
    config = copy.deepcopy(config)
    name = f"Latent{class_name}"
    config.auto_map = {kind: f"{FILE.removesuffix('.py')}.{name}" for kind in auto}
    config.latentize = {key: dict(value) for key, value in blocks.items()}
    config.architectures = [name]
    return config


def write(
    folder: Path, config: Any, class_name: str, blocks: Mapping[str, Mapping[str, Any]], found: Support
) -> None:
    """Write config.json and, where transformers alone can rebuild the model (`found`), the modelling file that does.

    Args:
        folder: where; it exists.
        config: the converted model's configuration, left as it is.
        class_name: the transformers class of the original.
        blocks: "site" and "spec" as JSON values, by block name.
    """
    if found.auto:
        config = described(config, class_name, blocks, found.auto)
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
