"""The re-ranker (backbone with adapter, tokenizer, read-out head, prompter): building, saving and loading."""

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer

from corec import CorecError, backbones, files, machine
from corec.controls import Vocabulary
from corec.params import RerankerParams
from corec.reranker.fused import fuse
from corec.reranker.optimizer import kind
from corec.reranker.probes import can_pack, logit_scale, positions
from corec.reranker.prompt import Batch, Prompter, Row, collate, extend_tokenizer, index_token, new_tokens
from corec.reranker.readout import Head, Parts

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class Reranker:
    """A backbone with adapter, tokenizer, read-out head and prompter. Create it with :func:`build` or :func:`load`."""

    model: Any  # peft model, or backbone without adapter
    tokenizer: Any
    head: Head
    prompter: Prompter
    params: RerankerParams
    packs: bool = True  # requests can share a prefix (see :func:`corec.reranker.probes.can_pack`)
    logit_scale: float = 1.0  # factor of the logits (see :func:`corec.reranker.probes.logit_scale`)
    fused: Any = None  # fused layers (see :mod:`corec.reranker.fused`); None: those of transformers
    trained: bool = False  # True if training has changed the parameters
    start: dict[str, Tensor] = field(default_factory=dict, repr=False)  # initial values of the trainable parameters

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.model.parameters()).device

    @property
    def causal(self) -> Any:
        """The causal LM with its adapter, without the peft wrapper."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def supported(self) -> bool:
        """Whether a pass also gives the scores of the read-out ``candidate``, for the auxiliary loss of ``index``."""
        return self.params.auxiliary > 0 and bool(self.model.training)

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings [..., hidden] of the token ids `ids` [...], with the trainable rows of the new tokens.

        This replaces the forward of peft, which copies the whole embedding table in every pass and computes its gradient.
        """
        layer = self.causal.get_input_embeddings()
        trained = getattr(layer, "token_adapter", None)
        if trained is None or trained.merged:
            return layer(ids)
        table, rows = trained.get_base_layer(), trained.trainable_tokens_delta["default"]  # [new tokens, hidden]
        place = ids - trained.token_indices["default"][0]
        new = F.embedding(place.clamp(min=0), rows) * getattr(table, "embed_scale", 1.0)
        return torch.where((place >= 0)[..., None], new.to(table.weight.dtype), table(ids))

    def inputs(self, batch: Batch) -> Tensor:
        """Input embeddings [batch, L, hidden] of a batch, with the projected states of the retriever where it has them."""
        embedded = self.embed(batch.ids)
        if batch.soft is None or not self.params.soft_width:
            return embedded
        rows = torch.arange(len(embedded), device=embedded.device)[:, None]
        return embedded.index_put((rows, batch.starts), self.head.soft(batch.soft).to(embedded.dtype), accumulate=True)

    def states(self, embedded: Tensor, positions: Tensor | None, mask: Tensor, cache: Any = None) -> Sequence[Tensor]:
        """Hidden states of the layers that the read-out uses.

        Parameters
        ----------
        embedded
            Input embeddings [batch, L, hidden].
        positions
            Position ids [batch, L]; None for those of the model.
        mask
            Attention mask [batch, 1, L, cached + L], or padding mask [batch, L].
        cache
            Cached prefix: a transformers cache, which is read and extended, or, for the fused layers, a list of keys and
            values, which is only read (see :class:`corec.reranker.fused.Fused`).

        Returns
        -------
        States [batch, L, hidden]: of the embeddings and all layers with ``layers: mix``, otherwise of the last layer only.
        """
        mixed = (self.params.readout != "index" or self.supported) and self.params.layers == "mix"
        if self.fused is not None and positions is not None and self.fused.device == embedded.device:
            return self.fused(embedded, positions, mask, cache, every=mixed)  # type: ignore[no-any-return]
        output = self.causal.base_model(
            inputs_embeds=embedded,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
            output_hidden_states=mixed,
        )
        return output.hidden_states if mixed else (output.last_hidden_state,)

    def index_logits(self, states: Tensor, k: int) -> Tensor:
        """Logits [..., k] of the index tokens of the first `k` candidates, from the last layer's `states` [..., hidden].

        Only these rows of the output layer are multiplied. The scale, bias and soft cap of the backbone are applied.
        """
        layer = self.causal.get_output_embeddings()
        index_ids = torch.tensor(self.tokenizer.convert_tokens_to_ids([index_token(i) for i in range(k)]), device=states.device)
        trained = getattr(layer, "token_adapter", None)
        if trained is None or trained.merged:
            rows = layer.weight[index_ids]
        else:
            rows = trained.trainable_tokens_delta["default"][index_ids - trained.token_indices["default"][0]]
        logits = states @ rows.T.to(states.dtype)
        bias = getattr(layer, "bias", None)
        logits = (logits if bias is None else logits + bias[index_ids]).float() * self.logit_scale
        cap = getattr(self.causal.config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits

    def forward(self, rows: Sequence[Row], strength: float = 1.0) -> Tensor:
        """Scores [rows, R, K] of the rows in one forward pass. All rows must have the same R and the same K.

        `strength` is the weight of the control term against prior and relevance (1: as trained).
        """
        parts, prior = self.parts(rows)
        return parts.scores(prior, strength)

    def parts(self, rows: Sequence[Row]) -> tuple[Parts, Tensor | None]:
        """Parts of the scores of the rows, and their prior [rows, K] if the model has one."""
        batch = collate(rows, self.tokenizer.pad_token_id, self.params.pooling, self.device)
        embedded = self.inputs(batch)
        layers = self.states(embedded, batch.positions, batch.mask) if self.packs else self.states(embedded, None, batch.real)
        prior = batch.prior if self.params.prior else None
        if self.params.readout == "index":
            last = layers[-1][torch.arange(len(rows), device=self.device)[:, None], batch.answers]  # [rows, R, hidden]
            parts = self.index_parts(self.index_logits(last, len(rows[0].spans)))
            if self.supported:
                parts = parts._replace(auxiliary=self.head.relevance(self.head.pool(batch.candidates, layers)).transpose(1, 2))
            return parts, prior
        return self.head_parts(batch, layers), prior

    def index_parts(self, logits: Tensor) -> Parts:
        """Parts of the read-out `index`: the logits [..., R, K] are the control term, the gate of a prior is 1."""
        gate = torch.ones_like(logits[..., 0]) if self.params.prior else None
        return Parts(torch.zeros_like(logits[..., :1, :]), logits, gate)

    def head_parts(self, batch: Batch, layers: Sequence[Tensor], candidates: Tensor | None = None) -> Parts:
        """Parts of the scores by the head, from the states of the layers [batch, L, hidden].

        `candidates` are the states of the candidates [batch, K, hidden] if the batch contains the requests only.
        """
        r, separately = batch.requests.shape[1], self.params.control == "constraints"
        weights = [batch.requests, *([batch.constraints.flatten(1, 2)] if separately else [])]
        pooled = self.head.pool(torch.cat([*([batch.candidates] if candidates is None else []), *weights], dim=1), layers)
        if candidates is None:
            candidates, pooled = pooled.tensor_split([batch.candidates.shape[1]], dim=1)
        if not separately:
            return self.head(candidates, pooled)
        constraints = pooled[:, r:].unflatten(1, batch.constraints.shape[1:3])
        present = (batch.constraints > 0).any(dim=-1)[..., None]
        return self.head(candidates, pooled[:, :r], constraints * present)

    @torch.no_grad()
    def reset(self) -> None:
        """Restore the initial values of the trainable parameters if training has changed them, and remove their gradients."""
        values = self.trainable()
        for value in values.values():
            value.grad = None
        if self.trained:
            for name, start in self.start.items():
                values[name].copy_(start)
        self.trained = False

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters of the model and, unless the read-out is ``index`` alone, of the head, by name."""
        named = {f"model.{name}": value for name, value in self.model.named_parameters() if value.requires_grad}
        if self.params.readout != "index" or self.params.auxiliary:
            named |= {f"head.{name}": value for name, value in self.head.named_parameters()}
        return named


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Suppress a deprecation warning that peft triggers in transformers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def build(
    items: pd.DataFrame,
    vocabulary: Vocabulary,
    params: RerankerParams,
    seed: int,
    adapted: bool = True,
    device: str | None = None,
) -> Reranker:
    """Build an untrained re-ranker on a pretrained backbone.

    Parameters
    ----------
    items
        Items table of stage 01.
    vocabulary
        Vocabulary of stage 03.
    params
        Backbone, adapter, prompt and read-out.
    seed
        Seed of torch, for the initial weights of adapter and head.
    adapted
        Add trainable rows for the new tokens and LoRA on the seven projections of the paper, or on all linear layers if
        the architecture names its projections otherwise. Without it, the model is the zero-shot baseline.
    device
        Device of the model. By default the GPU, or the CPU if there is none.

    Raises
    ------
    CorecError
        If peft has no LoRA for the architecture.
    """
    torch.manual_seed(seed)
    model, tokenizer = backbones.load(params.backbone, machine.resolve_dtype(params.dtype))
    packs = can_pack(model)
    if not packs and params.request_position == "after":
        warnings.warn(
            f"{type(model).__name__} cannot share a prefix among requests: each request is computed separately.", stacklevel=2
        )
    scale = logit_scale(model) if params.readout == "index" else 1.0
    added = extend_tokenizer(model, tokenizer, new_tokens(vocabulary, params))
    if adapted:
        model = adapt(model, added, params)
        if params.lr_rows == 0:
            for name, value in model.named_parameters():
                value.requires_grad_(value.requires_grad and kind(f"model.{name}") != "rows")
        if params.gradient_checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    head = Head(model.config.hidden_size, model.config.num_hidden_layers + 1, params)
    device = device or machine.device()
    prompter = Prompter(tokenizer, items, vocabulary, params, positions(model.config, packs))
    model = model.to(device)
    fused = fuse(model.get_base_model()) if adapted and fuses(model, params, packs) else None
    reranker = Reranker(model, tokenizer, head.to(device), prompter, params, packs, scale, fused)
    reranker.start = {name: value.detach().clone() for name, value in reranker.trainable().items()} if adapted else {}
    return reranker


def fuses(model: Any, params: RerankerParams, packs: bool) -> bool:
    """Whether a model with an adapter is to be fused.

    It is on a CPU, without gradient checkpointing, which needs its modules, and without dropout of its own.
    """
    dropout = any(getattr(model.config, name, 0) for name in ("attention_dropout", "attn_pdrop", "resid_pdrop", "hidden_dropout"))
    return packs and model.device.type == "cpu" and not params.gradient_checkpointing and not dropout


def adapt(model: Any, added: list[int], params: RerankerParams) -> Any:
    """Wrap the backbone in a peft model with LoRA on its projections and trainable rows for the new tokens.

    Parameters
    ----------
    model
        Causal LM of Hugging Face.
    added
        Ids of the new tokens.
    params
        LoRA rank, alpha and dropout, and the read-out.

    Raises
    ------
    CorecError
        If peft has no LoRA for the architecture.
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
            f"Parameter reranker.backbone: {type(model).__name__} does not support LoRA ({error}): choose another model."
        ) from error


