"""What a run may be told: one frozen model a stage, read from ``params/*.yaml`` or a notebook's parameters.

Unknown names are refused with the nearest right one, so that a misspelt parameter never passes unnoticed.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from corec import CorecError


class Model(BaseModel):
    """Frozen, and strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DataParams(Model):
    """Stage 01: which interactions, and how they are split."""

    source: str = "ml-100k"  # a name in corec.data.SOURCES
    path: str | None = None  # a folder with the source's files, instead of the download
    category: str | None = None  # amazon-2018: as in the files' names, e.g. Electronics
    reviews: Literal["full", "5-core"] = "full"  # amazon-2018: all reviews, or those of the 5-core
    url: str = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2"  # amazon-2018: where the files are
    sha256: dict[str, str] = {}  # name of a downloaded file -> what its digest must be
    required: list[str] = []  # an item must have all of these, else it and its interactions are left out
    brand: Literal["as_is", "normalised"] = "as_is"  # normalised: without case, `by` and names for `unknown`
    tagger: str | None = None  # a backbone that tags, zero-shot, the items that have no category
    tags: list[str] = []  # what it may say; when empty, the 20 most frequent categories of the others

    @property
    def name(self) -> str:
        """What results call the data set."""
        return f"{self.source}/{self.category}" if self.category else self.source

    protocol: Literal["paper", "leave-one-out"] = "leave-one-out"
    window: int = Field(6, ge=2)  # history items shown to the re-ranker (training with `paper`: one fewer)
    core: int = Field(5, ge=1)  # leave-one-out: every user and item keeps at least so many interactions
    min_interactions: int = Field(30, ge=3)  # paper: users with fewer are dropped
    max_users: int = Field(3000, ge=1)  # paper: the users with the most interactions
    latest: int = Field(50, ge=3)  # paper: each user's latest interactions


Order = Literal["index, before", "candidate, before", "index, after", "late, after"]  # read-out and place of the request

# By stage: what changes how a result is computed or kept, or what is compared beside it, but not the result.
WITHOUT_EFFECT = {
    "sasrec": {"compare_seconds", "compare_seeds"},
    "reranker": {
        "micro_batch",
        "eval_batch_size",
        "gradient_checkpointing",
        "checkpoint_steps",
        "compare_steps",
        "compare_minutes",
        "compare_orders",
        "compare_rates",
        "compare_seeds",
    },
}


class SasrecParams(Model):
    """Stage 02: the retriever."""

    hidden: int = Field(64, ge=1)
    layers: int = Field(2, ge=1)
    heads: int = Field(2, ge=1)
    dropout: float = Field(0.3, ge=0, lt=1)
    max_length: int = Field(100, ge=2)  # latest interactions that the model sees
    # Full softmax; softmax against sampled items; gSASRec's generalised binary cross-entropy; the original, one negative.
    loss: Literal["ce", "sampled", "gbce", "bce"] = "ce"
    negatives: int = Field(256, ge=1)  # sampled, gbce: items drawn for each sequence
    gbce_t: float = Field(0.75, ge=0, le=1)  # gbce: 0 is plain binary cross-entropy, 1 calibrated as the full softmax
    lr: float = Field(1e-3, gt=0)
    beta2: float = Field(0.999, gt=0, lt=1)  # of AdamW; the original takes 0.98
    batch_size: int = Field(64, ge=1)
    epochs: int = Field(100, ge=1)
    patience: int = Field(10, ge=1)  # epochs without a better validation NDCG@10 before it stops
    decay: bool = False  # the learning rate falls linearly to 0 over `epochs` (and warms up within the first)
    # Batches of like length, softmax in blocks, dropout from bytes: several times faster, with other random numbers.
    fast: bool = False
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # fast, ce: of the products with the item table
    compare_seconds: float = Field(0, ge=0)  # also train all four losses at three rates for so long each, to compare them
    compare_seeds: int = Field(0, ge=0)  # also train with so many seeds (`seed` and the next ones), to see the spread
    top_k: int = Field(50, ge=1)  # candidates written for every window


