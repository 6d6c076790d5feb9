"""MoE blocks from packages that others wrote, tiny and random. Each builder skips where its package is absent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

HIDDEN = 32


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in eval mode with every tensor drawn at a size at which a missing term shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            scale = 0.2 if tensor.dim() >= 2 else 0.1
            offset = 1.0 if tensor.dim() == 1 and ("norm" in name or "gamma" in name or "mult_bias" in name) else 0.0
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale + offset)
        for name, tensor in model.named_buffers():
            if "expert_bias" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return model.eval()


def litgpt_model() -> nn.Module:
    """litgpt's GPT with LLaMAMoE layers: top-k of logits, then softmax; a loop with index masks."""
    pytest.importorskip("litgpt.model", reason="litgpt is not installed")
    from litgpt import GPT, Config

    config = Config.from_name(
        "pythia-14m", n_layer=2, n_embd=HIDDEN, n_head=4, n_expert=8, n_expert_per_token=2, mlp_class_name="LLaMAMoE",
        intermediate_size=48, padded_vocab_size=64, vocab_size=60, block_size=128, bias=False,
    )  # fmt: skip
    return randomise(GPT(config))


def mixture_of_experts_lossless() -> nn.Module:
    """lucidrains' mixture-of-experts: GShard dispatch and combine, with every second expert kept and room for all."""
    package = pytest.importorskip("mixture_of_experts", reason="mixture-of-experts is not installed")
    return randomise(
        package.MoE(HIDDEN, num_experts=8, hidden_dim=48, second_policy_eval="all", capacity_factor_eval=8.0)
    )


def mixture_of_experts_default() -> nn.Module:
    """The same as it comes: second experts kept at random, tokens past a capacity dropped. Not a standard MoE."""
    package = pytest.importorskip("mixture_of_experts", reason="mixture-of-experts is not installed")
    return randomise(package.MoE(HIDDEN, num_experts=8, hidden_dim=48))


def st_moe_lossless() -> nn.Module:
    """lucidrains' ST-MoE with a threshold of zero and room for all: it draws random numbers that change nothing."""
    package = pytest.importorskip("st_moe_pytorch", reason="st-moe-pytorch is not installed")
    return randomise(
        package.MoE(HIDDEN, num_experts=8, expert_hidden_mult=2, threshold_eval=0.0, capacity_factor_eval=8.0)
    )


def soft_moe() -> nn.Module:
    """lucidrains' soft MoE: slots mix tokens. Not a standard MoE."""
    package = pytest.importorskip("soft_moe_pytorch", reason="soft-moe-pytorch is not installed")
    return randomise(package.SoftMoE(HIDDEN, num_experts=4, seq_len=24))


def hidream_block() -> nn.Module:
    """The diffusion transformer HiDream's block: numpy counts, slices and scatter_reduce, as in DeepSeek's code."""
    module = _diffusers("hidream")
    return randomise(module.MOEFeedForwardSwiGLU(HIDDEN, 96, num_routed_experts=8, num_activated_experts=2))


def _diffusers(name: str) -> Any:
    path = f"diffusers.models.transformers.transformer_{name}_image"
    return pytest.importorskip(path, reason="diffusers is not installed", exc_type=Exception)


class _WithTimestep(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, x, x.mean(1))


def nucleus_block() -> nn.Module:
    """The diffusion transformer NucleusMoE's block: experts choose tokens. Not a standard MoE."""
    module = _diffusers("nucleusmoe")
    layer = module.NucleusMoELayer(HIDDEN, 48, num_experts=8, capacity_factor=2.0, use_sigmoid=True, route_scale=1.0)
    return randomise(_WithTimestep(layer))


def torchtitan_bf16() -> nn.Module:
    """torchtitan's MoE with experts stored in bf16, in which it always computes them: group-limited sigmoid routing."""
    model = torchtitan_block()
    model.routed_experts.to(torch.bfloat16)
    return model


def torchtitan_block() -> nn.Module:
    """The same with weights in fp32, which it casts to bf16 in every run: no rewrite in fp32 computes just that."""
    moe = pytest.importorskip("torchtitan.models.common.moe", reason="torchtitan is not installed", exc_type=Exception)
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    config = moe.MoE.Config(
        num_experts=8,
        routed_experts=moe.RoutedExperts.Config(
            inner_experts=moe.GroupedExperts.Config(dim=HIDDEN, hidden_dim=48, num_experts=8),
            token_dispatcher=LocalTokenDispatcher.Config(num_experts=8, top_k=2),
        ),
        router=moe.TokenChoiceTopKRouter.Config(
            num_experts=8, gate=Linear.Config(in_features=HIDDEN, out_features=8, bias=False), top_k=2, route_norm=True,
            num_expert_groups=4, num_limited_groups=2, route_scale=2.0,
        ),
    )  # fmt: skip
    return randomise(config.build())


def hidden_states(batch: int, tokens: int, seed: int) -> tuple[Tensor]:
    return (torch.randn(batch, tokens, HIDDEN, generator=torch.Generator().manual_seed(seed)),)


def token_ids(batch: int, tokens: int, seed: int) -> tuple[Tensor]:
    return (torch.randint(0, 60, (batch, tokens), generator=torch.Generator().manual_seed(seed)),)


#: name -> (builder, inputs(batch, tokens, seed), blocks to be found; 0 refused; None either, largest relative error)
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int, int], tuple[Any, ...]], int | None, float]] = {
    "litgpt": (litgpt_model, token_ids, 2, 1e-4),
    "mixture_of_experts_lossless": (mixture_of_experts_lossless, hidden_states, 1, 1e-4),
    "mixture_of_experts_default": (mixture_of_experts_default, hidden_states, 0, 0.0),
    "st_moe_lossless": (st_moe_lossless, hidden_states, None, 1e-4),
    "soft_moe": (soft_moe, hidden_states, 0, 0.0),
    "hidream": (hidream_block, hidden_states, 1, 1e-4),
    "nucleus": (nucleus_block, hidden_states, 0, 0.0),
    "torchtitan_bf16": (torchtitan_bf16, hidden_states, 1, 2e-2),  # one rounding is 4e-3
    "torchtitan": (torchtitan_block, hidden_states, 0, 0.0),
}
