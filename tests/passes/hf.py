"""Tiny, fully random models of the MoE families that the installed transformers ships, for runs without a network.

`build(family)` gives an eval-mode model, `inputs()` its example keyword arguments. A family is a model type; of a
multi-modal family it is the language part. Sizes are set by the name of the configuration's field; what a family needs
besides is in SPECIAL.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, VOCAB = 32, 24, 8, 2, 97

#: Configuration field -> tiny value, wherever a configuration has that field.
TINY: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "moe_intermediate_size": INTERMEDIATE,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    # experts
    "num_experts": EXPERTS, "num_local_experts": EXPERTS, "n_routed_experts": EXPERTS, "moe_num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K, "moe_topk": TOP_K, "moe_k": TOP_K, "top_k_experts": TOP_K,
    "moe_top_k": TOP_K, "num_experts_per_token": TOP_K, "experts_top_k": TOP_K,
    "n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "n_shared_experts": 1,
    "num_shared_experts": 1, "moe_num_shared_experts": 1, "shared_expert_intermediate_size": 40,
    "shared_intermediate_size": 40, "moe_shared_expert_intermediate_size": 40,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "first_num_dense_layers": 1, "moe_layer_start_index": 0, "moe_layer_interval": 1, "moe_layer_freq": 1,
    "mlp_layer_types": ["dense", "sparse"], "expert_layer_period": 1, "expert_layer_offset": 0,
    "router_hidden_size": 16,
    # multi-head latent attention
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "qk_head_dim": 16, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4,
    # state-space and linear attention
    "mamba_d_state": 4, "mamba_dt_rank": 4, "mamba_d_conv": 4, "mamba_num_heads": 4, "mamba_head_dim": 16,
    "n_groups": 2,
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_chunk_size": 8,
    "ssm_state_size": 8, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "block_size": 8, "sliding_window": 8,
}  # fmt: skip

_MLA = {"num_key_value_heads": 4, "head_dim": 8}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0]}}
_FULL = {"layer_types": ["full_attention", "full_attention"]}

#: Family -> what it needs besides TINY.
SPECIAL: dict[str, dict[str, Any]] = {
    "afmoe": {"route_scale": 2.0},
    "axk1": _MLA,
    "axk2": _MLA,
        "dbrx": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "attn_config": {"kv_n_heads": 2,
        "clip_qkv": 8.0, "rope_theta": 10000.0}, "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 24,
        "moe_num_experts": 8, "moe_top_k": 2, "moe_normalize_expert_weights": 1.0}},
    "deepseek_ocr2_text": {"num_key_value_heads": 4},
    "deepseek_v2": {**_MLA, "topk_method": "group_limited_greedy"},
    "deepseek_v3": _MLA,
    "deepseek_v32": _MLA,
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"]},
    "doge": {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 4},
    "dots3_note_text": _MLA,
    "ernie4_5_vl_moe_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
                             "moe_intermediate_size": [24, 24], "mlp_layer_types": ["sparse", "sparse"]},
    "gemma4_text": {**_FULL, "enable_moe_block": True, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 97, "global_head_dim": 8},
    "glm4_moe_lite": _MLA,
    "glm4v_moe_text": _MROPE,
    "glm5_next_text": {**_MLA, "index_topk": 16, "qk_rope_head_dim": 0, "qk_head_dim": 8},
    "glm_moe_dsa": _MLA,
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"]},
    "inkling_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "rel_extent": 64},
    "jetmoe": {"kv_channels": 8},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4, "num_key_value_heads": 4},
    "lfm2_moe": {**_FULL, "use_expert_bias": True, "routed_scaling_factor": 1.5},
    "llama4_text": {**_FULL, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1,
        "no_rope_layers": [1, 1]},
    "longcat_flash": {**_MLA, "num_layers": 2, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 24,
        "zero_expert_num": 4},
    "mistral4": {"num_key_value_heads": 4},
    "mistral_large4_text": _MLA,
    "muse_spark_text": {"moe_hidden_size": 16},
    "nemotron_h": {"layers_block_type": ["moe", "attention"], "n_group": 2, "topk_group": 1},
    "nllb-moe": {"encoder_layers": 2, "decoder_layers": 2, "encoder_sparse_step": 2, "decoder_sparse_step": 2,
        "d_model": 32, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4},
    "phimoe": {"router_jitter_noise": 0.01, "input_jitter_noise": 0.01},
    "qwen3_next": _FULL,
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 40},
    "step3p5": {"share_expert_dim": 40},
    "switch_transformers": {"d_model": 32, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_heads": 4},
    "unlimited_ocr_text": {"num_key_value_heads": 4},
    "vitpose_backbone": {"image_size": [32, 24], "patch_size": [8, 8], "num_experts": 4, "part_features": 8},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

#: Every MoE family of transformers 5.23 by model type.
FAMILIES = (
    "afmoe", "aria_text", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "dbrx", "deepseek_ocr2_text",
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "diffusion_gemma_text", "doge", "dots1",
    "dots3_note_text", "ernie4_5_moe", "ernie4_5_vl_moe_text", "exaone_moe", "flex_olmo", "flint", "gemma4_text",
    "glm4_moe", "glm4_moe_lite", "glm4v_moe_text", "glm5_next_text", "glm_moe_dsa", "gpt_oss", "granitemoe",
    "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "hy_v4", "inkling_text",
    "inkling2_text", "jamba", "jetmoe", "kimi_linear", "kolibri1", "laguna", "lfm2_moe", "llama4_text",
    "longcat_flash", "mellum", "mimo_v2_flash", "minimax", "minimax_m2", "minimax_m3_vl_text", "mistral4",
    "mistral_large4_text", "mixtral", "muse_spark_text", "nemotron_h", "nllb-moe", "olmoe", "openai_privacy_filter",
    "phimoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "qwen3_omni_moe_text",
    "qwen3_omni_moe_talker_text", "qwen3_vl_moe_text", "qwen4_exp_text", "solar_open", "step3p5", "switch_transformers",
    "unlimited_ocr_text", "vitpose_backbone", "zaya",
)  # fmt: skip


def config_class(family: str) -> type[Any]:
    """The configuration class of a model type, registered or not."""
    from transformers import CONFIG_MAPPING

    if family in CONFIG_MAPPING:
        return CONFIG_MAPPING[family]
    for folder in _folders(family):
        module = importlib.import_module(f"transformers.models.{folder}.configuration_{folder}")
        for value in vars(module).values():
            if isinstance(value, type) and getattr(value, "model_type", None) == family:
                return value
    raise KeyError(family)


def _folders(family: str) -> list[str]:
    parts = family.replace("-", "_").split("_")
    names = ["_".join(parts[:n]) for n in range(len(parts), 0, -1)] + ["step3p7"]
    return [n for n in names if importlib.util.find_spec(f"transformers.models.{n}")]


def configure(family: str, **overrides: Any) -> Any:
    """A tiny configuration of the family."""
    cls = config_class(family)
    names = {f.name for f in dataclasses.fields(cls)}
    values = {name: value for name, value in TINY.items() if name in names}
    return cls(**{**values, **SPECIAL.get(family, {}), **overrides})


def model_class(config: Any) -> type[nn.Module]:
    """The causal language model of a configuration, else its sequence-to-sequence model, else its base model."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    for auto in (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModel):
        if type(config) in auto._model_mapping:
            found = auto._model_mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    classes = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, nn.Module)]
    classes = [c for c in classes if getattr(c, "config_class", None) is type(config)]
    classes = [c for c in classes if not c.__name__.endswith(("PreTrainedModel", "Encoder"))]
    return min(classes, key=lambda c: "ForCausalLM" not in c.__name__)


