"""The re-ranker: a backbone with adapter, tokenizer, read-out head and prompter; built, saved and loaded."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from corec import CorecError, backbones, machine
from corec.controls import Vocabulary
from corec.params import RerankerParams
from corec.reranker.probes import can_pack, logit_scale, positions
from corec.reranker.prompt import Prompter, Row, collate, extend_tokenizer, index_token, new_tokens
from corec.reranker.readout import Head

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class Reranker:
    """A backbone with adapter, tokenizer, read-out head and prompter. Made by :func:`build` or :func:`load`."""

    model: Any  # peft's model, or the bare backbone
    tokenizer: Any
    head: Head
    prompter: Prompter
    params: RerankerParams
    packs: bool = True  # the architecture lets requests share a prefix (see :func:`can_pack`)
    logit_scale: float = 1.0  # what the backbone multiplies its logits by (see :func:`logit_scale`)
    fused: Any = None  # the backbone's layers in fewer operations, for scoring (see :func:`corec.reranker.engine.merge`)
    trained: bool = False  # a training has moved its parameters
    start: dict[str, Tensor] = field(default_factory=dict, repr=False)  # what :func:`build` gave to the trainable parameters

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return next(self.model.parameters()).device

    @property
    def causal(self) -> Any:
        """The causal LM, its adapter in place, without peft's wrapping."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings [..., hidden] of `ids` [...], with the trained rows of the new tokens.

        peft would write those rows into a copy of the whole table in every pass, and differentiate by all of it.
        """
        layer = self.causal.get_input_embeddings()
        trained = getattr(layer, "token_adapter", None)
        if trained is None or trained.merged:
            return layer(ids)
        table, rows = trained.get_base_layer(), trained.trainable_tokens_delta["default"]  # [new tokens, hidden]
        place = ids - trained.token_indices["default"][0]
        new = F.embedding(place.clamp(min=0), rows) * getattr(table, "embed_scale", 1.0)
        return torch.where((place >= 0)[..., None], new.to(table.weight.dtype), table(ids))

    def states(self, ids: Tensor, positions: Tensor | None, mask: Tensor, cache: Any = None) -> Sequence[Tensor]:
        """States [batch, L, hidden] of those layers that the read-out takes.

        A transformers `cache` is read and added to; the fused layers also take the kept keys and values themselves, which
        are only read (see :class:`corec.fused.Fused`).
        """
        mixed = self.params.readout != "index" and self.params.layers == "mix"
        if self.fused is not None and positions is not None:
            return self.fused(self.embed(ids), positions, mask, cache, every=mixed)  # type: ignore[no-any-return]
        output = self.causal.base_model(
            inputs_embeds=self.embed(ids),
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
            output_hidden_states=mixed,
        )
        return output.hidden_states if mixed else (output.last_hidden_state,)

    def index_logits(self, states: Tensor, k: int) -> Tensor:
        """Logits [..., k] of the first `k` candidates' index tokens at `states` [..., hidden], and of nothing else."""
        layer = self.causal.get_output_embeddings()
        wanted = torch.tensor(self.tokenizer.convert_tokens_to_ids([index_token(i) for i in range(k)]), device=states.device)
        trained = getattr(layer, "token_adapter", None)
        if trained is None or trained.merged:
            rows = layer.weight[wanted]
        else:
            rows = trained.trainable_tokens_delta["default"][wanted - trained.token_indices["default"][0]]
        logits = states @ rows.T.to(states.dtype)
        bias = getattr(layer, "bias", None)
        logits = (logits if bias is None else logits + bias[wanted]).float() * self.logit_scale
        cap = getattr(self.causal.config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits

    def forward(self, rows: Sequence[Row]) -> Tensor:
        """Scores [rows, R, K] of rows with equally many requests and candidates, in one forward pass."""
        batch = collate(rows, self.tokenizer.pad_token_id, self.params.pooling, self.device)
        layers = self.states(batch.ids, batch.positions, batch.mask) if self.packs else self.states(batch.ids, None, batch.real)
        if self.params.readout == "index":
            last = layers[-1][torch.arange(len(rows), device=self.device)[:, None], batch.answers]  # [rows, R, hidden]
            return self.index_logits(last, len(rows[0].spans))
        pooled = self.head.pool(torch.cat([batch.candidates, batch.requests], dim=1), layers)
        return self.head(*pooled.split([batch.candidates.shape[1], batch.requests.shape[1]], dim=1))

    @torch.no_grad()
    def reset(self) -> None:
        """Give the trainable parameters the values that :func:`build` gave them, where a training has moved them."""
        if self.trained:
            for name, value in self.trainable().items():
                value.copy_(self.start[name])
        self.trained = False

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters that training moves, by name."""
        named = {f"model.{name}": value for name, value in self.model.named_parameters() if value.requires_grad}
        if self.params.readout != "index":
            named |= {f"head.{name}": value for name, value in self.head.named_parameters()}
        return named


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Hide a warning that peft's use of transformers sets off, and that no user can act on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def build(
    items: pd.DataFrame,
    table: Vocabulary,
    params: RerankerParams,
    seed: int,
    adapted: bool = True,
    device: str | None = None,
) -> Reranker:
    """A re-ranker on a fresh backbone.

    Parameters
    ----------
    items, table
        Of stages 01 and 03.
    adapted
        Add LoRA (on the paper's seven projections, or on all linear layers where the architecture names them otherwise)
        and trainable rows for the new tokens; without, the model is the zero-shot baseline.
    device
        Where it goes; without one, to a GPU where there is one.
    """
    torch.manual_seed(seed)
    model, tokenizer = backbones.load(params.backbone, machine.resolve_dtype(params.dtype))
    packs = can_pack(model)
    if not packs and params.request_position == "after":
        warnings.warn(
            f"{type(model).__name__} cannot share a prefix among requests: each request is computed by itself.", stacklevel=2
        )
    scale = logit_scale(model) if params.readout == "index" else 1.0
    added = extend_tokenizer(model, tokenizer, new_tokens(table, params))
    if adapted:
        model = adapt(model, added, params)
        if params.gradient_checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    head = Head(model.config.hidden_size, model.config.num_hidden_layers + 1, params)
    device = device or machine.device()
    prompter = Prompter(tokenizer, items, table, params, positions(model.config, packs))
    reranker = Reranker(model.to(device), tokenizer, head.to(device), prompter, params, packs, scale)
    reranker.start = {name: value.detach().clone() for name, value in reranker.trainable().items()} if adapted else {}
    return reranker


def adapt(model: Any, added: list[int], params: RerankerParams) -> Any:
    """The backbone with LoRA on its projections and trainable rows for the tokens `added`.

    Raises
    ------
    CorecError
        When peft has no LoRA for the architecture.
    """
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    lora = LoraConfig(
        r=params.lora_r,
        lora_alpha=params.lora_alpha,
        lora_dropout=params.lora_dropout,
        target_modules=TARGETS if names.issuperset(TARGETS) else "all-linear",
        trainable_token_indices=token_layers(model, added, params.readout),
        task_type="CAUSAL_LM",
    )
    try:
        with quiet_peft():
            return get_peft_model(model, lora, autocast_adapter_dtype=False)
    except ValueError as error:
        raise CorecError(
            f"Parameter reranker.backbone: {type(model).__name__} takes no LoRA ({error}): choose another model."
        ) from error


def token_layers(model: Any, added: list[int], readout: str) -> dict[str, list[int]]:
    """peft's ``trainable_token_indices``: the input embedding, and where it is untied and read the output layer too."""
    layers = {"input": model.get_input_embeddings()}
    if not model.config.tie_word_embeddings and readout == "index":
        layers["output"] = model.get_output_embeddings()
    names = {id(module): name.rsplit(".", 1)[-1] for name, module in model.named_modules()}
    return {names[id(layer)]: added for layer in layers.values()}


def zero_shot(items: pd.DataFrame, table: Vocabulary, params: RerankerParams) -> Reranker:
    """The bare backbone as a re-ranker: read-out `index`, values in plain words, nothing trained.

    A new token's row is the mean of its words', so it reads an attribute's name as that word.
    """
    plain = {"readout": "index", "request_position": "after", "values": "words"}
    return build(items, table, params.model_copy(update=plain), seed=0, adapted=False)


def save(reranker: Reranker, curve: pd.DataFrame, folder: Path) -> list[Path]:
    """Write the adapter in peft's own format, the tokenizer, the head and the learning curve; returns the files."""
    adapter = folder / "adapter"
    reranker.model.save_pretrained(adapter, save_embedding_layers=False)
    reranker.tokenizer.save_pretrained(adapter)
    save_file(reranker.head.state_dict(), folder / "head.safetensors")
    curve.to_parquet(folder / "curve.parquet", index=False)
    return [adapter / "adapter_model.safetensors", folder / "head.safetensors", folder / "curve.parquet"]


def load(folder: Path, items: pd.DataFrame, table: Vocabulary, params: RerankerParams) -> Reranker:
    """A saved re-ranker on its backbone; gives the same scores as the one that was saved.

    Raises
    ------
    CorecError
        When the folder holds no adapter.
    """
    if not (folder / "adapter" / "adapter_config.json").exists():
        raise CorecError(f"{folder} holds no adapter: run notebooks/04_reranker.ipynb first.")
    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")  # as it was trained, should `auto` now differ
    bare = build(items, table, params.model_copy(update={"dtype": dtype}), seed=0, adapted=False)
    with quiet_peft():
        model = PeftModel.from_pretrained(bare.model, str(folder / "adapter"), autocast_adapter_dtype=False)
    bare.head.load_state_dict(load_file(folder / "head.safetensors"))
    return Reranker(model.to(bare.device), bare.tokenizer, bare.head, bare.prompter, params, bare.packs, bare.logit_scale)


@torch.inference_mode()
def token_rows(reranker: Reranker, tokens: Iterable[str]) -> pd.DataFrame:
    """Embedding rows of some tokens, one a row, as they are now."""
    tokens = list(tokens)
    ids = torch.tensor(reranker.tokenizer.convert_tokens_to_ids(tokens), device=reranker.device)
    return pd.DataFrame(reranker.model.get_input_embeddings()(ids).float().cpu().numpy(), index=tokens)


def row_drift(before: pd.DataFrame, after: pd.DataFrame) -> pd.Series:
    """How far each token's row has moved, as a share of the length it had."""
    return pd.Series(np.linalg.norm(after - before, axis=1) / np.linalg.norm(before, axis=1), index=before.index)
