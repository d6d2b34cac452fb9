"""Requests in free text: labelled sentences, parsers, constrained decoding, and the study."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_prior import params as with_prior
from test_prior import trained, world_with_priors
from test_reranker import World

from corec import CorecError, conflicts, controls, pages, paths, reranker, stages
from corec.controls import Vocabulary
from corec.params import ControlsParams, EvaluationParams, Params, StudyParams
from corec.studies import language, language_study, parsers, sentence_requests
from corec.studies.language import Sentence


@pytest.fixture(scope="module")
def films() -> Vocabulary:
    """Two films with values of the MovieLens scheme, and all of its labels."""
    genres = [label for label in language.phrases()["genre"]]
    items = pd.DataFrame(
        {
            "item": [1, 2, 3],
            "genres": [["Comedy"], ["War", "Drama"], genres],
            "year": [1986.0, 1993.0, 1950.0],
            "popularity_rank": [10, 100, 900],
            "mean_rating": [3.7, 4.2, 2.0],
            "rating_std": [0.5, 1.0, 1.5],
        }
    )
    return controls.build_vocabulary(items, ControlsParams(scheme="movielens"))


def test_every_value_has_phrases_and_hand_written_sentences(films: Vocabulary) -> None:
    names = {f"{attribute.name}: {label}" for attribute, label in language.values(films)}
    read = language.phrases()
    assert names == {f"{name}: {label}" for name, labels in read.items() if name != "frames" for label in labels}
    sentences = language.hand_written()
    assert len(sentences) >= 120 and len({part.text.lower() for part in sentences}) == len(sentences)
    used = [f"{name}: {label}" for part in sentences for name, labels in part.request.items() for label in labels]
    assert set(used) == names and min(used.count(name) for name in names) >= 4
    known = {phrase for labels in read.values() if isinstance(labels, dict) for part in labels.values() for phrase in part}
    assert not set(read["frames"]["known"]) & set(read["frames"]["new"]) and known


def test_other_schemes_are_refused_before_the_first_notebook() -> None:
    params = Params()
    assert "set evidence.combiner" in str(conflicts.OF_STAGES["language"](params))
    for changes in ({"scheme": "amazon"}, {"attributes": ["genre", "era"]}):
        other = params.model_copy(update={"controls": ControlsParams.model_validate(changes)})
        assert "sentences about films" in str(conflicts.OF_STAGES["language"](other))


def test_made_sentences_are_seeded_and_their_typos_small() -> None:
    one, other = language.made(50, "new", 3), language.made(50, "new", 3)
    assert one == other != language.made(50, "new", 4)
    assert all(1 <= len(part.request) <= 3 for part in one)
    sets = language.sets(50, 3)
    assert [part.request for part in sets["typos"]] == [part.request for part in sets["templates, new"]]
    assert sets["typos"] != sets["templates, new"]
    rng = np.random.default_rng(0)
    for text in ("romantic comedy", "western"):
        typed = language.with_typos(text, 1.0, rng)
        assert typed != text and abs(len(typed) - len(text)) <= 2 and typed[0] == text[0]
    assert language.with_typos("the war film", 0.0, rng) == "the war film"


@pytest.mark.parametrize(
    ("text", "request_"),
    [
        ("A FUNNY cartoon from the eighties", {"genre": {"Comedy", "Animation"}, "era": {"the 1980s"}}),
        ("very popular war film", {"genre": {"War"}, "popularity": {"top 50"}}),
        ("a comdy of 1993", {"genre": {"Comedy"}, "era": {"1990 to 1994"}}),
        ("something shot in the 50s, rated 3.6", {"era": {"before 1970"}, "rating": {"3.5 to 4"}}),
        ("top 120, controversial", {"popularity": {"top 200"}, "consensus": {"divided"}}),
        ("beyond the top 500", {"popularity": {"beyond 500"}}),
        ("surprise me", {}),
    ],
)
def test_patterns_read_phrases_typos_and_numbers(films: Vocabulary, text: str, request_: language.Request) -> None:
    assert parsers.Grammar(films)(text) == request_


def test_patterns_read_all_known_phrases(films: Vocabulary) -> None:
    sentences, parser = language.made(200, "known", 1), parsers.Grammar(films)
    assert language.accuracy(sentences, [parser(part.text) for part in sentences])["exact"] == 1


def test_accuracy_by_hand() -> None:
    sentences = [Sentence("", {"genre": {"a", "b"}}), Sentence("", {}), Sentence("", {"era": {"c"}})]
    found = language.accuracy(sentences, [{"genre": {"a"}}, {}, {"era": {"d"}, "genre": {"e"}}])
    assert found == pytest.approx({"exact": 1 / 3, "precision": 1 / 3, "recall": 1 / 3, "f1": 1 / 3})
    assert language.by_attribute(sentences, [{"genre": {"a", "b"}}, {}, {}])["era"] == pytest.approx(2 / 3)


def test_the_nearest_name_above_the_threshold_is_taken(films: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["comedy", "war", "1980s"]

    def embed(self: parsers.Nearest, texts: list[str]) -> np.ndarray:
        return np.array([[word in text.lower() for word in words] + [0.01] for text in texts], float)

    monkeypatch.setattr(parsers.Nearest, "embed", embed)
    nearest = parsers.Nearest(films, (None, None), 0.5)
    assert nearest("a comedy of the 1980s") == {"genre": {"Comedy"}, "era": {"the 1980s"}}
    assert nearest("nothing of the kind") == {}
    known = [Sentence("a comedy", {"genre": {"Comedy"}}), Sentence("hello", {})]
    assert nearest.tune(known, [0.0, 0.4, 5.0]) == 0.4 and nearest.threshold == 0.4


def test_constrained_decoding_gives_valid_requests_only(films: Vocabulary) -> None:
    model = parsers.Constrained(films, "tiny", language.made(2, "known", 0))
    found = model.all(["a comedy", "", "a far longer sentence about nothing in particular, to be padded"], batch=2)
    names = {(attribute.name, label) for attribute, label in language.values(films)}
    assert len(found) == 3 and {(name, *labels) for request in found for name, labels in request.items()} <= names
    written: list[int] = []
    for name, label in (
        ("genre", "Film-Noir"),
        ("era", "any"),
        ("popularity", "top 50"),
        ("rating", "any"),
        ("consensus", "mixed"),
    ):
        for token in model.ids(f"{name}:") + model.ids(f" {label}\n"):
            assert token in model.allowed(written), (name, label)
            written.append(token)
    assert model.allowed(written) == [model.tokenizer.eos_token_id]
    assert model.read(written) == {"genre": {"Film-Noir"}, "popularity": {"top 50"}, "consensus": {"mixed"}}


def test_a_comparison_with_an_item_gives_the_values_on_one_side(films: Vocabulary) -> None:
    titles = ["The Laughing Policeman", "The Long March", "Anything"]

    def names(text: str) -> list[str] | None:
        found = language.compare_to_item(text, titles, films)
        return None if found is None else [films.name(value) for value in found.values]

    assert names("similar to the long march but older") == ["era: the 1980s", "era: the 1970s", "era: before 1970"]
    assert names("something like The Laughing Polceman, but better rated") == ["rating: 4 and more"]
    assert names("like The Long March but more popular") == ["popularity: top 50"]
    assert names("like The Long March but cheaper") is None, "films have no price"
    assert names("like nothing on this list at all but older") is None and names("older, please") is None


def test_the_study_of_language(atomic: Path, tmp_path: Path, films: Vocabulary) -> None:
    world = world_with_priors(atomic)
    own = with_prior(world).model_copy(update={"evaluation": EvaluationParams(bootstrap=20), "run": "tried"})
    own = own.model_copy(update={"study": StudyParams(parsers=["grammar", "model"], sentences=20)})
    sets = {name: part[:25] for name, part in language.sets(20, 0).items()}
    parsed, threshold = language_study.parse(sets, films, own)
    assert threshold is None and set(parsed["typos"]) == {"grammar", "model"}
    table = language_study.measure(sets, parsed, own)
    exact = table[table["metric"] == "exact"].set_index(["set", "parser"])["value"]
    assert exact["templates, known", "grammar"] == 1 and (table["low"] <= table["high"]).all()
    vocabulary = world.prepared.vocabulary
    some = [f"{attribute.name}" for attribute in vocabulary.attributes]
    label = vocabulary.labels[0]
    gold = [Sentence("", {some[0]: {label}}), Sentence("", {})]
    requests, sentence_of = language_study.requests_of(gold, {"right": [gold[0].request, {}], "blind": [{}, {}]}, world.prepared)
    assert (requests["gold"] == requests["right"]).all() and (requests["blind"] == -1).all()
    pools = world.prepared.pools["test"]
    scores = [reranker.score_parts(trained(world), world.examples, pools, list(requests.values()))]
    prior = np.stack([world.examples.prior[window] for window in pools.window])
    lists = language_study.end_to_end(requests, scores, world.prepared, prior, sentence_of, own)
    ahead = lists.set_index(["ranker", "parser", "metric"])["ahead"]
    assert (ahead.xs("gold", level="parser") == 0).all() and (ahead.xs("right", level="parser") == 0).all()
    assert ahead["rule+combiner", "blind", "cp"] <= 0
    direct = [reranker.score_parts(trained(world), world.examples, pools, [requests["gold"]])]
    whole = language_study.end_to_end(requests, scores, world.prepared, prior, sentence_of, own, direct)
    ahead = whole.set_index(["ranker", "parser", "metric"])["ahead"]
    assert (ahead["corec", "sentence"] == 0).all() and ("rule+combiner", "sentence", "cp") not in set(ahead.index)
    lists = pd.concat([whole.assign(set=name) for name in language_study.LISTED], ignore_index=True)
    written = language_study.keep(table, lists, tmp_path / "figures")
    assert sorted(path.name for path in written) == ["language.csv", "language.png", "language_lists.csv"]
    assert (tmp_path / "figures" / "results.md").read_text() == pages.study_page(tmp_path / "figures")
    strange = [*gold, Sentence("", {some[0]: {"nowhere"}})]
    again, _ = language_study.requests_of(strange, {"right": [gold[0].request, {}, {some[0]: {"nowhere"}}]}, world.prepared)
    assert (again["gold"] == requests["gold"]).all() and language.to_values([strange[2].request], vocabulary).tolist() == [[-1]]
    with pytest.raises(CorecError, match="No sentence has constraints that items"):
        language_study.requests_of([Sentence("", {})], {}, world.prepared)


@pytest.fixture
def world(atomic: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """The small data set with priors, and phrases for its values: the label itself."""
    world = world_with_priors(atomic)
    made: dict[str, Any] = {"frames": {"known": ["a {}", "the {}"], "new": ["one {}"], "open": ["any"]}}
    for attribute, label in language.values(world.prepared.vocabulary):
        made.setdefault(attribute.name, {})[label] = {"known": [label], "new": [label]}
    for module in (language, sentence_requests):
        monkeypatch.setattr(module, "phrases", lambda: made)
    return world


def test_a_sentence_is_followed_by_the_tokens_of_all_attributes(world: World) -> None:
    prompter = world.build(with_prior(world)).prompter
    text = "a <genre: Comedy> film, please"
    row = prompter.row([1], [2, 3], [text, np.array([text])[0]])
    names = [prompter._ids[f"<{attribute.name}>"] for attribute in world.prepared.vocabulary.attributes]
    assert row.suffixes[0] == row.suffixes[1]
    assert [row.suffixes[0][slice(*span)] for span in row.constraints[0]] == [[name] for name in names]
    assert not set(row.suffixes[0][: row.constraints[0][0][0]]) & set(prompter._ids.values()), "no control token from the text"
    long = prompter.row([1], [2, 3], ["film " * 500])
    assert len(long.suffixes[0]) < 80 and long.constraints[0][0][0] < 80


def test_batches_of_sentences_say_what_the_requests_ask(world: World) -> None:
    own, vocabulary = with_prior(world), world.prepared.vocabulary
    plain, batch = reranker.training_batch(world.examples, own, 20), sentence_requests.draw(world.examples, own, 20)
    again = sentence_requests.draw(world.examples, own, 20)
    assert all((one == other).all() for one, other in zip(batch.requests, again.requests, strict=True))
    assert batch.targets.present.all() and batch.targets.met.shape[2] == len(vocabulary.attributes)
    np.testing.assert_array_equal(batch.targets.met.sum(axis=2), plain.targets.met.sum(axis=2))
    for place, (texts, values) in enumerate(zip(batch.requests, plain.requests, strict=True)):
        for window, (text, row) in enumerate(zip(texts, values, strict=True)):
            asked = [vocabulary.labels[value] for value in row if value >= 0]
            assert asked or text == "any"
            assert all(label[0] in text for label in asked)  # the rest of a label may have a typo
            for value in row[row >= 0]:
                met = (vocabulary.values_of[batch.pools.candidates[window]] == value).any(axis=1)
                np.testing.assert_array_equal(batch.targets.met[window, place, vocabulary.attribute_of[value]], met)


def test_training_on_sentences_starts_from_the_run_and_is_kept(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own = with_prior(world, lr=1e-5, lr_head=1e-5, lr_rows=1e-5)
    own = own.model_copy(update={"study": StudyParams(sentence_plain_steps=1, sentence_steps=1), "run": "tried"})
    model = trained(world)
    reranker.save(model, pd.DataFrame({"step": [0]}), tmp_path)
    monkeypatch.setattr(stages, "require", lambda run, stage: {"identity": "first"})
    monkeypatch.setattr(paths, "stage_dir", lambda run, stage: tmp_path)
    drawn: list[bool] = []
    draw = sentence_requests.draw
    monkeypatch.setattr(sentence_requests, "draw", lambda *given: (drawn.append((batch := draw(*given)).plain), batch)[1])
    texts = [np.array(["the film"] * len(world.pools.window)), np.array(["any"] * len(world.pools.window))]
    prepared = world.prepared._replace(pools=world.prepared.pools | {"test": world.pools})
    examples = world.examples._replace(prepared=prepared)
    (found,) = sentence_requests.scores(world.tables, examples, own, texts, tmp_path / "kept")
    assert drawn == [True, False]
    before = reranker.score_parts(model, examples, world.pools, texts)
    assert found.control.shape == before.control.shape and (found.control != before.control).any()
    np.testing.assert_allclose(found.control, before.control, rtol=0.02, err_msg="it starts from the trained weights")
    assert [path.suffix for path in (tmp_path / "kept").iterdir()] == [".npz"]
    (again,) = sentence_requests.scores(world.tables, examples, own, texts, tmp_path / "kept")
    np.testing.assert_array_equal(found.control, again.control)
