"""Parameters of a run: one frozen model per stage, with defaults and cross-checks.

Unknown names are errors that give the nearest known name. :mod:`corec.profiles` reads :class:`Params` from a file or from the
cells of a notebook.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from corec.checked import Model
from corec.conflicts import conflict

RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # a folder name, without separators


class DataParams(Model):
    """Stage 01: source of the interactions, cleaning and split."""

    source: str = "ml-100k"  # a name in corec.data.SOURCES
    path: str | None = None  # folder of the source's files, else they are downloaded; relative to the project's folder
    # amazon-2018: name of the category in the file names, e.g. Electronics
    category: str | None = Field(None, pattern=r"^[A-Za-z0-9_]+$")
    reviews: Literal["full", "5-core"] = "full"  # amazon-2018: all reviews, or the 5-core
    url: str = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2"  # amazon-2018: address of the files
    sha256: dict[str, str] = {}  # expected digest of each downloaded file, by file name
    required: list[str] = []  # columns; items without all of these, and their interactions, are dropped
    brand: Literal["as_is", "normalised"] = "as_is"  # normalised: case and a leading `by` removed, `unknown` and the like missing
    tagger: str | None = None  # backbone for zero-shot tags of the items without a category
    tags: list[str] = []  # tags that the tagger chooses from; empty: the 20 most frequent categories of the other items
    split: Literal["paper", "leave-one-out"] = "leave-one-out"
    window: int = Field(6, ge=2)  # history items per window (in training with `paper`, one fewer)
    repeats: bool = False  # count all interactions of a user with an item, not only the first; seen items are then candidates
    core: int = Field(5, ge=1)  # leave-one-out: smallest number of interactions of a user and of an item
    min_interactions: int = Field(30, ge=3)  # paper: smallest number of interactions of a user
    max_users: int = Field(3000, ge=1)  # paper: number of users, those with the most interactions
    latest: int = Field(50, ge=3)  # paper: latest interactions that are kept of each user
    # Latest training interactions of a user that train the re-ranker only: the retriever and all statistics of the items end
    # before them. At most half of the user's training interactions. 0: the re-ranker trains on what the retriever has seen.
    held_back: int = Field(0, ge=0)

    @property
    def dataset(self) -> str:
        """Name of the data set in results."""
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


# Parameters of each stage that change its memory and speed, but not its result.
WITHOUT_EFFECT = {"reranker": {"micro_batch", "eval_batch_size", "gradient_checkpointing", "checkpoint_steps"}}


class SasrecParams(Model):
    """Stage 02: the retriever."""

    hidden: int = Field(64, ge=1)
    layers: int = Field(2, ge=1)
    heads: int = Field(2, ge=1)
    dropout: float = Field(0.3, ge=0, lt=1)
    max_length: int = Field(100, ge=2)  # latest interactions in the input
    # Full softmax; sampled softmax; gSASRec's generalised binary cross-entropy; the original binary cross-entropy, one negative.
    loss: Literal["ce", "sampled", "gbce", "bce"] = "ce"
    negatives: int = Field(256, ge=1)  # sampled, gbce: negatives per sequence
    gbce_t: float = Field(0.75, ge=0, le=1)  # gbce: 0 is binary cross-entropy, 1 is calibrated like the full softmax
    lr: float = Field(1e-3, gt=0)
    beta2: float = Field(0.999, gt=0, lt=1)  # of AdamW; the original uses 0.98
    batch_size: int = Field(64, ge=1)
    epochs: int = Field(100, ge=1)
    patience: int = Field(10, ge=1)  # epochs without a better validation NDCG@10 before training stops
    measure_held_back: bool = False  # also train a retriever on the held-back interactions, to measure what they cost
    decay: bool = False  # linear decay of the learning rate to 0 over `epochs`, with warm-up in the first
    # Batches of similar length, softmax in blocks, dropout from bytes: several times faster, with other random numbers.
    fast: bool = False
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # fast, ce: number format of the products with the item table
    top_k: int = Field(50, ge=1)  # candidates per window

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> Self:
        if self.hidden % self.heads:
            raise ValueError(
                f"parameter 'sasrec.hidden' ({self.hidden}) is not a multiple of sasrec.heads ({self.heads}): change one of them."
            )
        return self


class MaxWindows(Model):
    """Largest number of windows of each split that are re-ranked; larger splits are sampled at random."""

    train: int = Field(20000, ge=1)
    valid: int = Field(200, ge=1)
    test: int = Field(1000, ge=1)


Source = Literal["sasrec", "next", "cosine", "text", "popularity"]
Protocol = Literal["oracle", "random-candidate", "catalogue"]


class ControlsParams(Model):
    """Stage 03: attributes, candidates and requests."""

    scheme: str = "movielens"  # corec/schemes/<name>.yaml, or a YAML file; relative to the project's folder
    attributes: list[str] | None = None  # attributes under control; empty: all of the scheme
    # Source of the requested values: the target (the paper), another candidate, or the catalogue.
    protocol: Protocol = "random-candidate"
    other_protocols: list[Protocol] = []  # the test windows are also scored and evaluated under requests of these
    k: int = Field(20, ge=2, le=50)  # candidates per window that are re-ranked
    # Sources of the candidates; several are merged by a combiner (corec.evidence.pools). `text` needs evidence.text.
    pool: list[Source] = ["sasrec"]
    n_tokens: list[NonNegativeInt] = [0, 1, 2, 3]  # numbers of constraints per request, in training and evaluation
    # Training windows: all; those whose true next item was retrieved; or all, with a missing true item in place of the
    # last candidate (from which the model learns that unlikely items are true).
    train_truth: Literal["any", "retrieved", "inserted"] = "retrieved"
    max_windows: MaxWindows = MaxWindows()

    @model_validator(mode="after")
    def _entries_differ(self) -> Self:
        lengths = self.n_tokens
        if self.protocol in self.other_protocols or len(set(self.other_protocols)) < len(self.other_protocols):
            raise ValueError(
                f"parameter 'controls.other_protocols' is {self.other_protocols}: list each protocol once, without that of "
                f"controls.protocol ({self.protocol})."
            )
        if sorted(set(lengths)) != sorted(lengths) or 0 not in lengths or len(lengths) < 2:
            raise ValueError(
                f"parameter 'controls.n_tokens' is {lengths}: list 0 (no request) and at least one other number, each once."
            )
        return self


class EvidenceParams(Model):
    """Stage 03: evidence of relevance and the combiner, whose score is the prior of the re-ranker."""

    # none: no evidence, and the re-ranker has no prior; best: linear or lambdarank, by validation.
    combiner: Literal["none", "linear", "lambdarank", "best"] = "none"
    steps: int = Field(3, ge=1)  # transitions: item j follows item i within this number of steps
    recent: int = Field(6, ge=1)  # latest items of the evidence from recent items
    history: int = Field(100, ge=1)  # latest items of the evidence from the whole history
    # Model that embeds the titles: `tf-idf` (their words), `minilm` (an encoder of sentences), or a language model as in
    # reranker.backbone; empty: no evidence from text.
    text: str | None = None
    folds: int = Field(5, ge=2)  # parts of the users for out-of-fold scores


class RerankerParams(Model):
    """Stage 04: the language model and its training."""

    backbone: str = "smollm2-135m"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: the faster one on this machine
    readout: Literal["index", "candidate", "late"] = "late"  # see corec.reranker.readout
    pooling: Literal["end", "mean"] = "mean"  # candidate, late: state of the last token of the line, or mean over its tokens
    layers: Literal["last", "mix"] = "mix"  # candidate, late: states of the last layer, or a learned mix of all layers
    head_width: int = Field(64, ge=1)  # late: width of the two projections P and Q
    # late: the request as a whole, or the sum over its constraints of the probability that the candidate meets each.
    control: Literal["request", "constraints"] = "request"
    prior: bool = False  # add the combiner's score (evidence.combiner), times a learned gate
    # Width of the retriever's states that are put into each candidate's line as a soft token (CoLLM): twice sasrec.hidden, for
    # the item and the user. 0: none.
    soft_width: int = Field(0, ge=0)
    control_logits: float = Field(8.0, gt=0)  # constraints, listwise: score of one constraint met, at strength 1
    request_position: Literal["before", "after"] = "after"
    values: Literal["token", "words"] = "token"  # attribute values as one new token each, or as words
    show_attributes: bool = True  # the prompt lists the values of the items beside their titles
    title_tokens: int = Field(12, ge=1)  # tokens of a title; longer titles are cut
    lora_r: int = Field(8, ge=1)
    lora_alpha: int = Field(16, ge=1)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    lr: float = Field(1e-3, gt=0)  # adapter
    lr_head: float = Field(1e-3, gt=0)  # read-out head
    lr_rows: float = Field(1e-2, ge=0)  # embedding rows of the new tokens; 0: they keep their initial values
    lr_gate: float = Field(1e-2, gt=0)  # single numbers of the head: bias of the gate, scale and shift of the control term
    warmup: float = Field(0.02, ge=0, le=1)  # share of the steps
    steps: int = Field(100, ge=1)  # optimiser steps on the full prompt
    curriculum_steps: int = Field(60, ge=0)  # steps before these: attributes only, no history, short requests first
    # Numbers of candidates in equal parts of `curriculum_steps`, e.g. [2, 6]; empty: controls.k throughout.
    curriculum_k: list[int] = []
    max_minutes: float = Field(30, gt=0)  # time limit of training; the schedule is shortened to fit
    batch_size: int = Field(4, ge=1)  # windows per step
    micro_batch: int = Field(2, ge=1)  # windows in memory at a time; the gradient is that of the whole batch
    requests_per_window: int = Field(16, ge=1)
    train_tokens: list[NonNegativeInt] | None = None  # numbers of constraints in training; empty: controls.n_tokens
    # ranknet: the paper's, on control scores; listwise: cross-entropy to the softmax of prior, constraints met and truth;
    # truth: cross-entropy to the true next item (LlamaRec), which needs controls.train_truth other than `any`.
    loss: Literal["ranknet", "listwise", "truth"] = "ranknet"
    # What a request of n constraints asks for: graded: the number of constraints met (the paper); all: n if all are met, else 0;
    # mixture: the mean of the two; none: nothing, so that only the true next item counts.
    control_target: Literal["graded", "all", "mixture", "none"] = "graded"
    truth_bonus: bool = True  # the control score of the true next item is one higher
    truth_logits: float = Field(3.0, ge=0)  # listwise: the truth bonus in the softmax
    # index, before: weight of the loss of the read-out `candidate` on the states of the same pass, which it learns first.
    auxiliary: float = Field(0.0, ge=0)
    match_loss: float = Field(1.0, ge=0)  # constraints: weight of the cross-entropy of each constraint met
    row_contrast: float = Field(0, ge=0)  # weight of a loss that pushes the rows of the new tokens apart; 0: none
    # constraints, listwise: share of the candidates' attributes that training hides in whole prompts, though not in what the
    # model learns, so that it reads the titles. Attributes without a value are then unknown: nothing is learned from them.
    attribute_dropout: float = Field(0.0, ge=0, lt=1)
    seeds: int = Field(1, ge=1)  # trainings that differ only in the seed: `seed` of the run and the next ones
    gradient_checkpointing: bool = False
    checkpoint_steps: int = Field(20, ge=1)
    eval_batch_size: int = Field(8, ge=1)
    zero_shot: bool = True  # also score with the untrained backbone, for comparison

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
        if self.auxiliary and (self.readout != "index" or self.request_position != "before"):
            raise ValueError(
                "parameter 'reranker.auxiliary' supports the read-out 'index': set reranker.readout to 'index' and "
                "reranker.request_position to 'before', or reranker.auxiliary to 0."
            )
        if self.attribute_dropout and (self.control != "constraints" or self.loss != "listwise"):
            raise ValueError(
                "parameter 'reranker.attribute_dropout' needs the probability of each constraint: set reranker.control to "
                "'constraints' and reranker.loss to 'listwise', or reranker.attribute_dropout to 0."
            )
        if self.attribute_dropout and self.control_target != "graded":
            raise ValueError(
                "parameter 'reranker.attribute_dropout' supports graded requests: set reranker.control_target to 'graded', or "
                "reranker.attribute_dropout to 0."
            )
        if self.control == "constraints" and self.readout != "late":
            raise ValueError(
                "parameter 'reranker.control' 'constraints' needs the states of the constraints: set reranker.readout to 'late'."
            )
        if self.loss == "listwise" and self.readout != "late":
            raise ValueError(
                "parameter 'reranker.loss' 'listwise' needs a score with a part for relevance: set reranker.readout to 'late'."
            )
        return self


class EvaluationParams(Model):
    """Stage 05: metrics."""

    ks: list[PositiveInt] = [1, 3, 5, 10]  # cut-offs k of the metrics
    bootstrap: int = Field(1000, ge=10)  # resamples of users
    confidence: float = Field(0.95, gt=0, lt=1)
    boost: float = Field(1.0, ge=0)  # score of one constraint met in the ranker `boost`, in units of the combiner's log-odds
    # With a prior: weights of control against relevance of the frontier; 1 is as trained.
    strengths: list[NonNegativeFloat] = [0, 0.02, 0.05, 0.08, 0.12, 0.16, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1]

    @field_validator("strengths")
    @classmethod
    def _ascending(cls, values: list[float]) -> list[float]:
        if not values or values != sorted(set(values)):
            raise ValueError(f"parameter 'evaluation.strengths' is {values}: list numbers in ascending order, each once.")
        return values


class FiguresParams(Model):
    """Stage 06: cut-off k of the figures."""

    k: int = Field(5, ge=1)


class EfficiencyParams(Model):
    """Stage 09: timings."""

    candidates: list[PositiveInt] = Field([10, 20, 50], min_length=1)  # numbers of candidates K
    repeats: int = Field(20, ge=2)  # calls per measurement, for the percentiles
    users: int = Field(16, ge=1)  # test users for the throughput
    usd_per_hour: float = Field(0.10, gt=0)  # price of one hour of the machine; set your own

    @model_validator(mode="after")
    def _few_enough_candidates(self) -> Self:
        if (k := max(self.candidates)) > 50:
            raise ValueError(
                f"parameter 'efficiency.candidates' lists {k}: the re-ranker takes at most 50 candidates, name no more."
            )
        return self


Order = Literal["index, before", "candidate, before", "index, after", "late, after"]  # read-out, and position of the request


Ablation = Literal[
    "shuffled-tokens", "no-control-scores", "frozen-rows", "plain-words", "llamarec", "without prior", "ranknet",
    "ranknet, request as a whole", "listwise, request as a whole", "no truth bonus", "no match loss", "ordinary rate of the gate",
    "all or nothing", "mixture", "more requests without tokens", "soft tokens", "twice the steps",
]  # fmt: skip


UnseenTraining = Literal[
    "tokens, all values", "tokens, never requested", "tokens, never seen",
    "words, all values", "words, never requested", "words, never seen",
]  # fmt: skip


Share = Annotated[float, Field(ge=0, lt=1)]


class StudyParams(Model):
    """Stages 07, 08, 10, 11, 12, 14 and 16: comparisons. Each study writes to the folder of its own run."""

    seeds: int = Field(3, ge=1)  # trainings that differ only in the seed: `seed` of the run and the next ones
    loss_seconds: float = Field(60, ge=0)  # 07: training time of each loss at each of three rates; 0 omits this comparison
    readout_steps: int = Field(40, ge=0)  # 08: steps of each read-out on the plain prompt; 0 omits this comparison
    order_minutes: float = Field(4, ge=0)  # 08: training time of each order of the prompt; 0 omits this comparison
    orders: list[Order] = []  # 08: restrict the orders to these
    ablations: list[Ablation] = []  # 08: variants of the re-ranker (see corec.studies.ablations); empty omits this comparison
    surface: list[int] = []  # 08: numbers of candidates under which the variant `corec` is also evaluated; empty omits this
    texts: list[str] = []  # 08: models of evidence.text, or `none`, with which the combiner is compared; empty omits this
    ablation_share: float = Field(0.5, gt=0, le=1)  # 08, 11: steps of each variant, as a share of those of the run
    rates: list[PositiveFloat] = Field([1.0], min_length=1)  # 08: factors of the learning rates, selected on validation
    # 10: shares of the attributes of items that are unknown, and, with nothing unknown, shares that have other values
    missing: list[Share] = Field([0, 0.25, 0.5, 0.75, 0.9], min_length=1)
    wrong: list[Share] = [0.25, 0.5]
    attribute_dropout: float = Field(0.4, gt=0, lt=1)  # 10: reranker.attribute_dropout of the second model
    without_dropout: bool = True  # 10: also train the first model, which has none
    tagger: bool = True  # 10: also guess the values by the untrained backbone (data.tagger)
    nearest_title: bool = True  # 10: also guess the values by the most similar title, under the encoder MiniLM
    source: str | None = Field(None, pattern=RUN_NAME)  # 11: run whose trained re-ranker is used; empty: this run
    transfer_steps: list[PositiveInt] = [20]  # 11: steps of short trainings, from its weights and from the initial ones
    unseen: float = Field(0, ge=0, lt=1)  # 11: share of the values of each attribute kept back from training; 0 omits this
    unseen_trainings: list[UnseenTraining] = []  # 11: restrict the trainings of `unseen` to these
    unseen_windows: PositiveInt | None = None  # 11: test windows scored that ask for other values; empty: all
    contrast: list[PositiveFloat] = Field(
        [0.1, 1.0], min_length=1
    )  # 12: weights of reranker.row_contrast, selected on validation
    # 14: parsers of free text (corec.studies.parsers), and number of labelled sentences in each template set
    parsers: list[Literal["grammar", "nearest", "model"]] = Field(["grammar", "nearest", "model"], min_length=1)
    sentences: int = Field(200, ge=20)
    # 14: training on sentences as requests: steps on plain prompts, then on whole ones; 0 whole steps omit it
    sentence_plain_steps: int = Field(240, ge=0)
    sentence_steps: int = Field(60, ge=0)
    sessions: int = Field(100, ge=1)  # 16: simulated sessions of each user

    def transfers(self) -> bool:
        """Whether notebook 11 uses a trained re-ranker, of `source` or of the run, on other data or in short trainings."""
        return bool(self.source or self.transfer_steps)

    @field_validator("unseen_trainings")
    @classmethod
    def _with_all_values(cls, names: list[str]) -> list[str]:
        for form in {name.split(", ")[0] for name in names}:
            if f"{form}, all values" not in names:
                raise ValueError(f"parameter 'study.unseen_trainings' needs a baseline: add '{form}, all values'.")
        return names


Stage = Literal[
    "data",
    "sasrec",
    "controls",
    "reranker",
    "evaluation",
    "figures",
    "retriever_study",
    "prompt_study",
    "efficiency",
    "missing_metadata",
    "transfer",
    "saturation",
    "conflicts",
    "language",
    "sessions",
    "simulated_users",
]


class Params(Model):
    """All parameters of a run."""

    run: str = Field("tiny", pattern=RUN_NAME)
    seed: int = Field(0, ge=0)
    # Stages that `corec run` runs, in the order of the notebooks.
    stages: list[Stage] = ["data", "sasrec", "controls", "reranker", "evaluation", "figures"]
    data: DataParams = DataParams()
    sasrec: SasrecParams = SasrecParams()
    controls: ControlsParams = ControlsParams()
    evidence: EvidenceParams = EvidenceParams()
    reranker: RerankerParams = RerankerParams()
    evaluation: EvaluationParams = EvaluationParams()
    figures: FiguresParams = FiguresParams()
    study: StudyParams = StudyParams()
    efficiency: EfficiencyParams = EfficiencyParams()

    @model_validator(mode="after")
    def _sections_go_together(self) -> Self:
        if fault := conflict(self):
            raise ValueError(fault)
        return self
