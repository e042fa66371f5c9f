"""Every model family that the cache is tried on: a tiny random configuration and the path its layers must take."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import transformers
from family_fields import (
    ALL_DECODED,
    ALL_NATIVE,
    BERT,
    CHUNKED,
    CLIP,
    COMPRESSED,
    DBRX,
    DECODED,
    ENCODER,
    FSMT,
    GPT,
    GRANITE,
    INDEXED,
    INKLING,
    LED,
    LINEAR,
    MAMBA,
    MAMBA2,
    MHA,
    MIXED,
    MLA,
    MOE,
    MOONSHINE,
    MPT,
    MROPE,
    NATIVE,
    NEO,
    NOTHING,
    PACKED,
    PAIRS,
    PIXTRAL,
    SHAPE,
    SHARED,
    SLIDING,
    T5,
    VISION,
    WHISPER,
)

from mixkvq import compat

EAGER = ("eager",)


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
        First version of those tried in which it works with `DynamicCache`, if that has the family.
    hooked : pair of int
        First version of those tried in which it attends through `AttentionInterface`; packed layers are dequantized
        before.
    reads : bool
        Whether the model reads keys or values besides attention, so that packed layers too are decoded in every step.
    told : bool
        Whether the cache must be given the model's configuration.
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
    reads: bool = False
    told: bool = False

    def paths(self, attention: str) -> tuple[str, ...]:
        """Path of every layer in the installed transformers."""
        unseen = self.hooked > compat.VERSION or (attention == "eager" and not compat.SEES_EAGER)
        names = {PACKED: DECODED if unseen else PACKED, NOTHING: NATIVE}
        layers = (path for path in self.layers if path != NOTHING or compat.DummyLayer is not None)
        return tuple(names.get(path, path) for path in layers)

    def absent(self, attention: str) -> str:
        """Why the installed transformers cannot run it, or ""."""
        have = ".".join(map(str, compat.VERSION))
        if not hasattr(transformers, f"{self.config}Config"):
            return f"transformers {have} has no {self.config}"
        if attention == "sdpa" and not getattr(transformers, self.model)._supports_sdpa:
            return f"transformers {have} has no sdpa attention for {self.config}"
        return (
            ""
            if self.since <= compat.VERSION
            else f"transformers {have} uses the cache of {self.config} in a way of its own"
        )


def _family(name: str, config: str, *changes: dict[str, Any], model: str = "", **more: Any) -> Family:
    """A family with the common shape and these changes: fields of the configuration, and of `Family`."""
    given = {key: value for change in (*changes, more) for key, value in change.items()}
    about = {key: given.pop(key) for key in list(given) if key in Family.__dataclass_fields__}
    every = {key: value for key, value in (SHAPE | given).items() if value is not ...}  # ... takes a field out
    return Family(name, config, every, model or f"{config.removesuffix('Text')}ForCausalLM", **about)


def _multimodal(name: str, config: str, *changes: dict[str, Any], vision: dict[str, Any], **more: Any) -> Family:
    """A family whose language model has a configuration of its own; it is tried with text."""
    text = _family(name, config, *changes, model=f"{config}ForConditionalGeneration", **more)
    return replace(text, fields={"text_config": text.fields, "vision_config": vision, "tie_word_embeddings": False})


def _encoder_decoder(name: str, config: str, *changes: dict[str, Any], **more: Any) -> Family:
    """A family whose decoder has the cache."""
    more = {"encoder": "input_ids", "model": f"{config}ForConditionalGeneration", **more}
    return _family(name, config, *changes, **more)


_LIST = (
    # ---- packed, through the hook, all layers
    _family("llama", "Llama"),
    _family("llama_mha", "Llama", MHA),
    _family("llama_mqa", "Llama", num_key_value_heads=1),
    _family("llama_dim80", "Llama", head_dim=80),
    _family("apertus", "Apertus"),
    _family("arcee", "Arcee"),
    _family("aria_text", "AriaText", MOE, moe_num_experts=4, moe_topk=4, model="AriaTextForCausalLM"),
    _family("bert", "Bert", BERT, model="BertLMHeadModel"),
    _family("biogpt", "BioGpt"),
    _family("bitnet", "BitNet"),
    _family("camembert", "Camembert", BERT),
    _family("codegen", "CodeGen", GPT, hooked=(5, 24)),
    _family("cohere", "Cohere", logit_scale=1.0),
    _family("ctrl", "CTRL", GPT, dff=96, hooked=(5, 14), model="CTRLLMHeadModel"),
    _family("dbrx", "Dbrx", MPT, DBRX),
    _family("doge", "Doge", reads=True),
    _family("dots1", "Dots1", MOE),
    _family("electra", "Electra", BERT, embedding_size=64),
    _family("emu3", "Emu3Text", model="Emu3ForCausalLM"),
    _family("ernie4_5", "Ernie4_5"),
    _family("ernie4_5_moe", "Ernie4_5_Moe", MOE, moe_num_experts=4, moe_k=4),
    _family("flex_olmo", "FlexOlmo", MOE),
    _family("gemma", "Gemma"),
    _family("glm", "Glm"),
    _family("glm4", "Glm4"),
    _family("glm4_moe", "Glm4Moe", MOE),
    _family("gpt2", "GPT2", GPT, model="GPT2LMHeadModel"),
    _family("gpt_bigcode", "GPTBigCode", GPT),
    _family("gpt_neox", "GPTNeoX"),
    _family("gptj", "GPTJ", GPT, hooked=(5, 24)),
    _family("granite", "Granite", GRANITE),
    _family("granitemoe", "GraniteMoe", GRANITE, MOE),
    _family("granitemoeshared", "GraniteMoeShared", GRANITE, MOE, shared_intermediate_size=32),
    _family("helium", "Helium"),
    _family(
        "hrm_text",
        "HrmText",
        num_hidden_layers=1,
        initializer_range=0.1,
        layers=(PACKED,) * 8,  # 2 levels x 2 cycles
        model="HrmTextForCausalLM",
    ),
    _family("hunyuan", "HunYuanDenseV1"),
    _family("hunyuan_moe", "HunYuanMoEV1", MOE),
    _family("hy_v3", "HYV3", MOE),
    _family("hyperclovax", "HyperCLOVAX"),
    _family("jais2", "Jais2"),
    _family("mellum", "Mellum", MOE),
    _family("minimax_m2", "MiniMaxM2", MOE),
    _family("ministral3", "Ministral3"),
    _family("mistral_full", "Mistral"),
    _family("mixtral", "Mixtral", MOE),
    _family("nanochat", "NanoChat"),
    _family("nemotron", "Nemotron", initializer_range=0.15, hooked=(5, 14)),
    _family("olmo", "Olmo"),
    _family("olmo2", "Olmo2"),
    _family("olmoe", "Olmoe", MOE),
    _family("opt", "OPT", ffn_dim=96, word_embed_proj_dim=64),
    _family("persimmon", "Persimmon"),
    _family("phi", "Phi"),
    _family("phi3", "Phi3"),
    _family("phimoe", "Phimoe", MOE, num_local_experts=2, router_jitter_noise=100.0),  # both, never masked
    _family("qwen2", "Qwen2"),
    _family("qwen2_moe", "Qwen2Moe", MOE),
    _family("qwen3", "Qwen3"),
    _family("qwen3_moe", "Qwen3Moe", MOE),
    _family("roberta", "Roberta", BERT),
    _family("seed_oss", "SeedOss"),
    _family("smollm3", "SmolLM3"),
    _family("solar_open", "SolarOpen", MOE),
    _family("stablelm", "StableLm"),
    _family("starcoder2", "Starcoder2"),
    _family("xlm_roberta_xl", "XLMRobertaXL", BERT),
    # ---- the same: language models of multimodal ones
    _multimodal("idefics3", "Idefics3", vision=CLIP, model_type="llama"),
    _multimodal("internvl", "InternVL", vision=PAIRS, model_type="qwen2"),
    _multimodal("llava", "Llava", vision={**CLIP, "model_type": "clip_vision_model"}, model_type="llama"),
    _multimodal("paligemma", "PaliGemma", vision={**CLIP, "model_type": "siglip_vision_model"}, model_type="gemma"),
    _multimodal("qwen2_vl", "Qwen2VL", MROPE, vision=VISION),
    _multimodal("qwen2_5_vl", "Qwen2_5_VL", MROPE, vision=VISION),
    _multimodal("qwen3_vl", "Qwen3VL", MROPE, vision=VISION),
    _multimodal("qwen3_vl_moe", "Qwen3VLMoe", MROPE, MOE, vision=VISION),
    _multimodal("smolvlm", "SmolVLM", vision=CLIP, model_type="llama"),
    # ---- the same: decoders with an encoder
    _encoder_decoder("bart", "Bart", ENCODER),
    _encoder_decoder("bigbird_pegasus", "BigBirdPegasus", ENCODER, attention_type="original_full", attention=EAGER),
    _encoder_decoder("blenderbot", "Blenderbot", ENCODER),
    _encoder_decoder("m2m_100", "M2M100", ENCODER),
    _encoder_decoder("marian", "Marian", ENCODER, model="MarianMTModel"),
    _encoder_decoder("mbart", "MBart", ENCODER),
    _encoder_decoder("moonshine", "Moonshine", MOONSHINE, encoder="input_values"),
    _encoder_decoder("nllb_moe", "NllbMoe", ENCODER, MOE, attention=EAGER),
    _encoder_decoder("pegasus", "Pegasus", ENCODER),
    _encoder_decoder("plbart", "PLBart", ENCODER),
    _encoder_decoder("whisper", "Whisper", ENCODER, WHISPER, encoder="input_features"),
    # ---- packed on full layers, transformers' own sliding or chunked layers elsewhere
    _family("afmoe", "Afmoe", MIXED, MOE),
    _family("beam", "Beam", MIXED),
    _family("cohere2", "Cohere2", MIXED, logit_scale=1.0),
    _family("cohere2_moe", "Cohere2Moe", MIXED, MOE, logit_scale=1.0),
    _family("cwm", "Cwm", MIXED),
    _family("exaone4", "Exaone4", MIXED),
    _family("exaone_moe", "ExaoneMoe", MIXED, MOE),
    _family("gemma2", "Gemma2", MIXED, query_pre_attn_scalar=16, attention=EAGER),
    _family("gemma3", "Gemma3Text", MIXED, query_pre_attn_scalar=16),
    _multimodal("gemma3_vision", "Gemma3", MIXED, vision=CLIP, query_pre_attn_scalar=16),
    _family("gemma3n", "Gemma3nText", SHARED, altup_num_inputs=2, laurel_rank=8, activation_sparsity_pattern=[0.0] * 4),
    _family("gemma4", "Gemma4Text", SHARED, global_head_dim=32),
    _multimodal("gemma4_vision", "Gemma4", SHARED, vision=CLIP, global_head_dim=32),
    _family("gpt_oss", "GptOss", MIXED, MOE, attention=EAGER),
    _family("granite_swa", "GraniteSWA", GRANITE, MIXED, attention=EAGER),
    _family("laguna", "Laguna", MIXED, MOE),
    _family("llama4", "Llama4Text", MIXED, MOE, CHUNKED),
    _family("ministral", "Ministral", MIXED),
    _family("modernbert_decoder", "ModernBertDecoder", MIXED),
    _family("olmo3", "Olmo3", MIXED),
    _family("vaultgemma", "VaultGemma", MIXED, query_pre_attn_scalar=16, attention=EAGER),
    # ---- packed on attention layers, transformers' own linear layers elsewhere
    _family("bamba", "Bamba", LINEAR, MAMBA, layer_types=..., attn_layer_indices=[1]),
    _family("granitemoehybrid", "GraniteMoeHybrid", GRANITE, LINEAR, MAMBA, MOE, layer_types=["mamba", "attention"]),
    _family("jamba", "Jamba", LINEAR, MAMBA, MOE, layer_types=..., attn_layer_period=2, attn_layer_offset=1),
    _family("lfm2", "Lfm2", LINEAR, layer_types=["conv", "full_attention"]),
    _family("lfm2_moe", "Lfm2Moe", LINEAR, MOE, layer_types=["conv", "full_attention"]),
    _family("lfm3", "Lfm3", LINEAR, layer_types=["conv", "full_attention"]),
    _family("nemotron_h", "NemotronH", LINEAR, MAMBA2, MOE, layer_types=..., layers_block_type=["mamba", "attention"]),
    _family("olmo_hybrid", "OlmoHybrid", LINEAR),
    _family("qwen3_5", "Qwen3_5Text", LINEAR),
    _family("qwen3_5_moe", "Qwen3_5MoeText", LINEAR, MOE),
    _multimodal("qwen3_5_vision", "Qwen3_5", LINEAR, MROPE, vision=VISION),
    _family("qwen3_next", "Qwen3Next", LINEAR, MOE),
    _family("zamba", "Zamba", LINEAR, MAMBA, layer_types=["mamba", "hybrid"]),
    _family("zamba2", "Zamba2", LINEAR, MAMBA, layer_types=..., layers_block_type=["mamba", "hybrid"]),
    # ---- the same, both states in one layer
    _family("falcon_h1", "FalconH1", MAMBA, mamba_d_ssm=128),
    _family("zaya", "Zaya", MOE, num_experts_per_tok=1),
    # ---- native: all layers windowed or linear
    _family("falcon_mamba", "FalconMamba", ALL_NATIVE, attention=EAGER),
    _family("mamba", "Mamba", ALL_NATIVE, attention=EAGER),
    _family("mamba2", "Mamba2", ALL_NATIVE, MAMBA2, attention=EAGER),
    _family("mistral", "Mistral", ALL_NATIVE, SLIDING),
    _multimodal("mistral3", "Mistral3", ALL_NATIVE, SLIDING, vision=PIXTRAL, model_type="mistral"),
    _family("moshi", "Moshi", ALL_NATIVE, SLIDING, ffn_dim=96, since=(5, 14)),
    # ---- dequantized: no AttentionInterface, or values that change after `update`, or a position bias
    _family("bloom", "Bloom", ALL_DECODED, GPT, attention=EAGER),
    _family("diffllama", "DiffLlama", ALL_DECODED),
    _family("falcon", "Falcon", ALL_DECODED, head_dim=...),
    _family("falcon_alibi", "Falcon", ALL_DECODED, head_dim=..., alibi=True),
    _family("gpt_neo", "GPTNeo", ALL_DECODED, NEO, attention=EAGER),
    _family("gpt_neox_japanese", "GPTNeoXJapanese", ALL_DECODED, attention=EAGER),
    _family("inkling", "InklingText", INKLING, layers=(NATIVE, DECODED), model="InklingForCausalLM"),
    _family("jetmoe", "JetMoe", ALL_DECODED),
    _family("mpt", "Mpt", ALL_DECODED, MPT, attention=EAGER),
    _family("rembert", "RemBert", ALL_DECODED, BERT, attention=EAGER),
    _family("roformer", "RoFormer", ALL_DECODED, BERT, embedding_size=64, attention=EAGER),
    _family("trocr", "TrOCR", ALL_DECODED, ENCODER, attention=EAGER),
    _family("xglm", "XGLM", ALL_DECODED, attention=EAGER),
    _encoder_decoder("fsmt", "FSMT", ALL_DECODED, ENCODER, FSMT, attention=EAGER, since=(5, 23)),
    _encoder_decoder("led", "LED", ALL_DECODED, ENCODER, LED, attention=EAGER),
    _encoder_decoder("longt5", "LongT5", ALL_DECODED, T5, attention=EAGER),
    _encoder_decoder("mt5", "MT5", ALL_DECODED, T5),
    _encoder_decoder("mvp", "Mvp", ALL_DECODED, ENCODER, attention=EAGER),
    _encoder_decoder("t5", "T5", ALL_DECODED, T5),
    _encoder_decoder("umt5", "UMT5", ALL_DECODED, T5),
    # ---- native: keys and values of different shapes, as latent attention (MLA) has
    _family("axk1", "AXK1", ALL_NATIVE, MLA, MOE),
    _family("bailing_hybrid", "BailingHybrid", MLA, MOE, LINEAR, ALL_NATIVE),
    _family("deepseek_v2", "DeepseekV2", ALL_NATIVE, MLA, MOE),
    _family("deepseek_v3", "DeepseekV3", ALL_NATIVE, MLA, MOE),
    _family("glm4_moe_lite", "Glm4MoeLite", ALL_NATIVE, MLA, MOE),
    _family("kimi_linear", "KimiLinear", MLA, MOE, LINEAR, ALL_NATIVE, linear_head_dim=16, linear_num_heads=4),
    _family("longcat_flash", "LongcatFlash", ALL_NATIVE, MLA, MOE, num_layers=1),
    _family("mimo_v2_flash", "MiMoV2Flash", MIXED, MOE, ALL_NATIVE, v_head_dim=8, attention=EAGER),
    _family("minicpm3", "MiniCPM3", ALL_NATIVE, MLA),
    _family("youtu", "Youtu", ALL_NATIVE, MLA),
    # ---- native: a cache of indexer keys, or of compressed ones, beside keys and values
    _family("axk2", "AXK2", ALL_NATIVE, MLA, MOE, INDEXED),
    _family("deepseek_v32", "DeepseekV32", ALL_NATIVE, MLA, MOE, INDEXED),
    _family("deepseek_v4", "DeepseekV4", ALL_NATIVE, MOE, INDEXED, COMPRESSED, attention=EAGER, told=True),
    _family("glm_moe_dsa", "GlmMoeDsa", ALL_NATIVE, MLA, MOE, INDEXED),
    _family("hy_v4", "HYV4", ALL_NATIVE, MLA, MOE, INDEXED, attention=EAGER),
)
FAMILIES: dict[str, Family] = {family.name: family for family in _LIST}
"""All families by name."""
