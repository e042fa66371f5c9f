"""Fields of tiny configurations that many families share."""

from __future__ import annotations

PACKED, NATIVE, DECODED = "packed", "native", "dequantized"
NOTHING = "native, empty"
"""Of a layer that reads the keys and values of an earlier one; the first versions to share them have no such layer."""
VOCABULARY = 97
WINDOW = 48
"""Of sliding windows and chunks: shorter than the prompts of the scenarios."""

SHAPE = {
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
ALL_NATIVE = {"layers": (NATIVE, NATIVE)}
ALL_DECODED = {"layers": (DECODED, DECODED)}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 1024}
MPT = {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 1024, "use_cache": True}
SLIDING = {"sliding_window": WINDOW}
MIXED = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
    "layers": (NATIVE, PACKED),
}
CHUNKED = {
    "layer_types": ["chunked_attention", "full_attention"],
    "attention_chunk_size": WINDOW,
    "sliding_window": None,
    "no_rope_layers": [1, 0],
    "intermediate_size_mlp": 96,
}
SHARED = {  # the last two layers read keys and values of the first two
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "layers": (NATIVE, PACKED, NOTHING, NOTHING),
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
}
MHA = {"num_key_value_heads": 4}
MLA = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
}
MOE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,  # all: which are chosen must not hang on rounding
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "layers": (NATIVE, PACKED),
}
MAMBA = {  # expand 2 x hidden 64 = 8 heads of 16
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
    "use_mamba_kernels": False,
}
MAMBA2 = {  # the same by other names
    "ssm_state_size": 8,
    "state_size": 8,
    "mamba_num_heads": 8,
    "num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 1,
    "chunk_size": 16,
}
INDEXED = {"index_topk": 16, "index_head_dim": 16, "index_n_heads": 2}
COMPRESSED = {
    "num_key_value_heads": 1,
    "sliding_window": WINDOW,
    "q_lora_rank": 16,
    "o_lora_rank": 8,
    "o_groups": 2,
    "qk_rope_head_dim": 8,
    "mlp_layer_types": ["moe", "moe"],
}
GRANITE = {"attention_multiplier": 0.25}  # 1 / sqrt(head_dim)
INKLING = {
    **MOE,
    "layer_types": ["hybrid_sliding", "hybrid"],
    "sliding_window": WINDOW,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "unpadded_vocab_size": VOCABULARY,
    "logits_mup_width_multiplier": 1.0,
    "rel_extent": 64,
}
DBRX = {
    "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 4},
}
NEO = {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": WINDOW}
BERT = {"is_decoder": True}
ENCODER = {
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
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 1}
FSMT = {"langs": ["en", "de"], "src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY}
LED = {"attention_window": 16, "max_encoder_position_embeddings": 128, "max_decoder_position_embeddings": 512}
MOONSHINE = {
    "encoder_num_hidden_layers": 1,
    "decoder_num_hidden_layers": 2,
    "encoder_num_attention_heads": 4,
    "decoder_num_attention_heads": 4,
    "encoder_num_key_value_heads": 4,
    "decoder_num_key_value_heads": 2,
}
WHISPER = {"max_source_positions": 24, "max_target_positions": 512}
VISION = {
    "depth": 1,
    "embed_dim": 16,
    "hidden_size": 64,
    "out_hidden_size": 64,
    "num_heads": 2,
    "intermediate_size": 16,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
MROPE = {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
CLIP = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "projection_dim": 16,
}
PAIRS = {**CLIP, "image_size": [28, 28], "patch_size": [14, 14]}
PIXTRAL = {**CLIP, "model_type": "pixtral"}
