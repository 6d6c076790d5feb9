"""MoE blocks from packages that others wrote, tiny and random. Each builder skips where its package is absent.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

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


def mistral_layer() -> nn.Module:
    """mistral-inference's MoeLayer: a loop over all experts with torch.where, on rows of tokens."""
    moe = pytest.importorskip("mistral_inference.moe", reason="mistral-inference is not installed")
    experts = [nn.Sequential(nn.Linear(HIDDEN, 48), nn.SiLU(), nn.Linear(48, HIDDEN)) for _ in range(8)]
    return randomise(moe.MoeLayer(experts, nn.Linear(HIDDEN, 8, bias=False), moe.MoeArgs(8, 2)))


def transformer_lens_layer() -> nn.Module:
    """TransformerLens 2's MoE: one-hot masks, hooks on weights and indices."""
    moe = pytest.importorskip("transformer_lens.components.mlps.moe", reason="transformer-lens 2 is not installed")
    from transformer_lens.HookedTransformerConfig import HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=1, d_model=HIDDEN, n_ctx=64, d_head=8, n_heads=4, d_mlp=48, act_fn="silu", gated_mlp=True,
        num_experts=8, experts_per_token=2, device="cpu", d_vocab=60,
    )  # fmt: skip
    return randomise(moe.MoE(config))


def _process_group() -> None:
    """A process group of this process alone, which some packages cannot do without."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)


def llama_models_block(top_k: int = 1) -> nn.Module:
    """llama-models' Llama 4: all experts on all tokens, their inputs weighted, by zero where they are not selected."""
    pytest.importorskip("fairscale.nn.model_parallel", reason="fairscale is not installed")
    moe = pytest.importorskip("llama_models.llama4.moe", reason="llama-models is not installed")
    from fairscale.nn.model_parallel import initialize
    from llama_models.llama4.args import MoEArgs

    _process_group()
    if not initialize.model_parallel_is_initialized():
        initialize.initialize_model_parallel(1)
    args = MoEArgs(num_experts=8, top_k=top_k, auto_scale_F=False)
    return randomise(moe.MoE(HIDDEN, 72, 1.0, 8, args))


def llama_models_top2() -> nn.Module:
    """The same with two experts for each token."""
    return llama_models_block(2)


def automodel_block(experts: str = "torch") -> nn.Module:
    """nemo-automodel's MoE: groups of experts, a loop with gather and scatter_add, weights between up and down."""
    config = pytest.importorskip("nemo_automodel.components.moe.config", reason="nemo-automodel is not installed")
    from nemo_automodel.components.models.common import BackendConfig
    from nemo_automodel.components.moe.layers import MoE

    sizes = config.MoEConfig(
        n_routed_experts=8, n_shared_experts=1, n_activated_experts=2, n_expert_groups=4, n_limited_groups=2,
        train_gate=False, gate_bias_update_factor=0.0, aux_loss_coeff=0.0, score_func="sigmoid", route_scale=2.0,
        dim=HIDDEN, inter_dim=64, moe_inter_dim=48, norm_topk_prob=True, dtype=torch.float32,
    )  # fmt: skip
    backend = BackendConfig(
        linear="torch", attn="sdpa", rms_norm="torch", experts=experts, dispatcher="torch",
        enable_hf_state_dict_adapter=False,
    )  # fmt: skip
    return randomise(MoE(sizes, backend))


def automodel_grouped() -> nn.Module:
    """The same with permuted tokens and grouped products."""
    return automodel_block("torch_mm")


def olmo_block(latent: int | None = None, scores: str = "softmax") -> nn.Module:
    """olmo-core's OLMo 3 MoE: experts apart, stacked in each run for grouped products, or a loop where those fail."""
    path = "olmo_core.nn.moe.v2.hf.modeling_olmo3moe"
    moe = pytest.importorskip(path, reason="ai2-olmo-core is not installed", exc_type=Exception)
    config = SimpleNamespace(
        hidden_size=HIDDEN, n_routed_experts=8, num_experts_per_tok=2, original_num_experts_per_tok=None,
        gating_function=scores, normalize_expert_weights=1.0, restore_weight_scale=True, latent_moe_dim=latent,
        moe_intermediate_size=48, hidden_act="silu", shared_expert_intermediate_size=24, latent_moe_bias=False,
        latent_moe_up_proj_input_norm=False, rms_norm_eps=1e-6,
    )  # fmt: skip
    return randomise(moe.Olmo3MoeSparseMLP(config))


class _OffCuda(nn.Module):
    """Megatron's router moves its weight to the CUDA device; on a machine without one it stays."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        with mock.patch("torch.cuda.current_device", return_value=torch.device("cpu")):
            return self.layer(x)[0]


def megatron_layer() -> nn.Module:
    """megatron-core's MoELayer: a routing map, tokens permuted by it and back, experts by run-time splits."""
    specs = pytest.importorskip("megatron.core.models.gpt.moe_module_specs", reason="megatron-core is not installed")
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    _process_group()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(1, 1)
    if not hasattr(moe_utils, "te_general_gemm"):  # 0.16 asks for it where it was not imported
        moe_utils.te_general_gemm = None
    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=4, num_moe_experts=8, moe_router_topk=2,
        moe_ffn_hidden_size=48, ffn_hidden_size=48, moe_router_load_balancing_type="none", use_cpu_initialization=True,
        moe_token_dispatcher_type="allgather", add_bias_linear=False, gated_linear_unit=True, hidden_dropout=0.0,
        activation_func=nn.functional.silu, bias_activation_fusion=False, moe_grouped_gemm=False,
    )  # fmt: skip
    spec = specs.get_moe_module_spec(use_te=False, num_experts=8, moe_grouped_gemm=False)
    return randomise(_OffCuda(build_module(spec, config=config)))