def build(family: str, experts_implementation: str | None = None, seed: int = 0, **overrides: Any) -> nn.Module:
    """A tiny random model of the family in eval mode, fp32."""
    torch.manual_seed(seed)
    config = configure(family, **overrides)
    kwargs = {} if experts_implementation is None else {"experts_implementation": experts_implementation}
    model = model_class(config)._from_config(config, attn_implementation="eager", **kwargs).float().eval()
    randomise(model, seed + 1)
    return model


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Draw every weight, and every selection bias, at a size at which a missing term shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        if tensor.dim() >= 2:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
        elif "norm" not in name.lower():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    for name, tensor in model.named_buffers():
        if "correction_bias" in name or "expert_bias" in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)


def inputs(model: nn.Module, batch: int = 2, tokens: int = 12, seed: int = 0) -> dict[str, Any]:
    """Example keyword arguments: token ids [batch, tokens], or pixels, without a cache."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    if model.main_input_name == "pixel_values":
        size = config.image_size if isinstance(config.image_size, (list, tuple)) else (config.image_size,) * 2
        pixels = torch.randn(batch, config.num_channels, *size, generator=generator)
        return {"pixel_values": pixels, "dataset_index": torch.arange(batch) % config.num_experts}
    ids = torch.randint(3, VOCAB, (batch, tokens), generator=generator)
    if not hasattr(model, "embed_tokens") and hasattr(model, "codec_embedding"):
        return {"inputs_embeds": torch.randn(batch, tokens, HIDDEN, generator=generator), "use_cache": False}
    if config.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1), "use_cache": False}
    return {"input_ids": ids, "use_cache": False}


def main_output(result: Any) -> Tensor:
    """Logits, or the last hidden state."""
    for name in ("logits", "last_hidden_state", "feature_maps"):
        found = getattr(result, name, None)
        if found is not None:
            return found if isinstance(found, Tensor) else found[0]
    return result[0]