class MaxWindows(Model):
    """Windows of each split that are re-ranked at the most; a random sample where there are more."""

    train: int = Field(20000, ge=1)
    valid: int = Field(200, ge=1)
    test: int = Field(1000, ge=1)


class ControlsParams(Model):
    """Stage 03: attributes, candidates and requests."""

    scheme: str = "movielens"  # corec/schemes/<name>.yaml, or the path of a YAML file
    attributes: list[str] | None = None  # those under control; all of the scheme when empty
    protocol: Literal["oracle", "random-candidate", "catalogue"] = "random-candidate"
    k: int = Field(20, ge=2, le=50)  # candidates that are re-ranked
    n_tokens: list[NonNegativeInt] = [0, 1, 2, 3]  # constraints per request that are trained and evaluated
    # Training windows: keep all; keep those whose true next item was retrieved; or put a missing one in for the
    # last candidate (which teaches that unlikely items are the true ones).
    train_truth: Literal["any", "retrieved", "inserted"] = "retrieved"
    max_windows: MaxWindows = MaxWindows()


class RerankerParams(Model):
    """Stage 04: the language model and its training."""

    backbone: str = "smollm2-135m"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: the faster on this machine
    readout: Literal["index", "candidate", "late"] = "late"
    pooling: Literal["end", "mean"] = "mean"  # candidate, late: state of the line's last token, or of all its tokens
    layers: Literal["last", "mix"] = "mix"  # candidate, late: states of the last layer, or a learned mix of all
    head_width: int = Field(64, ge=1)  # late: width of the two projections P and Q
    request_position: Literal["before", "after"] = "after"
    values: Literal["token", "words"] = "token"  # an attribute value is one new token, or plain words
    title_tokens: int = Field(12, ge=1)  # longer titles are cut
    lora_r: int = Field(8, ge=1)
    lora_alpha: int = Field(16, ge=1)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    lr: float = Field(1e-3, gt=0)  # adapter
    lr_head: float = Field(1e-3, gt=0)  # read-out head
    lr_rows: float = Field(1e-2, gt=0)  # embedding rows of the new tokens
    warmup: float = Field(0.02, ge=0, le=1)  # share of the steps
    steps: int = Field(100, ge=1)  # optimiser steps on the whole prompt
    curriculum_steps: int = Field(60, ge=0)  # before them: attributes only, no history, short requests first
    max_minutes: float = Field(30, gt=0)  # training ends here at the latest, its schedule cut to fit
    batch_size: int = Field(4, ge=1)  # windows a step
    micro_batch: int = Field(2, ge=1)  # of them in memory at once; the gradient is that of the whole batch
    requests_per_window: int = Field(16, ge=1)
    truth_bonus: bool = True  # the true next item earns one point in the control score
    gradient_checkpointing: bool = False
    checkpoint_steps: int = Field(20, ge=1)
    eval_batch_size: int = Field(8, ge=1)
    compare_steps: int = Field(0, ge=0)  # also train every read-out for so many plain steps, to compare them
    compare_minutes: float = Field(0, ge=0)  # also train read-outs before and after for so long each, to compare them
    compare_orders: list[Order] = []  # these alone of them
    compare_rates: list[PositiveFloat] = Field([1.0], min_length=1)  # the learning rates times these, the best on validation kept
    compare_seeds: int = Field(3, ge=1)  # with so many seeds each


class EvaluationParams(Model):
    """Stage 05: metrics."""

    ks: list[PositiveInt] = [1, 3, 5, 10]
    bootstrap: int = Field(1000, ge=10)  # resamples of the users
    confidence: float = Field(0.95, gt=0, lt=1)
    zero_shot: bool = True


class FiguresParams(Model):
    """Stage 06: the cut-off at which the figures are drawn."""

    k: int = Field(5, ge=1)


class EfficiencyParams(Model):
    """Stage 09: what is timed."""

    ks: list[PositiveInt] = Field([10, 20, 50], min_length=1)  # candidates re-ranked
    repeats: int = Field(20, ge=2)  # calls of each, for the percentiles
    users: int = Field(16, ge=1)  # test users of the throughput
    usd_per_hour: float = Field(0.10, gt=0)  # what an hour of the machine costs: state yours


