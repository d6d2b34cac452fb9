"""What a run will need, before it is started: ``python -m corec.scale.estimate params/amazon-electronics.yaml``.

The backbone is built on PyTorch's `meta` device, where tensors have shapes but no memory, with its adapter and new
rows; so parameters are counted, not estimated. Memory and time follow from them by the formulas below.
"""

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from corec import CorecError, backbones, params, profiles, reranker, schemes
from corec.params import RerankerParams

# Shapes of models whose configuration may not be at hand (they are gated): from their public model cards.
SHAPES: dict[str, dict[str, Any]] = {
    "meta-llama/Meta-Llama-3-8B": {
        "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 500_000.0,
        "tie_word_embeddings": False,
    },
}  # fmt: skip

GB = 1e9


class Plan(NamedTuple):
    """Parameters, memory in bytes a device, and floating-point operations of a training step."""

    parameters: int
    trainable: int
    memory: dict[str, float]
    step_flops: float


def meta_model(settings: RerankerParams, new_tokens: int) -> Any:
    """The backbone with adapter and `new_tokens` trainable rows, without memory.

    Raises
    ------
    CorecError
        When neither its configuration nor its shape is known.
    """
    name = settings.backbone
    if name == "tiny":
        config = backbones.tiny_model()[0].config
    elif name in SHAPES:
        config = LlamaConfig(**SHAPES[name])
    else:
        source = str(backbones.smollm2_folder()) if name == "smollm2-135m" else name
        try:
            config = AutoConfig.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise CorecError(
                f"Parameter reranker.backbone: the configuration of {name!r} cannot be had: give a folder that holds it, "
                f"log in to the hub if the model is gated (`hf auth login`), or name one of {', '.join(SHAPES)}, smollm2-135m."
            ) from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        rows = list(range(config.vocab_size, config.vocab_size + new_tokens))
        model.resize_token_embeddings(config.vocab_size + new_tokens, mean_resizing=False)
        return reranker.adapt(model, rows, settings)


def known_tokens(settings: params.Params) -> int:
    """Tokens that a run adds as far as its parameters tell: with values as tokens, those found in the data come on top."""
    attributes = schemes.choose(settings.controls.scheme, settings.controls.attributes)
    values = sum(len(entry.labels) for entry in attributes) if settings.reranker.values == "token" else 0
    return len(attributes) + values + (reranker.MAX_K if settings.reranker.readout == "index" else 0)


def plan(settings: RerankerParams, tokens: int, new_tokens: int, devices: int = 1) -> Plan:
    """Count, and derive memory and cost of one training step.

    Per device: weights in bfloat16; the trainable parameters with gradient (2 bytes), float32 copy and Adam's two moments
    (12 bytes); activations of `micro_batch` rows, which are 34 bytes a token and hidden unit in each layer (Korthikanti et al.,
    2022, with fused attention), or 2 bytes with gradient checkpointing, plus one whole layer.

    Operations: 2 a token and weight for the forward pass (the input embedding multiplies nothing), as many for the gradient
    of the states (frozen weights need none of their own), and once more for the forward pass that checkpointing repeats;
    attention adds 4 a token, layer, hidden unit and token seen, half of which the causal mask spares.

    Parameters
    ----------
    settings
        Backbone, adapter, batch.
    tokens
        Length of a row.
    new_tokens
        Rows added to the vocabulary.
    devices
        That share a batch; every one holds all weights.
    """
    model = meta_model(settings, new_tokens)
    config = model.config
    total = sum(value.numel() for value in model.parameters())
    trainable = sum(value.numel() for value in model.parameters() if value.requires_grad)
    rows = settings.batch_size * (1 if settings.request_position == "after" else settings.requests_per_window)
    at_once = min(rows, settings.micro_batch * rows // settings.batch_size)
    layer = 34 * tokens * config.hidden_size * at_once
    kept = 2 * tokens * config.hidden_size * at_once if settings.gradient_checkpointing else layer
    memory = {
        "weights": 2.0 * total,
        "gradients, float32 copies, Adam": 14.0 * trainable,
        "activations": float(kept * config.num_hidden_layers + layer),
    }
    multiplied = total - model.get_input_embeddings().weight.numel()
    if not config.tie_word_embeddings:
        multiplied -= model.get_output_embeddings().weight.numel()  # logits are computed at the answer only
    passes = 3 if settings.gradient_checkpointing else 2
    forward = 2 * multiplied * tokens + 2 * config.num_hidden_layers * config.hidden_size * tokens**2
    return Plan(total, trainable, memory, passes * forward * rows / devices)


def report(settings: params.Params, tokens: int, tflops: float) -> str:
    """The plan in words, for one device and for four of 24 GB."""
    given = settings.reranker
    steps = given.curriculum_steps + given.steps
    lines = [f"{given.backbone}, LoRA r = {given.lora_r}, rows of {tokens} tokens, {given.batch_size} windows a step"]
    for devices in (1, 4):
        made = plan(given, tokens, known_tokens(settings), devices)
        if devices == 1:
            share = made.trainable / made.parameters
            lines += [f"parameters  {made.parameters:,}", f"trainable   {made.trainable:,} ({share:.3%})", "memory of a device"]
            lines += [f"  {part:32} {size / GB:8.2f} GB" for part, size in made.memory.items()]
            lines += [f"  {'all':32} {sum(made.memory.values()) / GB:8.2f} GB"]
        seconds = made.step_flops / (tflops * 1e12)
        room = "fits" if sum(made.memory.values()) < 0.92 * 24 * GB else "does NOT fit"
        lines.append(
            f"{devices} device{'s' * (devices > 1)}: {made.step_flops / 1e12:.1f} TFLOP a step and device, {seconds:.2f} s at "
            f"{tflops:g} TFLOP/s, {steps * seconds / 3600:.1f} h for {steps:,} steps; {room} into 24 GB"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m corec.scale.estimate", description="What a run will need, before it is started."
    )
    parser.add_argument("params", type=Path, help="parameter file, e.g. params/amazon-electronics.yaml")
    parser.add_argument("--tokens", type=int, default=2048, help="length of a row (default: the paper's maximum)")
    parser.add_argument("--tflops", type=float, default=45, help="TFLOP/s that a device reaches (default: an assumption, 45)")
    given = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    try:
        print(report(profiles.load(given.params), given.tokens, given.tflops))
    except CorecError as error:
        print(f"corec: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
