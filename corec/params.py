"""The parameters of a run: one frozen model for each stage, with defaults and cross-checks.

Unknown names are refused with the nearest right one, so that a misspelt parameter never passes unnoticed. How a run's file
and a notebook's cells become :class:`Params` is in :mod:`corec.profiles`.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError, model_validator

from corec import CorecError


class Model(BaseModel):
    """Base of all parameters: frozen, and strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def checked(cls, values: Mapping[str, Any], origin: str = "parameters") -> Self:
        """Build the model from `values`.

        Raises
        ------
        CorecError
            One sentence for the first fault: a misspelt name with the nearest right one, a value out of range, or values that do
            not go together. It begins with `origin`.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise CorecError(f"{origin}: {first_fault(cls, error)}") from None

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with other values. Unlike pydantic's, it runs all checks (raises CorecError)."""
        values = {name: getattr(self, name) for name in type(self).model_fields} | dict(update or {})
        return self.checked(values)


def first_fault(model: type[BaseModel], error: ValidationError) -> str:
    """What is wrong with the first faulty value of a `model`, as a sentence that names the parameter."""
    fault = error.errors()[0]
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    *stage, name = (str(part) for part in fault["loc"])
    full = ".".join([*stage, name])
    if fault["type"] == "extra_forbidden":
        field: Any = model
        for part in stage:
            field = field.model_fields[part].annotation
        near = difflib.get_close_matches(name, field.model_fields, n=1, cutoff=0)[0]
        return f"there is no parameter {full!r}: did you mean {near!r}?"
    return f"parameter {full!r} is {fault['input']!r}: {fault['msg']}."


class DataParams(Model):
    """Stage 01: which interactions, and how they are split."""

    source: str = "ml-100k"  # a name in corec.data.SOURCES
    path: str | None = None  # a folder with the source's files, instead of the download; relative to the project's folder
    category: str | None = None  # amazon-2018: as in the files' names, e.g. Electronics
    reviews: Literal["full", "5-core"] = "full"  # amazon-2018: all reviews, or those of the 5-core
    url: str = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2"  # amazon-2018: where the files are
    sha256: dict[str, str] = {}  # name of a downloaded file -> what its digest must be
    required: list[str] = []  # an item must have all of these, else it and its interactions are left out
    brand: Literal["as_is", "normalised"] = "as_is"  # normalised: without case, `by` and names for `unknown`
    tagger: str | None = None  # a backbone that tags, zero-shot, the items that have no category
    tags: list[str] = []  # what it may say; when empty, the 20 most frequent categories of the others
    protocol: Literal["paper", "leave-one-out"] = "leave-one-out"
    window: int = Field(6, ge=2)  # history items shown to the re-ranker (training with `paper`: one fewer)
    core: int = Field(5, ge=1)  # leave-one-out: every user and item keeps at least so many interactions
    min_interactions: int = Field(30, ge=3)  # paper: users with fewer are dropped
    max_users: int = Field(3000, ge=1)  # paper: the users with the most interactions
    latest: int = Field(50, ge=3)  # paper: each user's latest interactions

    @property
    def dataset(self) -> str:
        """What results call the data set."""
        if self.source == "files" and self.path:
            return Path(self.path).name
        return f"{self.source}/{self.category}" if self.category else self.source

    @model_validator(mode="after")
    def _files_have_a_folder(self) -> Self:
        if self.source == "files" and self.path is None:
            raise ValueError("parameter 'data.path' is empty: name the folder of your .inter and .item file.")
        if self.tagger and "category" in self.required:
            raise ValueError("parameter 'data.required' names category, which drops all that data.tagger would tag: take it out.")
        return self


# By stage: parameters that change memory and speed of a stage, but not its result.
WITHOUT_EFFECT = {"reranker": {"micro_batch", "eval_batch_size", "gradient_checkpointing", "checkpoint_steps"}}


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
    top_k: int = Field(50, ge=1)  # candidates written for every window

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> Self:
        if self.hidden % self.heads:
            raise ValueError(
                f"parameter 'sasrec.hidden' ({self.hidden}) is not a multiple of sasrec.heads ({self.heads}): change one of them."
            )
        return self


class MaxWindows(Model):
    """Windows of each split that are re-ranked at the most; a random sample where there are more."""

    train: int = Field(20000, ge=1)
    valid: int = Field(200, ge=1)
    test: int = Field(1000, ge=1)