class Params(Model):
    """All of a run."""

    run: str = Field("tiny", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0)
    data: DataParams = DataParams()
    sasrec: SasrecParams = SasrecParams()
    controls: ControlsParams = ControlsParams()
    reranker: RerankerParams = RerankerParams()
    evaluation: EvaluationParams = EvaluationParams()
    figures: FiguresParams = FiguresParams()
    efficiency: EfficiencyParams = EfficiencyParams()


def validate(values: Mapping[str, Any], origin: str) -> Params:
    """Check a run's parameters.

    Raises
    ------
    CorecError
        One sentence for the first fault: a misspelt name with the nearest right one, or a value out of range.
    """
    try:
        params = Params.model_validate(values)
    except ValidationError as error:
        fault = error.errors()[0]
        *stage, name = (str(part) for part in fault["loc"])
        full = ".".join([*stage, name])
        if fault["type"] == "extra_forbidden":
            field: Any = Params
            for part in stage:
                field = field.model_fields[part].annotation
            near = difflib.get_close_matches(name, field.model_fields, n=1, cutoff=0)[0]
            raise CorecError(f"{origin}: there is no parameter {full!r}: did you mean {near!r}?") from None
        raise CorecError(f"{origin}: parameter {full!r} is {fault['input']!r}: {fault['msg']}.") from None
    if params.sasrec.top_k < params.controls.k:
        raise CorecError(
            f"{origin}: sasrec.top_k is {params.sasrec.top_k}, fewer than the {params.controls.k} candidates of "
            "controls.k: raise sasrec.top_k or lower controls.k."
        )
    if sorted(set(lengths := params.controls.n_tokens)) != sorted(lengths) or 0 not in lengths or len(lengths) < 2:
        raise CorecError(
            f"{origin}: controls.n_tokens is {lengths}: list 0 (no request) and at least one other number, each once."
        )
    if (k := params.figures.k) not in params.evaluation.ks or k >= params.controls.k:
        raise CorecError(
            f"{origin}: figures.k is {k}: choose one of evaluation.ks ({params.evaluation.ks}) below controls.k "
            f"({params.controls.k})."
        )
    if (k := max(params.efficiency.ks)) > 50:
        raise CorecError(f"{origin}: efficiency.ks lists {k}: the re-ranker takes at most 50 candidates, name no more.")
    if params.reranker.readout == "candidate" and params.reranker.request_position == "after":
        raise CorecError(
            f"{origin}: reranker.readout 'candidate' reads states that must have seen the request: "
            "set reranker.request_position to 'before'."
        )
    if params.reranker.readout == "late" and params.reranker.request_position == "before":
        raise CorecError(
            f"{origin}: reranker.readout 'late' compares candidates with a request that follows them: "
            "set reranker.request_position to 'after'."
        )
    return params


def load(path: str | Path) -> Params:
    """The parameters of a YAML file (raises CorecError as :func:`validate` does, or when there is no such file)."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise CorecError(f"There is no parameter file {path}: `ls params` lists those that come with COREC.") from None
    except (OSError, UnicodeDecodeError):
        raise CorecError(f"{path} is no readable text file: give one of the YAML files in params/.") from None
    except yaml.YAMLError as error:
        raise CorecError(f"{path} is not YAML ({str(error).splitlines()[0]}): mend that line.") from None
    if not isinstance(values, dict):
        raise CorecError(f"{path} holds no parameters: write `name: value` lines.")
    return validate(values, str(path))


def from_notebook(namespace: Mapping[str, Any]) -> Params:
    """The parameters that a notebook's tagged cell and papermill have set, from its ``globals()``.

    Every plain value (text, number, list, mapping) whose name has no leading underscore counts as a parameter,
    so call this before any other variable is made.
    """
    plain = (str, int, float, bool, list, dict, type(None))
    given = {
        name: value
        for name, value in namespace.items()
        if isinstance(value, plain) and not name.startswith("_") and name not in ("In", "Out")
    }
    return validate(given, "this notebook")
