"""Whole models in onnxruntime: does the trained sample say the same there, and how long does a deep and wide one take?

    python benchmarks/onnx_whole.py text      the trained sample and its conversion generate text, token by token
    python benchmarks/onnx_whole.py wide      48 layers of 128 experts, tiny widths, alone and with the attention of
                                              transformers' Qwen3: time to export, load and run

Times are CPU seconds of this process, so that a busy machine disturbs them little. Ends with status 1 where a token
differs or a time is past its limit.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from measured import keep, table
from torch import Tensor, nn

from latentize import conversion
from latentize.exporters.onnx import export_onnx
from latentize.exporters.onnx_check import check_onnx, open_session, run_session
from latentize.inputs import Inputs
from latentize.moe import LatentMoE
from latentize.spec import ExpertsSpec, LatentSpec, MoESpec, RouterSpec

LAYERS, EXPERTS, TOP_K, HIDDEN, LATENT, INTERMEDIATE, VOCAB = 48, 128, 8, 32, 16, 16, 64
#: CPU seconds allowed for the wide model.
EXPORT_LIMIT, LOAD_LIMIT = 120.0, 10.0
LENGTH = 64


def main() -> int:
    """Measure what was asked for; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["text", "wide"])
    what = parser.parse_args().what
    torch.set_num_threads(1)
    rows = text() if what == "text" else wide()
    keep("onnx_whole", rows, ("model", "what"))
    print(table(rows, {"model": "", "what": "", "value": ".3g", "limit": ".3g", "kept": ""}))
    return 0 if all(row["kept"] for row in rows) else 1


def text() -> list[dict[str, Any]]:
    """Logits and greedy text of the trained sample and of its conversion, in PyTorch and in onnxruntime."""
    import latentize

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "samples"))
    import stdlib_lm

    original, inputs = stdlib_lm.build_model(), stdlib_lm.example_inputs()
    found = conversion.survey(original, (), inputs, latentize.Recipe()).selected
    exact = conversion.canonical(original, found).model  # as the command line exports the original
    recipe = latentize.Recipe(compression=2, variant="fixed", heal_steps=0, init="weights")
    converted = latentize.convert(original, kwargs=inputs, recipe=recipe).model.eval()
    prompt = inputs["input_ids"][:1, :32]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, model in (("sample", exact), ("sample, latent", converted)):
            path = Path(folder) / f"{name}.onnx"
            export_onnx(model, (), inputs, path)
            fresh = [((), {**inputs, "input_ids": torch.randint(256, (1, n))}) for n in (1, 16, 128)]
            error = check_onnx(path, model, fresh, tolerance=1.0).error
            rows.append(row(name, "relative error of logits", error, 1e-5))
            wanted = in_torch(original if model is exact else model, prompt)
            differing = int((in_onnxruntime(path, prompt, inputs) != wanted).sum())
            rows.append(row(name, f"tokens of {LENGTH} that differ", differing, 0))
    return rows


def in_torch(model: Any, prompt: Tensor) -> Tensor:
    """The prompt and the most likely tokens after it, one after the other."""
    settings = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "eos_token_id": None}
    found: Tensor = model.generate(prompt, max_new_tokens=LENGTH, **settings)
    return found


def in_onnxruntime(path: Path, prompt: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """The same with the exported graph, which reads the whole text at every step."""
    session, ids = open_session(path, threads=1), prompt
    for _ in range(LENGTH):
        logits = run_session(session, Inputs(kwargs={**inputs, "input_ids": ids}))[0]
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids


def wide() -> list[dict[str, Any]]:
    """Export, load and run models of many layers and experts."""
    name = f"{LAYERS} × {EXPERTS} experts"
    return [*wide_one(name, Wide()), *wide_one(f"{name} and attention", converted_qwen3())]


def wide_one(name: str, model: nn.Module) -> list[dict[str, Any]]:
    """The rows of one model."""
    ids = torch.zeros(2, 8, dtype=torch.long)
    taken: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "wide.onnx"
        with timed(taken, "export"):
            export = export_onnx(model, (ids,), {}, path)
        with timed(taken, "load"):
            session = open_session(path, threads=1)
        with timed(taken, "run"):
            run_session(session, Inputs((ids[:1, :1],)))
        error = check_onnx(path, model, [((torch.randint(VOCAB, (1, n)),), {}) for n in (1, 16)]).error
    print(f"form {next(iter(export.forms.values()))}, {export.bytes:,} bytes")
    return [
        row(name, "CPU seconds to export", taken["export"], EXPORT_LIMIT),
        row(name, "CPU seconds to load", taken["load"], LOAD_LIMIT),
        row(name, "CPU seconds of the first token", taken["run"], LOAD_LIMIT),
        row(name, "relative error", error, 1e-5),
    ]


def converted_qwen3() -> nn.Module:
    """A Qwen3 of random weights, of which every block was rewritten."""
    import transformers

    import latentize

    config = transformers.Qwen3MoeConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, moe_intermediate_size=INTERMEDIATE, vocab_size=VOCAB,
        num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, head_dim=8, norm_topk_prob=True,
        num_experts=EXPERTS // 2, num_experts_per_tok=TOP_K // 2, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    recipe = latentize.Recipe(latent_dim=LATENT, variant="acc", heal_steps=0, init="weights")
    ids = torch.randint(VOCAB, (2, 16))
    result = latentize.convert(transformers.Qwen3MoeForCausalLM(config).eval(), args=(ids,), recipe=recipe)
    assert [block.status for block in result.blocks] == ["moe"] * LAYERS
    model: nn.Module = result.model
    return model.eval()


class Wide(nn.Module):
    """A language model of many latent blocks with random weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.blocks = nn.ModuleList(block(seed) for seed in range(LAYERS))
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(LAYERS))
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [B, T, vocabulary] of ids [B, T]."""
        x = self.embed(ids)
        for norm, moe in zip(self.norms, self.blocks, strict=True):
            x = x + moe(norm(x))
        scores: Tensor = self.head(x)
        return scores


def block(seed: int) -> LatentMoE:
    """A latent block with random weights."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    n, m, width = EXPERTS, INTERMEDIATE, LATENT
    experts = ExpertsSpec(draw(n, m, width), draw(n, width, m), draw(n, m, width))
    latent = LatentSpec(draw(width, HIDDEN), draw(HIDDEN, width))
    return LatentMoE(MoESpec(RouterSpec(draw(n, HIDDEN), TOP_K, normalize="sum"), experts, latent))


@contextmanager
def timed(taken: dict[str, float], name: str) -> Iterator[None]:
    """Put the CPU seconds of what runs inside into `taken`."""
    start = time.process_time()
    yield
    taken[name] = time.process_time() - start


def row(model: str, what: str, value: float, limit: float) -> dict[str, Any]:
    """One line of the table."""
    return {"model": model, "what": what, "value": float(value), "limit": float(limit), "kept": value <= limit}


if __name__ == "__main__":
    sys.exit(main())
