"""Latency in onnxruntime on CPU of every body form, and of exported blocks, original against rewritten.

    python benchmarks/onnx_forms.py forms            one latent-experts node, every form
    python benchmarks/onnx_forms.py sample           the trained sample, converted by its weights, in every form
    python benchmarks/onnx_forms.py profiles         the forms chosen for decoding, for prefilling and for everything
    python benchmarks/onnx_forms.py blocks           whole blocks, form "measured": the original and each variant,
                                                     by standard operators and with latentize's own, and the
                                                     original as torch.onnx exports transformers' own code

One thread; times are CPU time of that thread, so that a busy machine disturbs them little. All graphs of a comparison
are run in every round, each several times in a row, as where one model serves; the first of these calls, which finds
what the other graphs left in the caches, is not counted. `ms` is the lower quartile over the rounds. Weights are random
but for the sample: latency does not depend on them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from measured import keep, table

from latentize.activations import Activation
from latentize.exporters import onnxruntime_ops
from latentize.exporters.onnx import export_onnx
from latentize.exporters.onnx_alone import node_feeds, node_session
from latentize.exporters.onnx_bodies import FORMS
from latentize.exporters.onnx_check import open_session
from latentize.exporters.onnx_costs import tokens_in_flight
from latentize.exporters.onnx_experts import candidates, choose_form
from latentize.exporters.onnx_forms import NodeConfig
from latentize.exporters.onnx_timing import fastest, interleaved
from latentize.exporters.tensorrt_profiles import Profile
from latentize.moe import LatentMoE
from latentize.spec import ExpertsSpec, LatentSpec, MoESpec, RouterSpec

TOKENS = (1, 16, 256)
OURS = " + latentize"
BY_TORCH = "original, torch.onnx"
#: What gathering copies of the weights for 256 tokens needs: gigabytes.
TOO_LARGE = {("gather", 256), ("d512", 256)}
#: name -> (d, m, N, k, α)
BLOCKS = {"teacher": (128, 64, 16, 4, 2), "d512": (512, 512, 64, 8, 4)}
FORM_SIZES = {
    "l128_m512_N64_k8": (128, 512, 64, 8),
    "l64_m64_N32_k8": (64, 64, 32, 8),
    "l64_m64_N64_k4": (64, 64, 64, 4),
    "l128_m64_N16_k4": (128, 64, 16, 4),
    "l32_m48_N16_k4": (32, 48, 16, 4),
}
#: use -> the profile that says so, and numbers of tokens of both.
PROFILES = {"usual": "", "decode": "1:1:4x1", "prefill": "1x256:512:1024"}
PROFILE_TOKENS = (1, 4, 256, 1024)
SECONDS = 1.0


def main() -> None:
    """Measure what was asked for, print the table, keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["forms", "sample", "profiles", "blocks"])
    what = parser.parse_args().what
    torch.set_num_threads(1)
    measures = {
        "forms": measure_forms, "sample": measure_sample, "profiles": measure_profiles, "blocks": measure_blocks
    }  # fmt: skip
    rows = measures[what]()
    keep("onnx_" + what, rows, ("sizes", "graph", "tokens"))
    columns = {"sizes": "", "graph": "", "tokens": "", "ms": ".3f", "ratio": ".2f"}
    print(table(rows, columns | ({"alike": ".2f"} if what == "blocks" else {"form": ""})))


def measure_forms() -> list[dict[str, Any]]:
    """Every form of one node, and what is chosen for any number of tokens and for this one alone.

    It is chosen by prices ("auto") and by timing ("measured"). `ratio` is to the fastest form at that number of tokens.
    """
    rows = []
    for sizes, (latent, intermediate, experts, k) in FORM_SIZES.items():
        config = NodeConfig(experts, k, latent, intermediate, 1, Activation("silu"), ("gate",), False, True)
        auto = choose_form(config, [config])
        alone = {t: choose_form(config, [config], tokens_in_flight([Profile.parse(f"1x{t}")])) for t in TOKENS}
        every = candidates(config, [config])
        measured = fastest(config, every)
        timed = {t: fastest(config, every, tokens_in_flight([Profile.parse(f"1x{t}")])) for t in TOKENS}
        wanted = dict.fromkeys((*FORMS, auto, *alone.values(), measured, *timed.values()))
        sessions = {form: node_session(form, config, 1) for form in wanted}
        for tokens in TOKENS:
            feeds = node_feeds(config, tokens)
            calls = {
                form: runner(session, feeds) for form, session in sessions.items() if (form, tokens) not in TOO_LARGE
            }
            times = interleaved(calls, SECONDS)
            taken = {
                "auto": auto, f"profile 1x{tokens}": alone[tokens],
                "measured": measured, f"measured, profile 1x{tokens}": timed[tokens],
            }  # fmt: skip
            rows += beside_the_best(sizes, tokens, times, taken)
    return rows


def measure_sample() -> list[dict[str, Any]]:
    """Every form of the sample's conversions, the whole models; `ratio` as in `measure_forms`."""
    import latentize

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "samples"))
    import stdlib_lm

    inputs = stdlib_lm.example_inputs()
    rows = []
    for variant in ("acc", "eff", "fixed"):
        recipe = latentize.Recipe(variant=variant, heal_steps=0, init="weights")
        model = latentize.convert(stdlib_lm.build_model(), kwargs=inputs, recipe=recipe).model.eval()
        sessions = {}
        with tempfile.TemporaryDirectory() as folder:
            for form in (*FORMS, "auto", "measured"):
                export_onnx(model, (), inputs, path := Path(folder) / f"{form}.onnx", form=form)
                sessions[form] = open_session(path, threads=1)
        for tokens in TOKENS:
            feeds = {
                "input_ids": np.random.default_rng(tokens).integers(256, size=(1, tokens)),
                "attention_mask": np.ones((1, tokens), dtype=np.int64),
            }
            calls = {
                form: runner(session, {value.name: feeds[value.name] for value in session.get_inputs()})
                for form, session in sessions.items()
            }
            times = interleaved(calls, SECONDS)
            rows += beside_the_best(f"sample, {variant}", tokens, times, {how: how for how in ("auto", "measured")})
    return rows


