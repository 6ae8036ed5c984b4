"""Tiny random models of many architectures: some ten thousand weights each, in folders that load like any
other model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from helpers.byte_level import byte_level_tokenizer

Kind = Literal["encoder", "decoder", "encoder-decoder"]

WORDS = "the a old small near with sees likes and then kind thing cat dog soup rice cake hill house"
"""Words that the tokenizer has a token for."""

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
COMMON = {
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    **SPECIAL,
}
ROPE = COMMON | {"num_key_value_heads": 2, "head_dim": 8}
MOE = ROPE | {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
GPT = {"vocab_size": 400, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, **SPECIAL}
SEQ = {
    "vocab_size": 400,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 128,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    **SPECIAL,
}
T5 = {
    "vocab_size": 400,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "bos_token_id": 1,
}

ENCODERS = {
    "albert": COMMON | {"embedding_size": 16},
    "bert": COMMON,
    "big_bird": COMMON | {"block_size": 8, "num_random_blocks": 2},
    "convbert": COMMON | {"embedding_size": 32},
    "deberta": COMMON | {"type_vocab_size": 0},
    "deberta-v2": COMMON,
    "distilbert": {
        "vocab_size": 400,
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 48,
        "max_position_embeddings": 128,
        **SPECIAL,
    },
    "electra": COMMON | {"embedding_size": 16},
    "esm": COMMON | {"position_embedding_type": "rotary", "mask_token_id": 3},
    "flaubert": {
        "vocab_size": 400,
        "emb_dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "max_position_embeddings": 128,
        **SPECIAL,
        "pad_index": 0,
    },
    "fnet": COMMON,
    "ibert": COMMON,
    "longformer": COMMON | {"attention_window": 8},
    "mobilebert": COMMON | {"embedding_size": 32, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    "modernbert": COMMON
    | {"global_attn_every_n_layers": 2, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2},
    "mpnet": COMMON,
    "nystromformer": COMMON | {"segment_means_seq_len": 64, "num_landmarks": 64},
    "rembert": COMMON | {"input_embedding_size": 16, "output_embedding_size": 24},
    "roberta": COMMON | {"max_position_embeddings": 130},
    "roformer": COMMON | {"embedding_size": 32},
    "squeezebert": COMMON | {"embedding_size": 32},
    "xlm": {
        "vocab_size": 400,
        "emb_dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "max_position_embeddings": 128,
        **SPECIAL,
        "pad_index": 0,
    },
    "xlnet": {"vocab_size": 400, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, **SPECIAL},
    "nomic_bert": COMMON,
}
DECODERS = {
    "bloom": {"vocab_size": 400, "hidden_size": 32, "n_layer": 2, "n_head": 4, **SPECIAL},
    "cohere": ROPE,
    "deepseek_v3": MOE
    | {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "num_key_value_heads": 4,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "head_dim": 4,
        "qk_nope_head_dim": 4,
        "first_k_dense_replace": 1,
    },
    "falcon": COMMON | {"multi_query": True, "new_decoder_architecture": False, "parallel_attn": True},
    "gemma": ROPE,
    "gemma2": ROPE | {"sliding_window": 8},
    "gemma3_text": ROPE | {"sliding_window": 8},
    "glm": ROPE,
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neo": {
        "vocab_size": 400,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 128,
        "window_size": 8,
        **SPECIAL,
    },
    "gpt_neox": COMMON,
    "gpt_oss": MOE,
    "gptj": GPT | {"rotary_dim": 4},
    "granitemoe": MOE,
    "jetmoe": MOE | {"kv_channels": 8, "num_key_value_heads": 2},
    "llama": ROPE,
    "mamba": COMMON | {"state_size": 8},
    "mamba2": COMMON
    | {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "expand": 2, "chunk_size": 8},
    "mistral": ROPE | {"sliding_window": 8},
    "mixtral": MOE,
    "mpt": {"vocab_size": 400, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128, **SPECIAL},
    "nemotron": ROPE,
    "olmo2": ROPE,
    "olmoe": MOE,
    "opt": COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi3": ROPE,
    "phimoe": MOE,
    "qwen2": ROPE,
    "qwen2_moe": MOE,
    "qwen3": ROPE,
    "qwen3_moe": MOE,
    "recurrent_gemma": ROPE | {"lru_width": 32, "attention_window_size": 16, "num_hidden_layers": 3},
    "rwkv": COMMON | {"attention_hidden_size": 32},
    "qwen3_next": MOE
    | {
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "jamba": MOE
    | {
        "mamba_d_state": 8,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "lfm2": ROPE,
}
ENCODER_DECODERS = {
    "bart": SEQ,
    "bigbird_pegasus": SEQ | {"block_size": 8, "num_random_blocks": 2},
    "blenderbot": SEQ,
    "led": SEQ
    | {"attention_window": 8, "max_encoder_position_embeddings": 128, "max_decoder_position_embeddings": 128},
    "longt5": T5 | {"local_radius": 7, "encoder_attention_type": "local"},
    "m2m_100": SEQ,
    "prophetnet": {
        "vocab_size": 400,
        "hidden_size": 32,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 128,
        **SPECIAL,
    },
    "switch_transformers": T5 | {"num_experts": 4, "expert_capacity": 64},
    "t5": T5,
    "t5-gated": T5
    | {"model_type": "t5", "feed_forward_proj": "gated-gelu", "d_kv": 6, "tie_word_embeddings": False},
    "pegasus_x": SEQ | {"block_size": 8, "num_global_tokens": 2, "decoder_start_token_id": 0},
    "nllb-moe": SEQ
    | {"num_experts": 4, "expert_capacity": 64, "encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "bart-uneven": SEQ | {"model_type": "bart", "encoder_layers": 3, "decoder_layers": 1},
}
ALL = {**ENCODERS, **DECODERS, **ENCODER_DECODERS}


def kind_of(name: str) -> Kind:
    """The kind of an architecture in this list."""
    if name in ENCODERS:
        return "encoder"
    return "decoder" if name in DECODERS else "encoder-decoder"


def write_model(name: str, folder: Path) -> Path:
    """Write a random model of the architecture, with a tokenizer, into ``folder``.

    Weights are larger than most architectures initialise them: outputs of unlike texts must differ by more
    than rounding.
    """
    import torch
    import transformers

    values = dict(ALL[name])
    config = transformers.CONFIG_MAPPING[values.pop("model_type", name)](**values)
    loaders: dict[Kind, Any] = {
        "encoder": transformers.AutoModel,
        "decoder": transformers.AutoModelForCausalLM,
        "encoder-decoder": transformers.AutoModelForSeq2SeqLM,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = loaders[kind_of(name)].from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    texts = [f"{WORDS} {WORDS}"] * 4
    byte_level_tokenizer(texts, ends=kind_of(name) == "encoder-decoder").save_pretrained(folder)
    return folder
