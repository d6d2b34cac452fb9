"""A trained re-ranker on another data set: which weights it takes, and the comparison."""

import dataclasses
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
import torch
from test_prior import params as with_prior
from test_reranker import World, unlike_start

from corec import CorecError, conflicts, controls, pages, paths, reranker, stages
from corec.controls import Vocabulary, without
from corec.params import EvaluationParams, Params, StudyParams, UnseenTraining
from corec.studies import transfer, unseen


@pytest.fixture
def world(atomic: Path) -> World:
    return World(atomic)


def kept(world: World, monkeypatch: pytest.MonkeyPatch, folder: Path, **changes: Any) -> tuple[reranker.Reranker, Params]:
    """A re-ranker with trained weights, saved as the stage 04 of a run `other`, and the settings of the target."""
    own = with_prior(world, prior=False, steps=4, **changes)
    model = world.build(own)
    unlike_start(model)
    reranker.save(model, pd.DataFrame({"step": [0]}), folder)
    record = {"params": {"reranker": own.reranker.model_dump(mode="json")}, "identity": "first"}
    monkeypatch.setattr(stages, "require", lambda run, stage: record if (run, stage) == ("other", "reranker") else None)
    monkeypatch.setattr(paths, "stage_dir", lambda run, stage: folder)
    study = own.study.model_copy(update={"source": "other", "transfer_steps": [2]})
    return model, own.model_copy(update={"study": study, "evaluation": EvaluationParams(bootstrap=20)})


def renamed(vocabulary: Vocabulary, number: int) -> Vocabulary:
    """The vocabulary with other labels of one attribute, of which there is one more, in front."""
    own = np.flatnonzero(vocabulary.attribute_of == number)
    labels = list(vocabulary.labels)
    for value in own:
        labels[value] = f"other {labels[value]}"
    labels.insert(own[0], "one more")
    attribute_of = np.insert(vocabulary.attribute_of, own[0], number)
    values_of = vocabulary.values_of + (vocabulary.values_of >= own[0])
    return dataclasses.replace(vocabulary, labels=tuple(labels), attribute_of=attribute_of, values_of=values_of)


@pytest.mark.parametrize("values", ["token", "words"])
def test_transferred_to_the_same_data_the_scores_are_the_same(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, values: str
) -> None:
    model, own = kept(world, monkeypatch, tmp_path, values=values)
    found = transfer.transfer(world.tables, world.prepared, own)
    assert found.shared.all() and len(found.shared) == len(world.prepared.vocabulary.labels)
    first, second = (reranker.score(each, world.examples, world.pools, world.requests) for each in (model, found.model))
    np.testing.assert_allclose(first, second, atol=1e-5)
    found.model.reset()
    np.testing.assert_array_equal(second, reranker.score(found.model, world.examples, world.pools, world.requests))


