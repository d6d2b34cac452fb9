"""Estimate memory and time of a training run: ``python -m corec.scale.estimate params/amazon-electronics.yaml``.

The backbone, its adapter and the new rows are built on PyTorch's `meta` device, where tensors have shapes but no memory, so
the parameters are counted exactly. Memory and time are derived from them with the formulas of :func:`plan`.
"""

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from corec import CorecError, backbones, params, profiles, reranker, schemes
from corec.checked import exit_status
from corec.params import RerankerParams

# Configurations of gated models, from their public model cards.
SHAPES: dict[str, dict[str, Any]] = {
    "meta-llama/Meta-Llama-3-8B": {
        "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 500_000.0,
        "tie_word_embeddings": False,
    },
}  # fmt: skip

GB = 1e9


class Plan(NamedTuple):
    """Needs of a training run."""

    parameters: int  # of the model with adapter and new rows
    trainable: int  # of them, updated by training
    memory: dict[str, float]  # bytes per device, by purpose
    step_flops: float  # floating-point operations per training step and device


def meta_model(settings: RerankerParams, new_tokens: int) -> Any:
    """Build the backbone with adapter and `new_tokens` trainable rows on the `meta` device.

    Raises
    ------
    CorecError
        If the configuration of the backbone is neither available nor in :data:`SHAPES`.
    """
    name = settings.backbone
    if name == "tiny":
        config = backbones.tiny_model()[0].config
    elif name in SHAPES:
        config = LlamaConfig(**SHAPES[name])
    else:
        source = str(backbones.smollm2_folder()) if name == "smollm2-135m" else backbones.find(name)
        try:
            config = AutoConfig.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise CorecError(
                f"Parameter reranker.backbone: the configuration of {name!r} could not be loaded: give a folder that holds it, "
                f"log in to the hub if the model is gated (`hf auth login`), or name one of {', '.join(SHAPES)}, smollm2-135m."
            ) from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        rows = list(range(config.vocab_size, config.vocab_size + new_tokens))
        model.resize_token_embeddings(config.vocab_size + new_tokens, mean_resizing=False)
        return reranker.adapt(model, rows, settings)


def known_tokens(settings: params.Params) -> int:
    """Number of new tokens known from the settings. With ``values: token``, values found only in the data are not counted."""
    attributes = schemes.choose(settings.controls.scheme, settings.controls.attributes)
    values = sum(len(entry.labels) for entry in attributes) if settings.reranker.values == "token" else 0
    soft = settings.reranker.soft_width > 0
    return len(attributes) + values + soft + (reranker.MAX_K if settings.reranker.readout == "index" else 0)


def plan(settings: RerankerParams, tokens: int, new_tokens: int, devices: int = 1) -> Plan:
    """Count parameters, and derive memory and floating-point operations of one training step.

    Memory per device: weights in bfloat16 (2 bytes); for each trainable parameter the gradient (2 bytes) and the float32 copy
    and two moments of Adam (12 bytes); activations of the rows of `micro_batch` windows, 34 bytes per token and hidden unit in
    each layer (Korthikanti et al., 2022, with fused attention), or 2 bytes with gradient checkpointing, plus 34 bytes for
    one more layer.

    Operations: 2 per token and weight for the forward pass (without the input embedding, a look-up), 2 for the gradient of
    the states (frozen weights need no gradient), and 2 more for the forward pass that checkpointing repeats. Attention adds
    4 per token, layer, hidden unit and attended token, half of which is skipped by the causal mask.

    Parameters
    ----------
    settings
        Backbone, adapter and batch.
    tokens
        Length of a row in tokens.
    new_tokens
        Rows added to the vocabulary.
    devices
        Number of devices that share a batch; each holds all weights.
    """
    model = meta_model(settings, new_tokens)
    config = model.config
    total = sum(value.numel() for value in model.parameters())
    trainable = sum(value.numel() for value in model.parameters() if value.requires_grad)
    rows = settings.batch_size * (1 if settings.request_position == "after" else settings.requests_per_window)
    at_once = min(rows, settings.micro_batch * rows // settings.batch_size)
    layer = 34 * tokens * config.hidden_size * at_once
    stored = 2 * tokens * config.hidden_size * at_once if settings.gradient_checkpointing else layer
    memory = {
        "weights": 2.0 * total,
        "gradients, float32 copies, Adam": 14.0 * trainable,
        "activations": float(stored * config.num_hidden_layers + layer),
    }
    multiplied = total - model.get_input_embeddings().weight.numel()
    if not config.tie_word_embeddings:
        multiplied -= model.get_output_embeddings().weight.numel()  # logits are computed at the answer position only
    passes = 3 if settings.gradient_checkpointing else 2
    forward = 2 * multiplied * tokens + 2 * config.num_hidden_layers * config.hidden_size * tokens**2
    return Plan(total, trainable, memory, passes * forward * rows / devices)


def report(settings: params.Params, tokens: int, tflops: float) -> str:
    """Text of the :func:`plan` for one and for four devices, compared with 24 GB of memory per device.

    Parameters
    ----------
    settings
        Settings of the run.
    tokens
        Length of a row in tokens.
    tflops
        Speed of a device in TFLOP/s.
    """
    section = settings.reranker
    steps = section.curriculum_steps + section.steps
    lines = [f"{section.backbone}, LoRA r = {section.lora_r}, rows of {tokens} tokens, {section.batch_size} windows a step"]
    for devices in (1, 4):
        needs = plan(section, tokens, known_tokens(settings), devices)
        if devices == 1:
            share = needs.trainable / needs.parameters
            lines += [f"parameters  {needs.parameters:,}", f"trainable   {needs.trainable:,} ({share:.3%})", "memory of a device"]
            lines += [f"  {part:32} {size / GB:8.2f} GB" for part, size in needs.memory.items()]
            lines += [f"  {'all':32} {sum(needs.memory.values()) / GB:8.2f} GB"]
        seconds = needs.step_flops / (tflops * 1e12)
        room = "fits" if sum(needs.memory.values()) < 0.92 * 24 * GB else "does NOT fit"
        lines.append(
            f"{devices} device{'s' * (devices > 1)}: {needs.step_flops / 1e12:.1f} TFLOP a step and device, {seconds:.2f} s at "
            f"{tflops:g} TFLOP/s, {steps * seconds / 3600:.1f} h for {steps:,} steps; {room} into 24 GB"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m corec.scale.estimate", description="What a run will need, before it is started."
    )
    parser.add_argument("params", type=Path, help="parameter file, e.g. params/amazon-electronics.yaml")
    parser.add_argument("--tokens", type=int, default=2048, help="length of a row (default: the paper's maximum)")
    parser.add_argument("--tflops", type=float, default=45, help="TFLOP/s that a device reaches (default: an assumption, 45)")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    return exit_status(lambda: print(report(profiles.load(options.params), options.tokens, options.tflops)))


if __name__ == "__main__":
    sys.exit(main())
