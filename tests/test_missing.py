"""Missing and wrong metadata: what is hidden, the imputers, training with attribute dropout, and the study."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from test_prior import params as with_prior
from test_prior import world_with_priors
from test_reranker import World

from corec import CorecError, conflicts, controls, pages, reranker
from corec.controls import Vocabulary
from corec.params import EvaluationParams, Params, RerankerParams, StudyParams
from corec.reranker import Parts
from corec.reranker.training import loss_of, training_batch
from corec.schemes import Attribute
from corec.studies import imputers, missing, missing_report


def vocabulary(rows: list[list[int]], labels: list[list[str]]) -> Vocabulary:
    """Vocabulary of items with the given values; `labels` by attribute."""
    attributes = tuple(Attribute(name=f"a{number}", column="c", bucket="each") for number in range(len(labels)))
    attribute_of = np.repeat(np.arange(len(labels)), [len(part) for part in labels])
    width = max(1, *map(len, rows))
    values_of = np.array([[-1] * width, *(row + [-1] * (width - len(row)) for row in rows)])
    return Vocabulary(attributes, tuple(label for part in labels for label in part), attribute_of, values_of)


@pytest.fixture
def many() -> Vocabulary:
    """Two thousand items: one of three colours, and one or two of four sizes."""
    rng = np.random.default_rng(1)
    rows = [sorted([int(rng.integers(3)), *(3 + rng.choice(4, rng.integers(1, 3), replace=False)).tolist()]) for _ in range(2000)]
    return vocabulary(rows, [["red", "green", "blue"], ["s", "m", "l", "xl"]])


def test_hidden_pairs_are_whole_random_and_nested(many: Vocabulary) -> None:
    assert (controls.hide(many, 0, 3).values_of == many.values_of).all()
    some, more = controls.hide(many, 0.3, 3), controls.hide(many, 0.7, 3)
    assert abs(some.known()[1:].mean() - 0.7) < 0.03 and abs(more.known()[1:].mean() - 0.3) < 0.03
    assert not (more.known() & ~some.known()).any(), "what is unknown stays unknown with a larger share"
    kept, whole = imputers.table(some), imputers.table(many)
    assert (kept == whole * some.known()[:, many.attribute_of]).all(), "all values of a pair are hidden together"
    rows = some.values_of[some.values_of[:, 1] >= 0]
    assert (np.diff(np.where(rows < 0, 99, rows), axis=1)[:, 0] > 0).all(), "ascending, padding last"
    assert (controls.hide(many, 0.3, 4).known() != some.known()).any()


def test_wrong_pairs_have_other_values_of_the_same_attribute(many: Vocabulary) -> None:
    wrong = controls.corrupt(many, 0.25, 3)
    before, after = imputers.table(many), imputers.table(wrong)
    for number in range(2):
        own = many.attribute_of == number
        changed = (before[1:, own] != after[1:, own]).any(axis=1)
        assert abs(changed.mean() - 0.25) < 0.03
        assert after[1:, own].any(axis=1).all()
    one = vocabulary([[0], [0], []], [["only"]])
    assert (controls.corrupt(one, 0.9, 0).values_of == one.values_of).all(), "nothing else can be drawn, and nothing is invented"
    assert (controls.corrupt(many, 0, 3).values_of == many.values_of).all()
    colours, sizes = (many.attribute_of == number for number in range(2))
    assert not (before[:, colours] * after[:, colours])[(before[:, colours] != after[:, colours]).any(axis=1)].any()
    changed = (before[:, sizes] != after[:, sizes]).any(axis=1)
    assert not (before[:, sizes] * after[:, sizes])[changed].any(), "no value in common where others are found"
    more = imputers.table(controls.corrupt(many, 0.5, 3))
    for own in (colours, sizes):
        some, larger = ((before[:, own] != part[:, own]).any(axis=1) for part in (after, more))
        assert not (some & ~larger).any(), "what is wrong stays wrong with a larger share"


def test_imputers_guess_from_titles_and_keep_what_is_known(many: Vocabulary) -> None:
    titles = [" ".join(["thing", *(f"{many.labels[value]}word" for value in row if value >= 0)]) for row in many.values_of[1:]]
    known = controls.hide(many, 0.5, 0)
    words = imputers.by_words(known, titles)
    assert words.min() >= 0 and words.max() <= 1
    np.testing.assert_allclose(words[1:, :3].sum(axis=1), 1, rtol=1e-5)  # one colour each
    case = missing.Case(missing.Condition(0.5, 0, 0), known, {})
    rng = np.random.default_rng(0)
    embeddings = imputers.table(many) + 0.01 * rng.normal(size=(2001, 7)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    study = with_tagger(False)
    found = missing.values_by_imputer(case, titles, embeddings, study)
    right = imputers.accuracy(many, known, found)
    two = vocabulary([[0, 1], [1]], [["x", "y", "z"]])
    none = vocabulary([[], []], [["x", "y", "z"]])
    guesses = {"hard": np.array([[0, 0, 0], [0, 1, 1], [0, 0, 0]]), "soft": np.array([[0, 0, 0], [0.5, 0.9, 0], [0.2, 0.1, 0.0]])}
    assert imputers.accuracy(two, none, guesses).loc["a0"].to_dict() == {"hard": 0.25, "soft": 0.5}
    assert list(right.index) == ["a0", "a1"]
    assert (right[["tf-idf", "tf-idf-probability", "nearest-title"]] > 0.95).all(axis=None) and (right["none"] == 0).all()
    assert (right["most-frequent"] < 0.7).all()
    for name, values in found.items():
        told = known.known()[:, many.attribute_of]
        assert (values[told] == imputers.table(known)[told]).all(), name
    assert set(np.unique(found["tf-idf"])) <= {0, 1}


def with_tagger(tagger: bool) -> Params:
    return Params(reranker=RerankerParams(backbone="tiny"), study=StudyParams(tagger=tagger))


def test_probabilities_of_items_with_a_value_can_come_from_other_items() -> None:
    known = vocabulary([[0], [0], [1], [1], [1], [0]], [["x", "y"]])
    titles = ["apple one", "apple two", "pear three", "pear four", "apple five", "apple six"]  # the fifth is wrong
    inside, outside = (imputers.by_words(known, titles, folds=folds, inverse_penalty=100.0)[5, 1] for folds in (0, 6))
    assert inside > 0.5 > outside
    empty = vocabulary([[], []], [["x"]])
    assert not imputers.by_words(empty, ["a b", "c d"]).any() and not imputers.most_frequent(empty).any()
    assert not imputers.nearest(empty, np.eye(3, dtype=np.float32)).any()
    assert not imputers.by_words(known, ["", "!", "", "?", "", ""]).any()
    both = vocabulary([[0, 2], [1, 3], [0, 2], [1, 3], [2], [3]], [["x", "y"], ["a", "b"]])
    same = ["thing"] * 6  # only the other attribute tells
    assert imputers.by_words(both, same, with_values=True)[5, 0] > 0.6 > 0.51 > imputers.by_words(both, same)[5, 0]
    every = vocabulary([[0], [0], []], [["x", "y"]])
    assert imputers.by_words(every, ["a b", "c d", "e f"])[3].tolist() == [1, 0], "a value that all known items have"


def test_the_tagger_guesses_short_lists_only(monkeypatch: pytest.MonkeyPatch) -> None:
    known = vocabulary([[0, 2], [1], []], [["love", "night"], ["a", "b", "c"]])
    monkeypatch.setattr(imputers, "TAGS", 2)
    guesses = imputers.tagged(known, ["A story of love", "Night", "Great house"], "tiny")
    assert (guesses[1:, :2].sum(axis=1) == 1).all() and not guesses[:, 2:].any() and not guesses[0].any()


@pytest.fixture
def world(atomic: Path) -> World:
    return world_with_priors(atomic)


def test_attribute_dropout_hides_values_from_whole_prompts_and_from_no_target(world: World) -> None:
    with_dropout = with_prior(world, attribute_dropout=0.5)
    plain, whole = (training_batch(world.examples, with_dropout, step) for step in (0, 5))
    same = training_batch(world.examples, with_prior(world), 5)
    assert plain.hidden is None and same.hidden is None and whole.hidden is not None
    assert all((first == other).all() for first, other in zip(whole.targets, same.targets, strict=True))
    model = world.build(with_dropout)
    rows, full = (
        reranker.make_rows(model, world.examples, whole.pools, whole.requests, hidden=hidden) for hidden in (whole.hidden, None)
    )
    values_of, kind = world.prepared.vocabulary.values_of, world.prepared.vocabulary.kind
    for window, (row, other) in enumerate(zip(rows, full, strict=True)):
        for place, item in enumerate(whole.pools.candidates[window]):
            values = values_of[item][values_of[item] >= 0]
            gone = [value for value in values if whole.hidden[window, place, kind(np.array([value]))[0]]]
            (first, last), (start, end) = row.spans[place], other.spans[place]
            kept = list(other.prefix[start:end])
            for value in gone:
                kept.remove(model.prompter.values[value][0])
            assert row.prefix[first:last] == kept
    assert 0.2 < whole.hidden.mean() < 0.8
    curve = reranker.train(model, world.examples, with_dropout, None)
    assert np.isfinite(curve["loss"]).all() and len(curve) == 8


def test_unknown_values_take_no_part_in_the_loss(world: World) -> None:
    own = with_prior(world, attribute_dropout=0.5).reranker
    known = controls.hide(world.prepared.vocabulary, 0.6, 1)
    examples = world.examples._replace(prepared=world.prepared._replace(vocabulary=known))
    batch = training_batch(examples, with_prior(world, attribute_dropout=0.5), 5)
    told = known.known()[batch.pools.candidates]
    for window, places in enumerate(batch.targets.known):
        for place, request in enumerate(batch.requests):
            for number, value in enumerate(request[window]):
                if value >= 0:
                    assert (places[place, number] == told[window][:, known.attribute_of[value]]).all()
    torch.manual_seed(0)
    shape = batch.targets.met.shape
    match = torch.randn(shape, requires_grad=True)
    control = 8 * (match.sigmoid() * torch.from_numpy(batch.targets.present)[..., None]).sum(2)
    relevance = torch.zeros(shape[0], 1, shape[3])
    prior = torch.zeros(shape[0], shape[3])
    gate = torch.ones(shape[:2])

    def gradient(params: RerankerParams) -> torch.Tensor:
        loss = loss_of(Parts(relevance, control, gate, match), prior, batch.targets, params)
        return torch.autograd.grad(loss, match, retain_graph=True)[0]

    unknown = (torch.from_numpy(batch.targets.known) == 0) & (torch.from_numpy(batch.targets.present)[..., None] > 0)
    assert unknown.any()
    only_match = RerankerParams.model_validate(own.model_dump() | {"match_loss": 1e6})  # the cross-entropy dominates
    assert gradient(only_match)[unknown].abs().max() < 1e-3 * gradient(only_match).abs().max()
    without = RerankerParams.model_validate(only_match.model_dump() | {"attribute_dropout": 0})
    assert gradient(without)[unknown].abs().min() > 0
    weights = torch.tensor([[[[1.0, 0.0]]]])
    found = reranker.match_loss(torch.tensor([[[[2.0, 9.0]]]]), torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1), weights)
    torch.testing.assert_close(found, torch.nn.functional.softplus(torch.tensor(-2.0)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attribute_dropout": 0.3}, "'reranker.attribute_dropout' needs the probability of each constraint"),
        (
            {"attribute_dropout": 0.3, "control": "constraints", "loss": "listwise", "control_target": "all"},
            "'reranker.attribute_dropout' supports graded requests",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(CorecError, match=message):
        RerankerParams.checked(changes)


def test_the_study_trains_once_and_compares_with_the_best_imputer(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = with_prior(world, prior=False, steps=2, curriculum_steps=1)
    study = own.study.model_copy(update={"missing": [0, 0.6], "wrong": [0.5], "seeds": 2, "tagger": False})
    own = own.model_copy(update={"study": study, "evaluation": EvaluationParams(bootstrap=20)})
    assert [tuple(each) for each in missing.conditions(own)] == [
        (share, wrong, seed) for seed in (0, 1) for share, wrong in ((0, 0), (0.6, 0), (0, 0.5))
    ]
    measured, guesses = missing.measure(world.tables, world.prepared, own, tmp_path / "scores", None)
    assert len(list((tmp_path / "scores").glob("*.npz"))) == 12 and not list((tmp_path / "scores").glob("*/checkpoint.pt"))
    monkeypatch.setattr(missing, "train", None)
    fewer = own.model_copy(update={"study": study.model_copy(update={"without_dropout": False})})
    some = missing.measure(world.tables, world.prepared, fewer, tmp_path / "scores", None).values
    assert {key for key in measured if "corec" not in (key.model, key.imputer)} == set(some)
    again = missing.measure(world.tables, world.prepared, own, tmp_path / "scores", None).values
    assert all((again[key] == values).all() for key, values in measured.items())
    key = missing.Key(0.6, 0.0, 1, "rule", "none", "cp")
    truth = measured[key._replace(imputer="truth")]
    assert all((values <= truth + 1e-9).all() for each, values in measured.items() if each[:3] == key[:3] and each.metric == "cp")
    assert (measured[key._replace(missing=0.0)] == measured[key._replace(missing=0.0, imputer="truth")]).all()
    assert (measured[key] != truth).any()
    for name in ("corec", "corec-dropout"):  # with nothing unknown, their probabilities are not used
        assert (measured[key._replace(missing=0.0, imputer=name)] == measured[key._replace(missing=0.0)]).all()

    assert set(guesses["missing"]) == {0.6} and set(guesses["seed"]) == {0, 1} and guesses["auc"].between(0, 1).all()
    assert set(guesses["imputer"]) == {
        "most-frequent",
        "tf-idf",
        "tf-idf-probability",
        "words-and-values",
        *missing.models_of(own),
    }
    request = world.prepared.requests["test", 1][:, 0]
    candidates = world.prepared.pools["test"].candidates
    hidden = controls.hide(world.prepared.vocabulary, 0.6, 0).known()
    for attribute, part in guesses[guesses["seed"] == 0].groupby("attribute"):
        number = [each.name for each in world.prepared.vocabulary.attributes].index(str(attribute))
        asked = (request >= 0) & (world.prepared.vocabulary.kind(request) == number)
        assert set(part["pairs"]) == {int((~hidden[candidates[asked], number]).sum())}

    pools = world.prepared.pools["test"]
    users = world.tables.windows.set_index("window").loc[pools.window, "user"].to_numpy()
    table = missing.tabulate(measured, world.prepared, users, own)
    best = table[(table["model"] == "rule") & (table["imputer"] == table["best"])]
    assert (best["ahead"] == 0).all() and len(best) and not set(table["best"]) - set(missing.SIMPLE)
    assert set(table["attribute"]) - {"all"} <= {attribute.name for attribute in world.prepared.vocabulary.attributes}
    assert (table["ahead"].abs() <= 1).all() and (table["seeds"] == 2).all()
    one = [
        missing.tabulate({each: part[[seed]] for each, part in measured.items()}, world.prepared, users, own) for seed in (0, 1)
    ]
    values = np.stack([part["value"] for part in one])
    np.testing.assert_allclose(table["value"], values.mean(axis=0))
    np.testing.assert_allclose(table[["lowest", "highest"]].T, np.sort(values, axis=0))
    assert (table["lowest"] < table["highest"]).any() and (one[0]["lowest"] == one[0]["highest"]).all()
    spread = table[["ahead_lowest", "ahead_highest"]].mean(axis=1)
    np.testing.assert_allclose(table["ahead"], spread, atol=1e-12)  # of two seeds, and the same imputer for both
    assert (table["run"] == own.run).all()
    assert {"tf-idf-and-table"} == set(table[table["wrong"] > 0]["imputer"]) - set(table[table["wrong"] == 0]["imputer"])

    assert not missing_report.join(tmp_path / "figures")
    for name in ("mine", "other"):  # two runs on the same data
        folder = tmp_path / "figures" / f"missing-metadata-{name}"
        folder.mkdir(parents=True)
        assert [path.name for path in missing_report.keep(table.assign(run=folder.name), guesses, folder)] == [
            "missing.csv",
            "missing.png",
            "guesses.csv",
        ]
        page = (folder / "results.md").read_text()
        assert (
            "by share of wrong values" in page
            and "## Guesses of unknown values" in page
            and "| `rule`, `corec-dropout` |" in page
            and "best imputer, by seed\n" in page
        )
        assert pages.pages_of(folder) == {folder / "results.md": page}
    joined = missing_report.join(tmp_path / "figures")
    assert len(pd.read_csv(joined[0])) == 2 * len(table) and joined[1].exists() and not pages.pages_of(joined[0].parent)


def test_the_points_of_a_single_share_do_not_overlap() -> None:
    def places(shares: list[float]) -> list[list[float]]:
        rows = pd.DataFrame({"missing": shares, "value": 0.5, "low": 0.4, "high": 0.6})
        axis = Figure().subplots()
        missing_report.lines(axis, [("a", rows), ("none", rows[:0]), ("b", rows)], "missing")
        assert [text.get_text() for text in axis.get_legend().get_texts()] == ["a", "b"]
        if len(shares) == 1:
            assert axis.get_legend().get_window_extent().x0 > axis.get_window_extent().x1, "the legend is outside"
        return [list(np.asarray(line.get_xdata(), dtype=float)) for line in axis.lines]

    one, other = places([0.25])
    assert one[0] < 0.25 < other[0] and np.mean([one, other]) == pytest.approx(0.25)
    assert places([0.25, 0.5]) == [[0.25, 0.5]] * 2, "lines are not moved"


def test_the_threshold_is_the_smallest_share_from_which_on_the_difference_is_above_0() -> None:
    rows = [(0.0, -0.1), (0.25, 0.1), (0.5, -0.01), (0.75, 0.02), (0.9, 0.03)]
    table = pd.DataFrame(rows, columns=["missing", "ahead_low"]).assign(
        run="d", attribute="all", n_tokens=1, model="rule", imputer="corec-dropout", metric="cp", wrong=0.0,
        ahead=lambda part: part["ahead_low"] + 0.05, ahead_high=1.0, best="tf-idf",
    )  # fmt: skip
    found = missing_report.thresholds(table).iloc[0]
    assert found["from"] == 0.75 and found["difference"] == pytest.approx(0.07) and found["above"] == "25%, 75%, 90%"
    never = missing_report.thresholds(table.assign(ahead_low=-1.0)).iloc[0]
    assert pd.isna(never["from"]) and never["difference"] == pytest.approx(0.08) and never["above"] == ""


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("reranker", {"control": "request"}, "'missing_metadata' needs the probability of each constraint"),
        ("reranker", {"loss": "ranknet"}, "'missing_metadata' needs the probability of each constraint"),
        ("controls", {"n_tokens": [0, 2]}, "compares attributes by requests of one constraint"),
    ],
)
def test_runs_that_do_not_fit_the_study_are_refused_before_the_first_training(
    world: World, tmp_path: Path, section: str, changes: dict[str, object], message: str
) -> None:
    own = with_prior(world, prior=False)
    own = own.model_copy(update={section: getattr(own, section).model_copy(update=changes)})
    with pytest.raises(CorecError, match=message):
        missing.measure(world.tables, world.prepared, own, tmp_path / "scores", None)
    assert not (tmp_path / "scores").exists()
    with pytest.raises(CorecError, match="study.missing"):
        Params.checked({"study": {"missing": []}})
    wide = {"controls": {"pool": ["sasrec", "next"]}, "evidence": {"combiner": "linear"}, "data": {"held_back": 4}}
    wide |= {"reranker": {"control": "constraints", "loss": "listwise"}}  # type: ignore[dict-item]
    assert "candidates that do not depend on the attributes" in str(conflicts.in_missing(Params.checked(wide)))
