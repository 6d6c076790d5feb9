"""Other architectures, with shared experts: trained on the sample's text, converted, healed or their experts refitted.

    python benchmarks/second.py                                       train all (minutes), then convert without healing
    python benchmarks/second.py --family glm4_moe --compression 2 --steps 1200
    python benchmarks/second.py --variant fixed acc --refit no --heal 400                 healed (half an hour)

Glm4Moe has a plain shared expert, sigmoid scores with a selection bias and groups; Qwen2Moe one with a gate, and
softmax scores; NemotronH ungated relu² experts, sigmoid scores and a plain shared expert. d 64, two blocks of 16
experts of which 4 work, m 64, shared experts of 128 neurons. A conversion reads 16 calibration batches unless it is
healed. Nothing is tuned on these models.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "samples"))

import stdlib_lm
import torch
import torch.nn.functional as F
from measured import keep_each
from torch import nn

import latentize

BATCHES = 16
RATE, WARMUP = 3e-3, 0.05
SIZES = {
    "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "head_dim": 16, "intermediate_size": 128, "moe_intermediate_size": 64, "num_experts_per_tok": 4,
    "max_position_embeddings": 256, "norm_topk_prob": True, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "glm4_moe": {
        "n_routed_experts": 16, "n_shared_experts": 2, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 0,
        "routed_scaling_factor": 1.0,
    },
    "qwen2_moe": {"num_experts": 16, "shared_expert_intermediate_size": 128, "decoder_sparse_step": 1},
    "nemotron_h": {
        "layers_block_type": ["full_attention", "moe"] * 2, "n_routed_experts": 16, "n_group": 1, "topk_group": 1,
        "moe_shared_expert_intermediate_size": 128, "routed_scaling_factor": 1.0, "mamba_num_heads": 8,
        "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 16,
    },
}  # fmt: skip
COLUMNS = {
    "family": "", "variant": "", "compression": "g", "heal": "d", "refit": "", "original": ".4f",
    "bits_per_byte": ".4f", "rise_percent": "+.2f", "sum_error": ".4f", "sum_error_refitted": ".4f",
    "bytes_added": "d", "seconds": ".0f",
}  # fmt: skip


def main() -> None:
    """Train, convert, print the table, keep the rows."""
    options = _options()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    keep_each("second", _rows(options), ("family", "variant", "compression", "heal", "refit", "seed"), COLUMNS)


def trained(family: str, steps: int, seed: int = 0) -> nn.Module:
    """A small model of the family, trained for so many batches of the sample's calibration text."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**SIZES, **FAMILIES[family])
    model: nn.Module = AutoModelForCausalLM.from_config(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    epochs = (stdlib_lm.calibration_data(seed + 1 + epoch) for epoch in itertools.count())
    for step, inputs in enumerate(itertools.islice(itertools.chain.from_iterable(epochs), steps)):
        rise = min(1.0, (step + 1) / (WARMUP * steps))
        for group in optimizer.param_groups:
            group["lr"] = RATE * rise * 0.5 * (1.0 + math.cos(math.pi * step / steps))
        logits = model(**inputs).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), inputs["input_ids"][:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def _rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for family in options.family:
        started = time.process_time()
        model = trained(family, options.steps, options.seed)
        original = stdlib_lm.evaluate(model)["bits per byte"]
        print(f"{family}: {original:.4f} bits per byte after {time.process_time() - started:.0f} s", flush=True)
        for variant, compression, refit in itertools.product(options.variant, options.compression, options.refit):
            recipe = latentize.Recipe(
                compression=compression, variant=variant, heal_steps=options.heal, seed=options.seed,
                refit_shared=refit == "yes",
            )  # fmt: skip
            yield {"family": family, "train_steps": options.steps, "heal": options.heal, "seed": options.seed} | (
                _measure(model, recipe, original)
            )


def _measure(model: nn.Module, recipe: latentize.Recipe, original: float) -> dict[str, Any]:
    started = time.process_time()
    count = BATCHES if recipe.heal_steps == 0 else stdlib_lm.CALIBRATION_BATCHES
    batches = list(itertools.islice(stdlib_lm.calibration_data(recipe.seed), count))
    result = latentize.convert(model, kwargs=stdlib_lm.example_inputs(), recipe=recipe, calibration=batches)
    seconds = time.process_time() - started
    bits = stdlib_lm.evaluate(result.model)["bits per byte"]
    kept = [refit for refit in result.refits.values() if refit.kept]
    return {
        "variant": recipe.variant, "compression": recipe.compression, "original": original, "bits_per_byte": bits,
        "rise_percent": 100 * (bits / original - 1),
        "refit": f"{len(kept)} of {len(result.plan)}" if recipe.refit_shared else "–",
        "sum_error": _mean([refit.error_before for refit in kept]),
        "sum_error_refitted": _mean([refit.error_after for refit in kept]),
        "bytes_added": sum(tensor.nbytes for tensor in result.model.state_dict().values()) - _plain(model, recipe),
        "seconds": seconds,
    }  # fmt: skip


def _plain(model: nn.Module, recipe: latentize.Recipe) -> int:
    """Bytes of the same conversion without a refit, from the weights alone."""
    plain = recipe.model_copy(update={"refit_shared": False, "init": "weights", "heal_steps": 0})
    result = latentize.convert(model, kwargs=stdlib_lm.example_inputs(), recipe=plain)
    return sum(tensor.nbytes for tensor in result.model.state_dict().values())


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--variant", nargs="+", choices=["fixed", "acc", "eff"], default=["fixed"])
    parser.add_argument("--refit", nargs="+", choices=["no", "yes"], default=["no", "yes"], help="of shared experts")
    parser.add_argument("--compression", type=float, nargs="+", default=[2.0, 4.0])
    parser.add_argument("--steps", type=int, default=1200, help="of training")
    parser.add_argument("--heal", type=int, default=0, help="steps of healing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
