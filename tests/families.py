"""Every model family that the cache is tried on: a tiny random configuration and the path its layers must take."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import transformers

from mixkvq import compat

PACKED, NATIVE, DECODED = "packed", "native", "dequantized"
VOCABULARY = 97
WINDOW = 48
"""Of sliding windows and chunks: shorter than the prompts of the scenarios."""


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes
    ----------
    name : str
        As in `FAMILIES`.
    config : str
        Name of the configuration's class without "Config".
    fields : dict
        Of the configuration.
    model : str
        Name of the model's class.
    layers : tuple of str
        Path of every layer of the cache once a prompt beyond the window was read; see `paths`.
    attention : tuple of str
        Attention implementations that the family has.
    encoder : str
        Name of what its encoder reads first (the cache is the decoder's half of an `EncoderDecoderCache`), or "".
    since : pair of int
        First version of transformers, if it has the family, in which it works with `DynamicCache`.
    hooked : pair of int
        First version in which it attends through `AttentionInterface`; packed layers are dequantized before.
    """

    name: str
    config: str
    fields: dict[str, Any] = field(repr=False)
    model: str
    layers: tuple[str, ...] = (PACKED, PACKED)
    attention: tuple[str, ...] = ("sdpa", "eager")
    encoder: str = ""
    since: tuple[int, int] = (4, 57)
    hooked: tuple[int, int] = (4, 57)

    def paths(self, attention: str) -> tuple[str, ...]:
        """Path of every layer in the installed transformers, which looks eager attention up from 5.1 on."""
        first = max(self.hooked, (5, 1)) if attention == "eager" else self.hooked
        return (
            self.layers
            if first <= compat.VERSION
            else tuple(DECODED if path == PACKED else path for path in self.layers)
        )

    @property
    def absent(self) -> str:
        """Why the installed transformers cannot run it, or ""."""
        have = ".".join(map(str, compat.VERSION))
        if not hasattr(transformers, f"{self.config}Config"):
            return f"transformers {have} has no {self.config}"
        return "" if self.since <= compat.VERSION else f"{self.config} fails with DynamicCache in transformers {have}"