def test_tokens_are_matched_by_name_and_new_ones_start_as_their_words(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, own = kept(world, monkeypatch, tmp_path)
    number = len(world.prepared.vocabulary.attributes) - 1
    other = renamed(world.prepared.vocabulary, number)
    found = transfer.transfer(world.tables, world.prepared._replace(vocabulary=other), own)
    assert (found.shared == (other.attribute_of != number)).all()
    fresh = reranker.build(world.tables.items, other, own.reranker, own.seed)
    for value, label in enumerate(other.labels):
        token = [f"<{other.name(value)}>"]
        rows = [reranker.token_rows(each, token).to_numpy() for each in (found.model, model if found.shared[value] else fresh)]
        np.testing.assert_array_equal(*rows, err_msg=label)
    names = found.model.trainable()
    assert all(torch.equal(value, names[name]) for name, value in model.trainable().items() if "trainable_tokens" not in name)


def test_a_prior_that_the_source_lacks_keeps_its_weight(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, own = kept(world, monkeypatch, tmp_path)
    target = with_prior(world).model_copy(update={"study": own.study})
    gate = transfer.transfer(world.tables, world.prepared, target).model.head.gate
    assert gate.bias.item() == 1 and not gate.weight.any()


def test_sources_that_cannot_be_used_are_named(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(CorecError, match="Run 'nowhere' has no finished stages"):
        transfer.settings(Params().model_copy(update={"study": Params().study.model_copy(update={"source": "nowhere"})}))
    _, own = kept(world, monkeypatch, tmp_path)
    soft = own.reranker.model_dump(mode="json") | {"soft_width": 8}
    monkeypatch.setattr(stages, "require", lambda *_: {"params": {"reranker": soft}})
    with pytest.raises(CorecError, match="study.source: run 'other' has soft tokens of its own retriever"):
        transfer.settings(own)


def test_transfer_is_compared_with_training_anew(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, own = kept(world, monkeypatch, tmp_path / "kept")
    number = len(world.prepared.vocabulary.attributes) - 1
    prepared = world.prepared._replace(vocabulary=renamed(world.prepared.vocabulary, number))
    requests = {
        key: part + (part >= np.flatnonzero(prepared.vocabulary.attribute_of == number)[0])
        for key, part in prepared.requests.items()
    }
    examples = world.examples._replace(prepared=prepared._replace(requests=requests))
    found, shared = transfer.compare(world.tables, examples, own, tmp_path / "stage")
    assert list(found) == ["transferred", "transferred, 2 steps", "corec, 2 steps"]
    assert (found["transferred"].total() != found["transferred, 2 steps"].total()).any()
    assert not list((tmp_path / "stage").glob("**/checkpoint.pt"))
    found["corec"] = found["corec, 2 steps"]
    users = world.tables.windows.set_index("window").loc[prepared.pools["test"].window, "user"].to_numpy()
    table = transfer.judge(found, shared, examples, users, own)
    assert set(table["model"]) == {*found, "sasrec", "rule"}
    assert (table[table["model"].isin(["corec", "corec, 2 steps"])]["ahead"] == 0).all()
    assert {"all", "shared"} <= set(table["tokens"]) <= {"all", "shared", "new"}
    counts = table[(table["model"] == "corec") & (table["metric"] == "cp") & (table["n_tokens"] == 1)].set_index("tokens")
    assert counts["n_users"].drop("all").sum() >= counts.loc["all", "n_users"], "a user counts in each kind of tokens"
    folder = tmp_path / "figures"
    folder.mkdir()
    assert [path.name for path in transfer.keep(table, folder)] == ["transfer.csv", "transfer.png"]
    page = (folder / "results.md").read_text()
    assert "| `transferred, 2 steps` |" in page and page == pages.study_page(folder)


def test_values_kept_back_are_some_of_each_attribute_and_no_item_has_them(world: World) -> None:
    vocabulary = world.prepared.vocabulary
    chosen = unseen.choose(vocabulary, 0.3, 0)
    for number in range(len(vocabulary.attributes)):
        own = (vocabulary.attribute_of == number) & (vocabulary.frequency() > 0)
        assert 0 < chosen[own].sum() < own.sum()
    masked = without(vocabulary, chosen)
    assert (masked.frequency()[~chosen] == vocabulary.frequency()[~chosen]).all() and not masked.frequency()[chosen].any()
    assert masked.labels == vocabulary.labels


def test_training_requests_no_value_that_is_kept_back(world: World) -> None:
    own, chosen = with_prior(world, prior=False), unseen.choose(world.prepared.vocabulary, 0.3, 0)
    masked = without(world.prepared.vocabulary, chosen)
    for step in range(6):
        free = reranker.training_batch(world.examples, own, step)
        batch = reranker.training_batch(world.examples, own, step, requested=masked)
        np.testing.assert_array_equal(free.pools.candidates, batch.pools.candidates)
        for place, request in enumerate(batch.requests):
            assert not chosen[request[request >= 0]].any()
            met = controls.matches(batch.pools.candidates, request, world.prepared.vocabulary.values_of)
            np.testing.assert_array_equal(batch.targets.met[:, place, : request.shape[1]], met.transpose(0, 2, 1))


def test_titles_do_not_name_values_that_are_never_seen(world: World) -> None:
    vocabulary, items = world.prepared.vocabulary, world.tables.items.copy()
    chosen = unseen.choose(vocabulary, 0.3, 0)
    label = vocabulary.labels[int(np.flatnonzero(chosen)[0])]
    items["title"] = f"{label} One: {label.upper()}s, the {label}"
    titles = unseen.unnamed(items, vocabulary, chosen)["title"]
    has = (vocabulary.values_of[1:] == np.flatnonzero(chosen)[0]).any(axis=1)
    assert has.any() and set(titles[~has]) == {items["title"].iloc[0]}
    assert set(titles[has]) == {f"One: {label.upper()}s, the"}


def test_values_that_no_request_asks_for_are_refused(world: World, tmp_path: Path) -> None:
    own = with_prior(world, prior=False)
    own = own.model_copy(update={"study": own.study.model_copy(update={"unseen": 0.3})})
    empty = np.full_like(world.prepared.requests["test", 1], -1)
    examples = world.examples._replace(prepared=world.prepared._replace(requests=world.prepared.requests | {("test", 1): empty}))
    with pytest.raises(CorecError, match=r"study.unseen is 0.3: of 0 test requests, 0 ask for one of the"):
        unseen.compare(world.tables, examples, own, tmp_path)
    other = own.model_copy(update={"controls": own.controls.model_copy(update={"n_tokens": [0, 2]})})
    assert "add 1 to controls.n_tokens" in str(conflicts.of_stage(other, "transfer"))


def test_a_transfer_stage_without_anything_to_compare_is_refused() -> None:
    nothing = Params(study=StudyParams(transfer_steps=[]))
    assert "has nothing to compare: set study.source, study.transfer_steps" in str(conflicts.of_stage(nothing, "transfer"))
    for study in ({"source": "ml-1m"}, {"transfer_steps": [20]}, {"unseen": 0.25}):
        some = Params(study=StudyParams(**{"transfer_steps": [], **study}))
        assert conflicts.of_stage(some, "transfer") is None


def test_trainings_without_all_values_to_compare_with_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'study.unseen_trainings' needs a baseline: add 'words, all values'"):
        StudyParams(unseen_trainings=["tokens, all values", "words, never seen"])


def test_trainings_without_some_values_are_kept_and_compared(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(stages, "require", lambda run, stage: {"identity": "first"})
    own = with_prior(world, prior=False, steps=2, curriculum_steps=2, control="constraints", loss="listwise")
    study = own.study.model_copy(update={"unseen": 0.3})
    own = own.model_copy(update={"study": study, "evaluation": EvaluationParams(bootstrap=20)})
    chosen = unseen.choose(world.prepared.vocabulary, 0.3, own.seed)
    kept, other = (np.flatnonzero(mask & (world.prepared.vocabulary.frequency() > 0))[0] for mask in (chosen, ~chosen))
    request = np.where(np.arange(len(world.pools.window))[:, None] % 2, kept, other)
    prepared = world.prepared._replace(requests=world.prepared.requests | {("test", 1): request})
    examples = world.examples._replace(prepared=prepared)
    found, values = unseen.compare(world.tables, examples, own, tmp_path / "stage")
    cases = ("all values", "never requested", "never seen")
    assert list(found) == [f"{form}, {case}" for form in ("tokens", "words") for case in cases] == list(get_args(UnseenTraining))
    kept_files = sorted((tmp_path / "stage").iterdir())
    assert [path.suffix for path in kept_files] == [".npz"] * 6
    some = ["words, all values", "words, never seen"]
    fewer = own.model_copy(update={"study": StudyParams(unseen=0.3, unseen_trainings=some)})
    again, _ = unseen.compare(world.tables, examples, fewer, tmp_path / "stage")
    assert list(again) == some
    np.testing.assert_array_equal(*(part["words, never seen"].control for part in (found, again)))
    users = world.tables.windows.set_index("window").loc[world.pools.window, "user"].to_numpy()
    table = unseen.judge({"corec": found["tokens, never seen"], **found}, values, examples, users, own)
    assert (table[table["model"].isin(["corec", "words, all values", "tokens, all values"])]["ahead"] == 0).all()
    assert set(table["tokens"]) == {"trained", "kept back"} and set(table["n_tokens"]) == {1}
    assert (table["kept_back"] == values.sum()).all() and set(table["over"]) == {"sasrec"}
    by_model = table.set_index(["model", "tokens", "metric"])
    gain = by_model["value"] - by_model["value"]["sasrec"].reindex(by_model.index.droplevel("model")).to_numpy()
    np.testing.assert_allclose(by_model["gain"], gain, atol=1e-9)
    folder = tmp_path / "figures"
    folder.mkdir()
    assert [path.name for path in unseen.keep(table, folder)] == ["unseen.csv", "unseen.png"]
    page = (folder / "results.md").read_text()
    assert page.count("| `words, never seen` |") == 3 and "## Values kept back, differences from the order of `sasrec`" in page
    within = own.model_copy(update={"study": StudyParams(unseen=0.3, unseen_trainings=some, unseen_windows=1)})
    part, _ = unseen.compare(world.tables, examples, within, tmp_path / "stage")
    rows = unseen.chosen_windows(request, values, within)
    assert len(rows) == len(request) // 2 + 1
    for name in some:
        assert part[name].control.shape == (len(rows), *again[name].control.shape[1:])
        np.testing.assert_allclose(part[name].control, again[name].control[rows], atol=1e-4)
    alone = unseen.judge(part, values, examples, users, within).set_index(["model", "tokens", "metric"])
    assert (alone["ahead"].loc["words, all values"] == 0).all() and "corec" not in alone.index.get_level_values("model")
    whole = table.set_index(["model", "tokens", "metric"])["value"]
    for name in ("rule", *some):
        assert alone.loc[(name, "kept back", "cp"), "value"] == pytest.approx(whole[name, "kept back", "cp"])


def test_windows_with_values_kept_back_are_all_scored_and_of_the_others_some() -> None:
    values, request = np.array([False, True, False]), np.array([[0], [1], [-1], [2], [0], [1], [0]])
    rows = unseen.chosen_windows(request, values, Params(study=StudyParams(unseen=0.3, unseen_windows=2)))
    assert {1, 5} < set(rows) and len(rows) == 4 and 2 not in rows and (np.diff(rows) > 0).all()
    every = unseen.chosen_windows(request, values, Params(study=StudyParams(unseen=0.3)))
    np.testing.assert_array_equal(every, range(7))


def test_only_a_run_that_transfers_or_has_a_re_ranker_needs_it() -> None:
    least = ["data", "sasrec", "controls", "transfer"]
    alone = Params(stages=least, study=StudyParams(transfer_steps=[], unseen=0.3))
    assert stages.ancestors("transfer", alone) == ["data", "sasrec", "controls"]
    for study, of in (({"transfer_steps": [20]}, least), ({"source": "ml-1m"}, least), ({}, [*least, "reranker"])):
        other = Params(stages=of, study=StudyParams(**{"transfer_steps": [], "unseen": 0.3, **study}))
        assert "reranker" in stages.ancestors("transfer", other)