class _AllTokensUsed(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, None)


def deepspeed_module(**options: Any) -> nn.Module:
    """deepspeed's MoE: the module around its layer returns what the layer has left in itself."""
    layer = pytest.importorskip("deepspeed.moe.layer", reason="deepspeed is not installed", exc_type=Exception)
    from deepspeed import comm

    _process_group()
    comm.init_distributed("gloo", dist_init_required=False)
    expert = nn.Sequential(nn.Linear(HIDDEN, 48), nn.GELU(), nn.Linear(48, HIDDEN))
    settings = {"k": 2, "eval_capacity_factor": 8.0, "min_capacity": 0, "use_rts": False} | options
    settings["top2_2nd_expert_sampling"] = False  # which draws random numbers, in evaluation too
    model = layer.MoE(HIDDEN, expert, num_experts=8, **settings)
    model.set_deepspeed_parallelism()
    return randomise(model)


def deepspeed_layer(**options: Any) -> nn.Module:
    """deepspeed's layer itself: GShard's dispatch and combine, room for all tokens."""
    return _AllTokensUsed(deepspeed_module(**options).deepspeed_moe).eval()


def deepspeed_dropless() -> nn.Module:
    """The same with four experts for each token and a capacity that the run decides."""
    return deepspeed_layer(k=4, drop_tokens=False)


def deepspeed_dropping() -> nn.Module:
    """The same with an average capacity: tokens past it are dropped. Not a standard MoE."""
    return deepspeed_layer(k=1, eval_capacity_factor=1.0)


class _WithCentroids(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("centroids", torch.randn(8, HIDDEN, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, self.centroids)


def moirai_layer() -> nn.Module:
    """uni2ts' Moirai-MoE: the experts whose centroids are farthest from a token. Not a standard MoE."""
    ffn = pytest.importorskip("uni2ts.module.ffn", reason="uni2ts is not installed")
    return randomise(_WithCentroids(ffn.MoEFeedForward(8, 2, HIDDEN, 48, HIDDEN)))


def fairscale_layer() -> nn.Module:
    """fairscale's MOELayer: noise in its gate, tokens past a capacity dropped. Not a standard MoE."""
    moe = pytest.importorskip("fairscale.nn.moe", reason="fairscale is not installed")
    _process_group()
    experts = [nn.Sequential(nn.Linear(HIDDEN, 48), nn.ReLU(), nn.Linear(48, HIDDEN)) for _ in range(8)]
    return randomise(moe.MOELayer(moe.Top2Gate(HIDDEN, 8), nn.ModuleList(experts)))


def esmoe_block() -> nn.Module:
    """esmoe's block for detectors: a router of pooled images over experts that are convolutions. Not a standard MoE."""
    package = pytest.importorskip("esmoe", reason="esmoe is not installed")
    return randomise(package.ESMoE(4, 2, channels=HIDDEN))


def latent_moe_block() -> nn.Module:
    """latent-moe's LatentMoE: latent already."""
    package = pytest.importorskip("latent_moe.main", reason="latent-moe is not installed")
    config = package.LatentMoEConfig(d=HIDDEN, m=48, n_experts=4, top_k=2, alpha=2, n_shared=1, device="cpu")
    return randomise(package.LatentMoE(config))


def olmo_latent() -> nn.Module:
    """olmo-core's block with its own latent projections."""
    return olmo_block(latent=16)


def rows(batch: int, tokens: int, seed: int) -> tuple[Tensor]:
    return (hidden_states(batch, tokens, seed)[0].reshape(-1, HIDDEN),)


def eight_sequences(batch: int, tokens: int, seed: int) -> tuple[Tensor]:
    return hidden_states(8, batch * tokens, seed)


def images(batch: int, tokens: int, seed: int) -> tuple[Tensor]:
    return (hidden_states(batch * tokens, 64, seed)[0].mT.reshape(-1, HIDDEN, 8, 8),)


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
    "mistral_inference": (mistral_layer, rows, 1, 1e-4),
    "transformer_lens": (transformer_lens_layer, hidden_states, 1, 1e-4),
    "llama_models": (llama_models_block, hidden_states, 1, 1e-4),
    "llama_models_top2": (llama_models_top2, hidden_states, 1, 1e-4),
    "nemo_automodel": (automodel_block, hidden_states, 1, 1e-4),
    "nemo_automodel_grouped": (automodel_grouped, hidden_states, 1, 1e-4),
    "olmo_core": (olmo_block, hidden_states, 1, 1e-4),
    "megatron_core": (megatron_layer, hidden_states, 1, 1e-4),
    "deepspeed": (deepspeed_layer, hidden_states, 1, 1e-4),
    "deepspeed_dropless": (deepspeed_dropless, hidden_states, 1, 1e-4),
    "deepspeed_dropping": (deepspeed_dropping, hidden_states, 0, 0.0),
    "deepspeed_module": (deepspeed_module, hidden_states, 0, 0.0),
    "uni2ts": (moirai_layer, hidden_states, 0, 0.0),
    "fairscale": (fairscale_layer, eight_sequences, 0, 0.0),
    "esmoe": (esmoe_block, images, 0, 0.0),
}

#: What a person reads of a block that is refused: name -> part of the reason.
REASONS = {
    "mixture_of_experts_default": "random numbers",
    "nucleus": "selects tokens for each expert",
    "deepspeed_dropping": "capacity",
    "deepspeed_module": "'l_aux'",
    "uni2ts": "distance",
    "fairscale": "random numbers",
    "esmoe": "more than one projection",
}

#: name -> builder of a block that is latent already, on `hidden_states`.
LATENT: dict[str, Callable[[], nn.Module]] = {"latent_moe": latent_moe_block, "olmo_core": olmo_latent}