# ---- fields that many families share -------------------------------------------------------------------------------
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,  # logits that differ by far more than rounding
    "init_std": 0.3,
    "tie_word_embeddings": False,  # or the same token follows for ever
    "sliding_window": None,
}
_GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 1024}
_MPT = {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 1024, "use_cache": True}
_SLIDING = {"sliding_window": WINDOW}
_MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_SHARED = {  # the last two layers read keys and values of the first two
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "layers": (NATIVE, PACKED, NATIVE, NATIVE),
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
}
_MHA = {"num_key_value_heads": 4}
_MLA = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
}
_MOE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
_MAMBA = {  # expand 2 x hidden 64 = 8 heads of 16
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
    "use_mamba_kernels": False,
}
_MAMBA2 = {  # the same by other names
    "ssm_state_size": 8,
    "state_size": 8,
    "mamba_num_heads": 8,
    "num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 1,
    "chunk_size": 16,
}
_BERT = {"is_decoder": True}
_ENCODER = {
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 512,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 1}
_VISION = {
    "depth": 1,
    "embed_dim": 16,
    "hidden_size": 64,
    "out_hidden_size": 64,
    "num_heads": 2,
    "intermediate_size": 16,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
_MROPE = {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
_EAGER = ("eager",)


def _family(name: str, config: str, *changes: dict[str, Any], model: str = "", **more: Any) -> Family:
    """A family with the common shape and these changes: fields of the configuration, and of `Family`."""
    given = {key: value for change in (*changes, more) for key, value in change.items()}
    about = {key: given.pop(key) for key in list(given) if key in Family.__dataclass_fields__}
    every = {key: value for key, value in (_SHAPE | given).items() if value is not ...}  # ... takes a field out
    return Family(name, config, every, model or f"{config.removesuffix('Text')}ForCausalLM", **about)


def _multimodal(name: str, config: str, *changes: dict[str, Any], vision: dict[str, Any], **more: Any) -> Family:
    """A family whose language model has a configuration of its own; it is tried with text."""
    text = _family(name, config, *changes, model=f"{config}ForConditionalGeneration", **more)
    return replace(text, fields={"text_config": text.fields, "vision_config": vision})


def _encoder_decoder(name: str, config: str, *changes: dict[str, Any], **more: Any) -> Family:
    """A family whose decoder has the cache."""
    more = {"encoder": "input_ids", "model": f"{config}ForConditionalGeneration", **more}
    return _family(name, config, *changes, **more)


_LIST = (
    # ---- packed, through the hook, all layers
    _family("llama", "Llama"),
    _family("llama_mha", "Llama", _MHA),
    _family("llama_mqa", "Llama", num_key_value_heads=1),
    _family("llama_dim80", "Llama", head_dim=80),
    _family("apertus", "Apertus"),
    _family("arcee", "Arcee"),
    _family("aria_text", "AriaText", _MOE, moe_num_experts=4, moe_topk=2, model="AriaTextForCausalLM"),
    _family("bert", "Bert", _BERT, model="BertLMHeadModel"),
    _family("biogpt", "BioGpt"),
    _family("bitnet", "BitNet"),
    _family("camembert", "Camembert", _BERT),
    _family("codegen", "CodeGen", _GPT),
    _family("cohere", "Cohere", logit_scale=1.0),
    _family("ctrl", "CTRL", _GPT, dff=96, model="CTRLLMHeadModel"),
    _family(
        "dbrx",
        "Dbrx",
        _MPT,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        ffn_config={"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    _family("dots1", "Dots1", _MOE, first_k_dense_replace=1),
    _family("electra", "Electra", _BERT, embedding_size=64),
    _family("ernie4_5", "Ernie4_5"),
    _family("ernie4_5_moe", "Ernie4_5_Moe", _MOE, moe_num_experts=4, moe_k=2),
    _family("flex_olmo", "FlexOlmo", _MOE),
    _family("gemma", "Gemma"),
    _family("glm", "Glm"),
    _family("glm4", "Glm4"),
    _family("glm4_moe", "Glm4Moe", _MOE),
    _family("gpt2", "GPT2", _GPT, model="GPT2LMHeadModel"),
    _family("gpt_bigcode", "GPTBigCode", _GPT),
    _family("gpt_neox", "GPTNeoX"),
    _family("gptj", "GPTJ", _GPT, hooked=(5, 24)),
    _family("granite", "Granite"),
    _family("granitemoe", "GraniteMoe", _MOE),
    _family("granitemoeshared", "GraniteMoeShared", _MOE, shared_intermediate_size=32),
    _family("helium", "Helium"),
    _family("hunyuan", "HunYuanDenseV1"),
    _family("hunyuan_moe", "HunYuanMoEV1", _MOE),
    _family("hyperclovax", "HyperCLOVAX"),
    _family("jais2", "Jais2"),
    _family("minimax_m2", "MiniMaxM2", _MOE),
    _family("mistral_full", "Mistral"),
    _family("mixtral", "Mixtral", _MOE),
    _family("nanochat", "NanoChat"),
    _family("nemotron", "Nemotron"),
    _family("olmo", "Olmo"),
    _family("olmo2", "Olmo2"),
    _family("olmoe", "Olmoe", _MOE),
    _family("opt", "OPT", ffn_dim=96, word_embed_proj_dim=64),
    _family("persimmon", "Persimmon"),
    _family("phi", "Phi"),
    _family("phi3", "Phi3"),
    _family("phimoe", "Phimoe", _MOE),
    _family("qwen2", "Qwen2"),
    _family("qwen2_moe", "Qwen2Moe", _MOE),
    _multimodal("qwen2_vl", "Qwen2VL", _MROPE, vision=_VISION),
    _multimodal("qwen2_5_vl", "Qwen2_5_VL", _MROPE, vision=_VISION),
    _family("qwen3", "Qwen3"),
    _family("qwen3_moe", "Qwen3Moe", _MOE),
    _multimodal("qwen3_vl", "Qwen3VL", _MROPE, vision=_VISION),
    _family("roberta", "Roberta", _BERT),
    _family("seed_oss", "SeedOss"),
    _family("smollm3", "SmolLM3"),
    _family("solar_open", "SolarOpen", _MOE),
    _family("stablelm", "StableLm"),
    _family("starcoder2", "Starcoder2"),
    _encoder_decoder("bart", "Bart", _ENCODER),
    _encoder_decoder("blenderbot", "Blenderbot", _ENCODER),
    _encoder_decoder("m2m_100", "M2M100", _ENCODER),
    _encoder_decoder("marian", "Marian", _ENCODER, model="MarianMTModel"),
    _encoder_decoder("mbart", "MBart", _ENCODER),
    _encoder_decoder("pegasus", "Pegasus", _ENCODER),
    _encoder_decoder(
        "whisper", "Whisper", _ENCODER, encoder="input_features", max_source_positions=24, max_target_positions=512
    ),
    # ---- packed on full layers, transformers' own sliding or chunked layers elsewhere
    _family("cohere2", "Cohere2", _MIXED, logit_scale=1.0, layers=(NATIVE, PACKED)),
    _family("cwm", "Cwm", _MIXED, layers=(NATIVE, PACKED)),
    _family("exaone4", "Exaone4", _MIXED, layers=(NATIVE, PACKED)),
    _family("gemma2", "Gemma2", _MIXED, query_pre_attn_scalar=16, layers=(NATIVE, PACKED), attention=_EAGER),
    _family("gemma3", "Gemma3Text", _MIXED, query_pre_attn_scalar=16, layers=(NATIVE, PACKED)),
    _family(
        "gemma3n", "Gemma3nText", _SHARED, altup_num_inputs=2, laurel_rank=8, activation_sparsity_pattern=[0.0] * 4
    ),
    _family("gemma4", "Gemma4Text", _SHARED, global_head_dim=32),
    _family("gpt_oss", "GptOss", _MIXED, _MOE, layers=(NATIVE, PACKED), attention=_EAGER),
    _family(
        "llama4",
        "Llama4Text",
        _MOE,
        attention_chunk_size=WINDOW,
        no_rope_layers=[1, 0],
        intermediate_size_mlp=96,
        layers=(NATIVE, PACKED),
    ),
    _family("ministral", "Ministral", _MIXED, layers=(NATIVE, PACKED)),
    _family("modernbert_decoder", "ModernBertDecoder", _MIXED, layers=(NATIVE, PACKED)),
    _family("olmo3", "Olmo3", _MIXED, layers=(NATIVE, PACKED)),
    _family("vaultgemma", "VaultGemma", _MIXED, query_pre_attn_scalar=16, layers=(NATIVE, PACKED), attention=_EAGER),
    # ---- packed on attention layers, transformers' own linear layers elsewhere
    _family("bamba", "Bamba", _MAMBA, attn_layer_indices=[1], layers=(NATIVE, PACKED)),
    _family("falcon_h1", "FalconH1", _MAMBA, mamba_d_ssm=128, layers=(PACKED, PACKED)),
    _family(
        "granitemoehybrid",
        "GraniteMoeHybrid",
        _MAMBA,
        _MOE,
        layer_types=["mamba", "attention"],
        layers=(NATIVE, PACKED),
    ),
    _family("jamba", "Jamba", _MAMBA, _MOE, attn_layer_period=2, attn_layer_offset=1, layers=(NATIVE, PACKED)),
    _family("lfm2", "Lfm2", layer_types=["conv", "full_attention"], layers=(NATIVE, PACKED)),
    _family("lfm2_moe", "Lfm2Moe", _MOE, layer_types=["conv", "full_attention"], layers=(NATIVE, PACKED)),
    _family(
        "nemotron_h", "NemotronH", _MAMBA2, _MOE, layers_block_type=["mamba", "attention"], layers=(NATIVE, PACKED)
    ),
    _family("olmo_hybrid", "OlmoHybrid", _LINEAR, layers=(NATIVE, PACKED)),
    _family("qwen3_5", "Qwen3_5Text", _LINEAR, layers=(NATIVE, PACKED)),
    _family("qwen3_5_moe", "Qwen3_5MoeText", _LINEAR, _MOE, layers=(NATIVE, PACKED)),
    _family("qwen3_next", "Qwen3Next", _LINEAR, _MOE, layers=(NATIVE, PACKED)),
    _family("zamba2", "Zamba2", _MAMBA, layers_block_type=["mamba", "hybrid"], layers=(NATIVE, PACKED)),
    # ---- native: all layers windowed or linear
    _family("falcon_mamba", "FalconMamba", layers=(NATIVE, NATIVE), attention=_EAGER),
    _family("mamba", "Mamba", layers=(NATIVE, NATIVE), attention=_EAGER),
    _family("mamba2", "Mamba2", _MAMBA2, layers=(NATIVE, NATIVE), attention=_EAGER),
    _family("mistral", "Mistral", _SLIDING, layers=(NATIVE, NATIVE)),
    _family(
        "recurrent_gemma",
        "RecurrentGemma",
        _SLIDING,
        num_hidden_layers=3,
        attention_window_size=WINDOW,
        layers=(NATIVE, NATIVE, NATIVE),
    ),
    # ---- dequantized: no AttentionInterface, or values that change after `update`, or a position bias
    _family("bloom", "Bloom", _GPT, layers=(DECODED, DECODED), attention=_EAGER),
    _family("diffllama", "DiffLlama", layers=(DECODED, DECODED)),
    _family("falcon", "Falcon", head_dim=..., layers=(DECODED, DECODED)),
    _family("falcon_alibi", "Falcon", head_dim=..., alibi=True, layers=(DECODED, DECODED)),
    _family(
        "gpt_neo",
        "GPTNeo",
        num_layers=2,
        attention_types=[[["global", "local"], 1]],
        window_size=WINDOW,
        layers=(DECODED, DECODED),
        attention=_EAGER,
    ),
    _family("jetmoe", "JetMoe", layers=(DECODED, DECODED)),
    _family("mpt", "Mpt", _MPT, layers=(DECODED, DECODED), attention=_EAGER),
    _family("xglm", "XGLM", layers=(DECODED, DECODED), attention=_EAGER),
    _encoder_decoder("t5", "T5", _T5, layers=(DECODED, DECODED)),
    # ---- native: latent (MLA) attention
    _family("deepseek_v2", "DeepseekV2", _MLA, _MOE, layers=(NATIVE, NATIVE)),
    _family("deepseek_v3", "DeepseekV3", _MLA, _MOE, layers=(NATIVE, NATIVE)),
    _family("glm4_moe_lite", "Glm4MoeLite", _MLA, _MOE, layers=(NATIVE, NATIVE)),
    _family(
        "kimi_linear",
        "KimiLinear",
        _MLA,
        _MOE,
        _LINEAR,
        linear_head_dim=16,
        linear_num_heads=4,
        layers=(NATIVE, NATIVE),
    ),
    _family("longcat_flash", "LongcatFlash", _MLA, _MOE, layers=(NATIVE, NATIVE)),
    _family("mimo_v2_flash", "MiMoV2Flash", _MIXED, _MOE, v_head_dim=8, layers=(NATIVE, NATIVE), attention=_EAGER),
    _family("minicpm3", "MiniCPM3", _MLA, layers=(NATIVE, NATIVE)),
)
FAMILIES: dict[str, Family] = {family.name: family for family in _LIST}
"""All families by name."""