def token_layers(model: Any, added: list[int], readout: str) -> dict[str, list[int]]:
    """Value of peft's ``trainable_token_indices``: the tokens `added`, by name of the layer that holds their rows.

    The layers are the input embedding and, if it is not tied and the read-out is ``index``, the output layer.
    """
    layers = {"input": model.get_input_embeddings()}
    if not model.config.tie_word_embeddings and readout == "index":
        layers["output"] = model.get_output_embeddings()
    names = {id(module): name.rsplit(".", 1)[-1] for name, module in model.named_modules()}
    return {names[id(layer)]: added for layer in layers.values()}


def zero_shot(items: pd.DataFrame, vocabulary: Vocabulary, params: RerankerParams) -> Reranker:
    """Build the zero-shot baseline: the backbone without adapter, read-out `index`, attribute values as words.

    The row of an attribute's token is the mean of the rows of its name, so the model reads the token as that name.
    """
    plain = {
        "readout": "index",
        "request_position": "after",
        "values": "words",
        "control": "request",
        "prior": False,
        "loss": "ranknet",
        "soft_width": 0,
        "auxiliary": 0,
    }
    return build(items, vocabulary, params.model_copy(update=plain), seed=0, adapted=False)


def save(reranker: Reranker, curve: pd.DataFrame, folder: Path) -> list[Path]:
    """Write the adapter (peft format), the tokenizer, the head and the learning curve to `folder`.

    Returns
    -------
    Paths of the adapter's weights, the head's weights and the curve.
    """
    adapter = folder / "adapter"
    with files.aside(adapter) as part:
        reranker.model.save_pretrained(part, save_embedding_layers=False)
        reranker.tokenizer.save_pretrained(part)
    with files.aside(folder / "head.safetensors") as part:
        save_file(reranker.head.state_dict(), part)
    files.write_parquet(folder / "curve.parquet", curve)
    return [adapter / "adapter_model.safetensors", folder / "head.safetensors", folder / "curve.parquet"]


