"""A random Qwen3-MoE of 226 or 884 MiB, large beside what a conversion holds whatever the model: `steps.py --large`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

VOCABULARY = 256
#: Sequences and tokens of the example inputs, and of each of the calibration batches.
EXAMPLE, BATCH, BATCHES = (2, 64), (4, 256), 4


def build_model(hidden_size: int = 512, intermediate_size: int = 384) -> nn.Module:
    """Three layers of 32 experts, the best 8 of them selected."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=hidden_size, moe_intermediate_size=intermediate_size,
        intermediate_size=intermediate_size, num_hidden_layers=3,
        num_experts=32, num_experts_per_tok=8, num_attention_heads=8, num_key_value_heads=4, head_dim=64,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


def build_larger_model() -> nn.Module:
    """The same at twice the widths, four times the bytes."""
    return build_model(1024, 768)


def example_inputs() -> dict[str, object]:
    """Random tokens."""
    return _inputs(EXAMPLE, 1)


def calibration_data() -> list[dict[str, object]]:
    """Batches of random tokens."""
    return [_inputs(BATCH, 2 + number) for number in range(BATCHES)]


def _inputs(shape: tuple[int, int], seed: int) -> dict[str, object]:
    ids: Tensor = torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "use_cache": False}