class ControlsParams(Model):
    """Stage 03: attributes, candidates and requests."""

    scheme: str = "movielens"  # corec/schemes/<name>.yaml, or a YAML file; relative to the project's folder
    attributes: list[str] | None = None  # those under control; all of the scheme when empty
    protocol: Literal["oracle", "random-candidate", "catalogue"] = "random-candidate"
    k: int = Field(20, ge=2, le=50)  # candidates that are re-ranked
    n_tokens: list[NonNegativeInt] = [0, 1, 2, 3]  # constraints per request that are trained and evaluated
    # Training windows: keep all; keep those whose true next item was retrieved; or put a missing one in for the
    # last candidate (which teaches that unlikely items are the true ones).
    train_truth: Literal["any", "retrieved", "inserted"] = "retrieved"
    max_windows: MaxWindows = MaxWindows()

    @model_validator(mode="after")
    def _lengths_differ(self) -> Self:
        lengths = self.n_tokens
        if sorted(set(lengths)) != sorted(lengths) or 0 not in lengths or len(lengths) < 2:
            raise ValueError(
                f"parameter 'controls.n_tokens' is {lengths}: list 0 (no request) and at least one other number, each once."
            )
        return self


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
    zero_shot: bool = True  # also score with the bare backbone, for comparison

    @model_validator(mode="after")
    def _readout_fits_the_order(self) -> Self:
        if self.readout == "candidate" and self.request_position == "after":
            raise ValueError(
                "parameter 'reranker.readout' 'candidate' reads states that must have seen the request: "
                "set reranker.request_position to 'before'."
            )
        if self.readout == "late" and self.request_position == "before":
            raise ValueError(
                "parameter 'reranker.readout' 'late' compares candidates with a request that follows them: "
                "set reranker.request_position to 'after'."
            )
        return self


class EvaluationParams(Model):
    """Stage 05: metrics."""

    ks: list[PositiveInt] = [1, 3, 5, 10]  # cut-offs of the metrics
    bootstrap: int = Field(1000, ge=10)  # resamples of the users
    confidence: float = Field(0.95, gt=0, lt=1)


class FiguresParams(Model):
    """Stage 06: the cut-off at which the figures are drawn."""

    k: int = Field(5, ge=1)


class EfficiencyParams(Model):
    """Stage 09: what is timed."""

    candidates: list[PositiveInt] = Field([10, 20, 50], min_length=1)  # K: candidates re-ranked
    repeats: int = Field(20, ge=2)  # calls of each, for the percentiles
    users: int = Field(16, ge=1)  # test users of the throughput
    usd_per_hour: float = Field(0.10, gt=0)  # what an hour of the machine costs: state yours

    @model_validator(mode="after")
    def _few_enough_candidates(self) -> Self:
        if (k := max(self.candidates)) > 50:
            raise ValueError(
                f"parameter 'efficiency.candidates' lists {k}: the re-ranker takes at most 50 candidates, name no more."
            )
        return self


Order = Literal["index, before", "candidate, before", "index, after", "late, after"]  # read-out and place of the request


class StudyParams(Model):
    """Stages 07 and 08: what is trained side by side. Each study writes into its own run's folder."""

    seeds: int = Field(3, ge=1)  # trainings that differ in nothing but the seed: the run's `seed` and the next ones
    loss_seconds: float = Field(60, ge=0)  # 07: training of each loss at each of three rates; 0 leaves this comparison out
    readout_steps: int = Field(40, ge=0)  # 08: steps of each read-out on the plain prompt; 0 leaves this comparison out
    order_minutes: float = Field(4, ge=0)  # 08: training of each order of the prompt; 0 leaves this comparison out
    orders: list[Order] = []  # 08: these alone of the orders
    rates: list[PositiveFloat] = Field([1.0], min_length=1)  # 08: the learning rates times these, the best on validation kept


Stage = Literal[
    "data", "sasrec", "controls", "reranker", "evaluation", "figures", "retriever_study", "prompt_study", "efficiency"
]


class Params(Model):
    """All of a run."""

    run: str = Field("tiny", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0)
    # What `python -m corec.reproduce` runs, in the order of the notebooks.
    stages: list[Stage] = ["data", "sasrec", "controls", "reranker", "evaluation", "figures"]
    data: DataParams = DataParams()
    sasrec: SasrecParams = SasrecParams()
    controls: ControlsParams = ControlsParams()
    reranker: RerankerParams = RerankerParams()
    evaluation: EvaluationParams = EvaluationParams()
    figures: FiguresParams = FiguresParams()
    study: StudyParams = StudyParams()
    efficiency: EfficiencyParams = EfficiencyParams()

    @model_validator(mode="after")
    def _sections_go_together(self) -> Self:
        if self.sasrec.top_k < self.controls.k:
            raise ValueError(
                f"parameter 'sasrec.top_k' is {self.sasrec.top_k}, fewer than the {self.controls.k} candidates of "
                "controls.k: raise sasrec.top_k or lower controls.k."
            )
        if (k := self.figures.k) not in self.evaluation.ks or k >= self.controls.k:
            raise ValueError(
                f"parameter 'figures.k' is {k}: choose one of evaluation.ks ({self.evaluation.ks}) below controls.k "
                f"({self.controls.k})."
            )
        return self