def require_adapter(folder: Path) -> None:
    """Raise CorecError if `folder` contains no adapter."""
    if not (folder / "adapter" / "adapter_config.json").exists():
        raise CorecError(f"{folder} contains no adapter: run notebooks/04_reranker.ipynb first.")


def saved_dtype(folder: Path) -> str:
    """Name of the dtype in which the adapter in `folder` was trained, such as ``bfloat16``."""
    with safe_open(folder / "adapter" / "adapter_model.safetensors", "pt") as weights:
        return str(weights.get_tensor(next(iter(weights.keys()))).dtype).removeprefix("torch.")


def load(folder: Path, items: pd.DataFrame, vocabulary: Vocabulary, params: RerankerParams) -> Reranker:
    """Load a re-ranker written by :func:`save`. It gives the same scores as the saved one.

    Parameters
    ----------
    folder
        Folder passed to :func:`save`.
    items, vocabulary, params
        As passed to :func:`build`.

    Raises
    ------
    CorecError
        If the folder contains no adapter.
    """
    require_adapter(folder)
    bare = build(items, vocabulary, params.model_copy(update={"dtype": saved_dtype(folder)}), seed=0, adapted=False)
    with quiet_peft():
        model = PeftModel.from_pretrained(bare.model, str(folder / "adapter"), autocast_adapter_dtype=False)
    bare.head.load_state_dict(load_file(folder / "head.safetensors"))
    model = model.to(bare.device)
    fused = fuse(model.get_base_model()) if fuses(model, params, bare.packs) else None
    return Reranker(model, bare.tokenizer, bare.head, bare.prompter, params, bare.packs, bare.logit_scale, fused)


def trained_tokens(folder: Path) -> list[str]:
    """New tokens of a re-ranker written by :func:`save` to `folder`, in the order of the rows of its adapter.

    Raises
    ------
    CorecError
        If the folder contains no adapter.
    """
    require_adapter(folder)
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    ids = next(iter(config["trainable_token_indices"].values()))
    return list(AutoTokenizer.from_pretrained(folder / "adapter").convert_ids_to_tokens(ids))