def beside_the_best(
    sizes: str, tokens: int, times: Mapping[str, float], chosen: Mapping[str, str]
) -> list[dict[str, Any]]:
    """A row for the milliseconds of each form and of each choice: how it came about, and which of the times is its."""
    best = min(times[form] for form in FORMS if form in times)
    timed = {form: form for form in FORMS if form in times} | chosen
    return [
        {"sizes": sizes, "graph": name, "tokens": tokens, "form": form, "ms": times[form], "ratio": times[form] / best}
        for name, form in timed.items()
    ]


def measure_profiles() -> list[dict[str, Any]]:
    """What is chosen for each use of one node, at its tokens and at the other's; `ratio` is to what is usual."""
    rows = []
    for sizes, (latent, intermediate, experts, k) in FORM_SIZES.items():
        config = NodeConfig(experts, k, latent, intermediate, 1, Activation("silu"), ("gate",), False, True)
        chosen = {
            use: choose_form(config, [config], tokens_in_flight([Profile.parse(profile)] if profile else []))
            for use, profile in PROFILES.items()
        }
        sessions = {form: node_session(form, config, 1) for form in dict.fromkeys(chosen.values())}
        for tokens in PROFILE_TOKENS:
            feeds = node_feeds(config, tokens)
            times = interleaved({form: runner(session, feeds) for form, session in sessions.items()}, SECONDS)
            for use, form in chosen.items():
                ms, usual = times[form], times[chosen["usual"]]
                row = {"sizes": sizes, "graph": use, "tokens": tokens, "form": form, "ms": ms, "ratio": ms / usual}
                rows.append(row)
    return rows


def measure_blocks() -> list[dict[str, Any]]:
    """The original block and each variant, by standard operators and with our own.

    `ratio` is to the original by standard operators at that number of tokens, `alike` to the original by the same ones.
    """
    operators = {"": None, OURS: onnxruntime_ops.library()}
    if operators[OURS] is None:
        del operators[OURS]
    rows = []
    for sizes, (d, m, n, k, alpha) in BLOCKS.items():
        variants = {
            "original": make_block(d, m, n, k, None),
            "acc": make_block(d, m, alpha * n, alpha * k, d // alpha),
            "eff": make_block(d, m, alpha * n, k, d // alpha),
            "fixed": make_block(d, m, n, k, d // alpha),
        }
        with tempfile.TemporaryDirectory() as folder:
            sessions = {}
            for name, block in variants.items():
                export_onnx(block, (torch.zeros(2, 5, d),), {}, path := Path(folder) / f"{name}.onnx", form="measured")
                for ours, library in operators.items():
                    sessions[name + ours] = open_session(path, threads=1, operator=library)
            export_by_torch(d, m, n, k, path := Path(folder) / "by_torch.onnx")
            sessions[BY_TORCH] = open_session(path, threads=1)
        for tokens in TOKENS:
            hidden = np.random.default_rng(tokens).standard_normal((1, tokens, d), dtype=np.float32)
            calls = {
                name: runner(s, {s.get_inputs()[0].name: hidden})
                for name, s in sessions.items()
                if name != BY_TORCH or (sizes, tokens) not in TOO_LARGE
            }
            times = interleaved(calls, SECONDS)
            for name, ms in times.items():
                alike = ms / times["original" + OURS * name.endswith(OURS)]
                row = {"sizes": sizes, "graph": name, "tokens": tokens, "ms": ms, "ratio": ms / times["original"]}
                rows.append({**row, "alike": alike})
    return rows


def make_block(d: int, m: int, n: int, k: int, latent: int | None) -> LatentMoE:
    """A softmax top-k block of silu GLU experts with random weights."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    width = latent or d
    experts = ExpertsSpec(draw(n, m, width), draw(n, width, m), draw(n, m, width))
    projections = None if latent is None else LatentSpec(draw(latent, d), draw(d, latent))
    return LatentMoE(MoESpec(RouterSpec(draw(n, d), k, normalize="sum"), experts, projections))


def export_by_torch(d: int, m: int, n: int, k: int, path: Path) -> None:
    """A block of the same sizes as transformers codes it, exported by PyTorch alone.

    Of its codings torch.onnx takes "batched_mm", which gathers the weights of every chosen expert; "eager" branches on
    data, and "grouped_mm" has no counterpart in ONNX.
    """
    import transformers
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = transformers.Qwen3MoeConfig(
        hidden_size=d, moe_intermediate_size=m, num_experts=n, num_experts_per_tok=k, norm_topk_prob=True
    )
    config._experts_implementation = "batched_mm"
    torch.manual_seed(0)
    block = Qwen3MoeSparseMoeBlock(config).eval()
    with torch.no_grad():
        for weights in block.parameters():
            weights.normal_(std=weights.shape[-1] ** -0.5)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.onnx.export(block, (torch.zeros(2, 5, d),), dynamo=True, dynamic_shapes=(free,), verbose=False)
    assert program is not None
    program.save(path)


def runner(session: onnxruntime.InferenceSession, feeds: Mapping[str, Any]) -> Callable[[], object]:
    """A call of the session on these inputs."""
    return lambda: session.run(None, dict(feeds))


if __name__ == "__main__":
    main()
