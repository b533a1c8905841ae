"""Hugging Face's transformers, from their configs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from survey.third_party.case import Case, Inputs, call, tokens

VOCABULARY, BATCH, LENGTH = 40, 2, 7
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ENCODER = {**SMALL, "intermediate_size": 48, "max_position_embeddings": 24}
DECODER = {**ENCODER, "num_key_value_heads": 2}


def built(kind: str, config: Any) -> Callable[[], nn.Module]:
    """Models of a class, each from a config of its own, as its class may change it."""
    return lambda: getattr(transformers, kind)(config())


def ids(generator: torch.Generator) -> Inputs:
    return {"input_ids": tokens(generator, BATCH, LENGTH, below=VOCABULARY, least=3)}


def masked(generator: torch.Generator) -> Inputs:
    """Sentences of other lengths in each member, padded."""
    lengths = torch.randint(2, LENGTH + 1, (BATCH, 1), generator=generator)
    mask = (torch.arange(LENGTH) < lengths).long()
    return {**ids(generator), "attention_mask": mask}


def labelled(generator: torch.Generator) -> Inputs:
    return {**masked(generator), "labels": torch.randint(0, 2, (BATCH,), generator=generator)}


def with_next_words(generator: torch.Generator) -> Inputs:
    given = masked(generator)
    return {**given, "labels": given["input_ids"].where(given["attention_mask"] > 0, -100)}


def translated(generator: torch.Generator) -> Inputs:
    return {**masked(generator), "labels": tokens(generator, BATCH, 5, below=VOCABULARY, least=3)}


def with_cache(model: nn.Module, input_ids: torch.Tensor) -> Any:
    """A cache comes out of one forward, goes into the next, and is returned."""
    first = model(input_ids=input_ids[:, :-2], use_cache=True)
    second = model(input_ids=input_ids[:, -2:], past_key_values=first.past_key_values, use_cache=True)
    return first.logits, second


def generated(model: nn.Module, input_ids: torch.Tensor) -> Any:
    """Greedy decoding, of a length that does not depend on values."""
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    return model.generate(input_ids=input_ids, **options)


def config(kind: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, kind)(**options)


def case(name: str, model: str, kind: str, inputs: Any, options: dict[str, Any], run: Any = call, **more: Any) -> Case:
    return Case(name, "transformers", built(model, config(kind, **options)), inputs, run, **more)


T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
BART = {
    **{"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
    **{"max_position_embeddings": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"decoder_start_token_id": 2, "forced_eos_token_id": None},
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}
MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
MOE = {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
MOE_EAGER = {**MOE, "experts_implementation": "eager"}
DEBERTA = {**ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8}

CASES = [
    case("BERT, padding mask", "BertForSequenceClassification", "BertConfig", labelled, ENCODER),
    case(
        "BERT, eager attention",
        "BertForMaskedLM",
        "BertConfig",
        with_next_words,
        {**ENCODER, "attn_implementation": "eager"},
    ),
    case("RoBERTa", "RobertaForMaskedLM", "RobertaConfig", with_next_words, {**ENCODER, "pad_token_id": 0}),
    case(
        "DistilBERT",
        "DistilBertModel",
        "DistilBertConfig",
        masked,
        {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    ),
    case("ALBERT", "AlbertModel", "AlbertConfig", masked, {**ENCODER, "embedding_size": 16}),
    case("ELECTRA", "ElectraForPreTraining", "ElectraConfig", masked, {**ENCODER, "embedding_size": 16}),
    case("DeBERTa v2", "DebertaV2ForSequenceClassification", "DebertaV2Config", labelled, DEBERTA),
    case("DeBERTa", "DebertaModel", "DebertaConfig", masked, DEBERTA),
    case("GPT-2, loss", "GPT2LMHeadModel", "GPT2Config", with_next_words, GPT2),
    case("GPT-2, cache returned", "GPT2LMHeadModel", "GPT2Config", ids, GPT2, with_cache),
    case("GPT-2, generate", "GPT2LMHeadModel", "GPT2Config", ids, GPT2, generated),
    case("Llama, loss", "LlamaForCausalLM", "LlamaConfig", with_next_words, DECODER),
    case("Llama, cache returned", "LlamaForCausalLM", "LlamaConfig", ids, DECODER, with_cache),
    case("Llama, generate", "LlamaForCausalLM", "LlamaConfig", ids, DECODER, generated),
    case("Qwen3", "Qwen3ForCausalLM", "Qwen3Config", with_next_words, {**DECODER, "head_dim": 8}),
    case(
        "Gemma 3",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        with_next_words,
        {**DECODER, "head_dim": 8, "sliding_window": 4},
    ),
    case("GPT-NeoX", "GPTNeoXForCausalLM", "GPTNeoXConfig", with_next_words, ENCODER),
    case("Mixtral", "MixtralForCausalLM", "MixtralConfig", with_next_words, MOE_EAGER, exact=torch.float32),
    case(
        "Mixtral, cache returned",
        "MixtralForCausalLM",
        "MixtralConfig",
        ids,
        MOE_EAGER,
        with_cache,
        exact=torch.float32,
    ),
    case("Mixtral, grouped products", "MixtralForCausalLM", "MixtralConfig", ids, MOE, dtype=torch.float32),
    case(
        "Mixtral, batched products",
        "MixtralForCausalLM",
        "MixtralConfig",
        ids,
        {**MOE, "experts_implementation": "batched_mm"},
        exact=torch.float32,
    ),
    case("Mamba", "MambaForCausalLM", "MambaConfig", with_next_words, MAMBA),
    case("Mamba, cache returned", "MambaForCausalLM", "MambaConfig", ids, {**MAMBA, "use_cache": True}),
    case(
        "Mamba 2",
        "Mamba2Model",
        "Mamba2Config",
        ids,
        {**MAMBA, "num_heads": 4, "head_dim": 16, "n_groups": 2, "chunk_size": 4},
    ),
    case(
        "RWKV",
        "RwkvForCausalLM",
        "RwkvConfig",
        ids,
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 24},
        modes=("train",),
    ),
    case("T5", "T5ForConditionalGeneration", "T5Config", translated, {**T5, "decoder_start_token_id": 0}),
    case("BART", "BartForConditionalGeneration", "BartConfig", translated, BART),
]


# -- not of words


def image(generator: torch.Generator) -> Inputs:
    return {"pixel_values": torch.randn(BATCH, 3, 16, 16, generator=generator, dtype=torch.float64)}


def labelled_image(generator: torch.Generator) -> Inputs:
    return {**image(generator), "labels": torch.randint(0, 2, (BATCH,), generator=generator)}


def wave(generator: torch.Generator) -> Inputs:
    return {
        "input_values": torch.randn(BATCH, 400, generator=generator, dtype=torch.float64),
        "attention_mask": (torch.arange(400) < torch.randint(250, 401, (BATCH, 1), generator=generator)).long(),
        "labels": tokens(generator, BATCH, 3, below=VOCABULARY, least=1),
    }


def mel(generator: torch.Generator) -> Inputs:
    return {
        "input_features": torch.randn(BATCH, 8, 24, generator=generator, dtype=torch.float64),
        "labels": tokens(generator, BATCH, 5, below=VOCABULARY, least=3),
    }


def image_and_text(generator: torch.Generator) -> Inputs:
    return {**masked(generator), **image(generator)}


def clip_config() -> Any:
    text = {**ENCODER, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    vision |= {"image_size": 16, "patch_size": 8}
    return transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)


def series(generator: torch.Generator) -> Inputs:
    return {
        "past_values": torch.randn(BATCH, 16, 2, generator=generator, dtype=torch.float64),
        "future_values": torch.randn(BATCH, 4, 2, generator=generator, dtype=torch.float64),
    }


VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VISION |= {"image_size": 16, "patch_size": 8}
SPEECH = {**ENCODER, "conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2}
SPEECH |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "pad_token_id": 0}
WHISPER = {**BART, "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 12}

CASES += [
    case("ViT", "ViTForImageClassification", "ViTConfig", labelled_image, VISION),
    case(
        "Wav2Vec2, CTC",
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        wave,
        {**SPEECH, "mask_time_length": 4, "mask_time_prob": 0.0, "layerdrop": 0.0},
        untracked=("input_values",),
    ),
    case("Whisper", "WhisperForConditionalGeneration", "WhisperConfig", mel, WHISPER),
    Case("CLIP", "transformers", lambda: transformers.CLIPModel(clip_config()), image_and_text, call),
    case(
        "SegFormer",
        "SegformerForImageClassification",
        "SegformerConfig",
        labelled_image,
        {
            "hidden_sizes": [8, 8, 16, 16],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 1, 2, 2],
            "sr_ratios": [2, 2, 1, 1],
            "strides": [2, 2, 1, 1],
        },
    ),
    case(
        "PatchTST",
        "PatchTSTForPrediction",
        "PatchTSTConfig",
        series,
        {
            "num_input_channels": 2,
            "context_length": 16,
            "prediction_length": 4,
            "patch_length": 4,
            "patch_stride": 4,
            "d_model": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 24,
        },
    ),
]
