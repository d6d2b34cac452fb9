import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel

from corec import CorecError, backbones, controls, data, reranker, stages
from corec.params import ControlsParams, DataParams, MaxWindows, Params, RerankerParams
from corec.scale import estimate

READOUTS = [
    {"readout": "late", "pooling": "mean", "layers": "mix"},
    {"readout": "late", "pooling": "end", "layers": "last"},
    {"readout": "candidate", "request_position": "before"},
    {"readout": "index"},
    {"readout": "index", "request_position": "before", "values": "words"},
]


class World:
    """A small data set with pools, ready for the tiny backbone."""

    def __init__(self, atomic: Path, k: int = 6) -> None:
        self.tables = data.prepare(DataParams(path=str(atomic), core=1))
        rng = np.random.default_rng(0)
        n = len(self.tables.items)
        found = [rng.permutation(np.arange(1, n + 1))[:k] for _ in range(len(self.tables.windows))]
        scores = [np.arange(k, 0, -1.0)] * len(found)
        frame = pd.DataFrame({"window": self.tables.windows["window"], "candidates": found, "scores": scores})
        params = ControlsParams(k=k, n_tokens=[0, 1, 2], train_truth="any", max_windows=MaxWindows(train=60, valid=8, test=8))
        self.prepared = controls.prepare(self.tables.windows, frame, self.tables.items, params, seed=0)
        self.examples = reranker.load_examples(self.tables.windows, self.prepared)
        self.controls = params
        self.pools = self.prepared.pools["valid"]
        self.requests = [self.prepared.requests["valid", n] for n in (0, 1, 2)]

    def params(self, **changes: Any) -> Params:
        values = {"backbone": "tiny", "dtype": "float32", "batch_size": 2, "requests_per_window": 4, "steps": 6,
                  "curriculum_steps": 2, "checkpoint_steps": 2} | changes  # fmt: skip
        return Params(controls=self.controls, reranker=RerankerParams.model_validate(values))

    def build(self, params: Params, **kwargs: Any) -> reranker.Reranker:
        return reranker.build(self.tables.items, self.prepared.vocabulary, params.reranker, seed=0, **kwargs)


@pytest.fixture
def world(atomic: Path) -> World:
    return World(atomic)


def unlike_start(model: reranker.Reranker) -> None:
    """Give every trainable parameter a value that matters (LoRA's B starts at zero)."""
    torch.manual_seed(5)
    with torch.no_grad():
        for value in model.trainable().values():
            value.add_(0.05 * torch.randn_like(value))


def textbook_scores(model: reranker.Reranker, row: reranker.Row) -> torch.Tensor:
    """Scores [K] of one request by the plain way: one sequence, an ordinary causal forward, full logits."""
    params = model.params
    ids = torch.tensor([row.prefix + row.suffixes[0]])
    output = model.model(input_ids=ids, output_hidden_states=True)
    if params.readout == "index":
        wanted = [model.tokenizer.convert_tokens_to_ids(reranker.index_token(i)) for i in range(len(row.spans))]
        return output.logits[0, -1, wanted].float()
    layers = output.hidden_states if params.layers == "mix" else output.hidden_states[-1:]
    norm = torch.nn.functional.layer_norm
    mix = model.head.mix.softmax(0)

    def state(start: int, end: int) -> torch.Tensor:
        start = end - 1 if params.pooling == "end" else start
        pooled = [norm(layer[0, start:end].float().mean(0), layer.shape[-1:]) for layer in layers]
        return sum(share * layer for share, layer in zip(mix, pooled, strict=True))

    scores = []
    for start, end in row.spans:
        candidate = state(start, end)
        score = (model.head.relevance.weight @ candidate)[0]
        if params.readout == "late":
            request = state(len(row.prefix), ids.shape[1])
            left, right = model.head.candidate.weight @ candidate, model.head.request.weight @ request
            score = score + left @ right / left.shape[0] ** 0.5
        scores.append(score)
    return torch.stack(scores)


@pytest.mark.parametrize("changes", READOUTS, ids=lambda c: "-".join(c.values()))
def test_batched_shared_prefix_equals_one_request_at_a_time(world: World, changes: dict[str, str]) -> None:
    model = world.build(world.params(**changes))
    unlike_start(model)
    batched = reranker.score(model, world.examples, world.pools, world.requests)
    assert batched.shape == (8, 3, 6)
    for window in range(0, 8, 3):
        for place, request in enumerate(world.requests):
            rows = reranker.make_rows(model, world.examples, world.pools.take(np.array([window])), [request[[window]]])
            with torch.no_grad():
                wanted = textbook_scores(model, rows[0]).numpy()
            np.testing.assert_allclose(batched[window, place], wanted, atol=1e-4)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_any_batch_size_gives_the_same_scores(world: World, size: int) -> None:
    base = world.build(world.params())
    unlike_start(base)
    one = reranker.score(base, world.examples, world.pools, world.requests)
    base.params = base.params.model_copy(update={"eval_batch_size": size})
    np.testing.assert_allclose(reranker.score(base, world.examples, world.pools, world.requests), one, atol=1e-4)


def test_fifty_candidates_have_fifty_index_tokens(atomic: Path) -> None:
    world = World(atomic, k=50)
    model = world.build(world.params(readout="index"))
    tokens = [reranker.index_token(i) for i in range(50)]
    assert len(set(model.tokenizer.convert_tokens_to_ids(tokens))) == 50
    assert [reranker.letters(i) for i in (0, 25, 26, 49)] == ["A", "Z", "AA", "AX"]
    assert np.isfinite(reranker.score(model, world.examples, world.pools, world.requests)).all()


def test_new_rows_start_from_the_mean_of_their_words(world: World) -> None:
    bare, tokenizer = backbones.tiny_model()
    rows = bare.get_input_embeddings().weight.detach().clone()
    model = world.build(world.params())
    for token, words in reranker.new_tokens(world.prepared.vocabulary, model.params).items():
        wanted = rows[tokenizer(words)["input_ids"]].mean(0)
        found = reranker.token_rows(model, [token]).to_numpy()[0]
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_prompt_in_the_papers_order_and_in_ours(world: World) -> None:
    texts = {}
    for position in ("before", "after"):
        model = world.build(world.params(readout="index", request_position=position, values="words"))
        row = reranker.make_rows(model, world.examples, world.pools.take(np.array([0])), [world.requests[2][:1]])[0]
        texts[position] = model.tokenizer.decode(row.prefix + row.suffixes[0])
        lines = [model.tokenizer.decode(row.prefix[start:end]) for start, end in row.spans]
        assert all("Film number" in line and line.endswith("\n") for line in lines) and len(lines) == 6
    for position, text in texts.items():
        assert (text.index("Control Tokens:") < text.index("Rank these")) == (position == "before")
        assert " |||" in text and text.endswith("The best candidate is:")


def test_ranknet_against_loops() -> None:
    torch.manual_seed(0)
    scores, control = torch.randn(3, 2, 5), torch.randint(0, 3, (3, 2, 5))
    control[0, 0] = 1  # no pair
    terms = []
    for s, r in zip(scores.reshape(6, 5), control.reshape(6, 5), strict=True):
        pairs = [torch.log1p(torch.exp(-(s[i] - s[j]))) for i in range(5) for j in range(5) if r[i] > r[j]]
        terms.append(torch.stack(pairs).mean() if pairs else torch.tensor(0.0))
    torch.testing.assert_close(reranker.ranknet(scores, control), torch.stack(terms).mean())


def test_micro_batches_give_the_gradient_of_the_whole_batch(world: World) -> None:
    gradients = []
    for size in (1, 2, 5):
        params = world.params(batch_size=5, micro_batch=size)
        model = world.build(params)
        batch = reranker.training_batch(world.examples, params, step=7)
        loss = reranker.backward(model, reranker.make_rows(model, world.examples, batch.pools, batch.requests), batch.targets)
        gradients.append({name: value.grad for name, value in model.trainable().items()} | {"loss": torch.tensor(loss)})
    for other in gradients[1:]:
        for name, value in gradients[0].items():
            torch.testing.assert_close(other[name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_training_learns_and_moves_only_what_it_should(world: World) -> None:
    params = world.params(steps=60, curriculum_steps=60, lr=3e-3, lr_head=3e-3, batch_size=8)
    model = world.build(params)
    frozen = {name: value.detach().clone() for name, value in model.model.named_parameters() if not value.requires_grad}
    words = reranker.new_tokens(world.prepared.vocabulary, params.reranker)
    before = reranker.token_rows(model, words)
    curve = reranker.train(model, world.examples, params, None)
    assert curve["loss"].iloc[0] > 0.6 and curve["loss"].iloc[30:60].mean() < 0.3
    assert reranker.row_drift(before, reranker.token_rows(model, words)).median() > 0.01
    for name, value in model.model.named_parameters():
        if name in frozen:
            assert torch.equal(value, frozen[name]), name
    scores = reranker.score(model, world.examples, world.pools, world.requests)
    gaps = reranker.score_gap(scores, world.pools, world.requests, world.prepared.vocabulary.values_of)
    assert gaps[1] > 0.3


def test_resuming_gives_the_same_parameters(world: World, tmp_path: Path) -> None:
    params = world.params(max_minutes=1000)
    whole = world.build(params)
    unbroken = reranker.train(whole, world.examples, params, None)
    stopped = world.build(params)
    reranker.train(stopped, world.examples, params, tmp_path, stop_after=5)
    resumed = world.build(params)
    curve = reranker.train(resumed, world.examples, params, tmp_path)
    np.testing.assert_allclose(curve["loss"], unbroken["loss"], atol=1e-5)
    for name, value in whole.trainable().items():
        torch.testing.assert_close(resumed.trainable()[name], value, atol=1e-4, rtol=1e-3)


def test_the_time_limit_ends_the_training_and_says_so(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    params = world.params(max_minutes=1e-6)
    assert len(reranker.train(world.build(params), world.examples, params, None)) == 1
    total = params.reranker.curriculum_steps + params.reranker.steps
    assert f"ended at step 1 of {total}: raise reranker.max_minutes (1e-06), train anew" in capsys.readouterr().out


def test_other_parameters_do_not_resume(world: World, tmp_path: Path) -> None:
    params = world.params()
    reranker.train(world.build(params), world.examples, params, tmp_path, stop_after=4)
    other = world.params(lr=5e-3)
    assert len(reranker.train(world.build(other), world.examples, other, tmp_path, stop_after=1)) == 1


@pytest.mark.parametrize("changes", READOUTS[::3], ids=lambda c: "-".join(c.values()))
def test_saved_adapter_gives_the_same_scores_through_peft_alone(
    world: World, changes: dict[str, str], start_stages: Callable[[Params, str], stages.Stage]
) -> None:
    params = world.params(**changes)
    model = world.build(params)
    curve = reranker.train(model, world.examples, params, None)
    stage = start_stages(params.model_copy(update={"run": "r"}), "reranker")
    stage.finish(reranker.save(model, curve, stage.folder))
    again = reranker.load(stage.folder, world.tables.items, world.prepared.vocabulary, params.reranker)
    wanted = reranker.score(model, world.examples, world.pools, world.requests)
    np.testing.assert_allclose(reranker.score(again, world.examples, world.pools, world.requests), wanted, atol=1e-5)

    from transformers import AutoTokenizer

    base, _ = backbones.tiny_model()
    tokenizer = AutoTokenizer.from_pretrained(stage.folder / "adapter")
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    alone = PeftModel.from_pretrained(base, str(stage.folder / "adapter")).eval()
    prompt = tokenizer("Control Tokens:<genre: Comedy>" if changes["readout"] == "late" else "Rank", return_tensors="pt")
    model.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(alone(**prompt).logits, model.model(**prompt).logits, atol=1e-4, rtol=1e-4)
    assert (stage.folder / "adapter" / "adapter_model.safetensors").stat().st_size < 2_000_000, "no whole embedding in it"


def test_zero_shot_trains_nothing(world: World) -> None:
    model = reranker.zero_shot(world.tables.items, world.prepared.vocabulary, world.params().reranker)
    assert model.params.readout == "index" and model.params.values == "words"
    assert reranker.score(model, world.examples, world.pools, world.requests).shape == (8, 3, 6)


def test_bfloat16_ranks_almost_alike(world: World) -> None:
    wide = world.build(world.params())
    unlike_start(wide)
    narrow = world.build(world.params(dtype="bfloat16"))
    with torch.no_grad():
        for name, value in wide.trainable().items():
            narrow.trainable()[name].copy_(value)
    one = reranker.score(wide, world.examples, world.pools, world.requests)
    other = reranker.score(narrow, world.examples, world.pools, world.requests)
    assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.98


def test_no_adapter_and_no_model(world: World, tmp_path: Path) -> None:
    with pytest.raises(CorecError, match="contains no adapter: run notebooks/04_reranker.ipynb"):
        reranker.load(tmp_path, world.tables.items, world.prepared.vocabulary, world.params().reranker)
    with pytest.raises(CorecError, match="no causal language model '/no/such/model'"):
        backbones.load("/no/such/model")


def test_a_gated_model_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("You are trying to access a gated repo.")

    monkeypatch.setattr(backbones.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(
        CorecError, match=r"reranker.backbone: .*ask for access on its page and log in \(`hf auth login`\); or name the open"
    ):
        backbones.load("meta-llama/Meta-Llama-3-8B")


def test_a_loss_that_is_not_a_number_stops(world: World, tmp_path: Path) -> None:
    params = world.params()
    model = world.build(params)
    with torch.no_grad():
        model.head.candidate.weight[0, 0] = torch.nan
    with pytest.raises(CorecError, match="gradient is not a number at step 0: lower reranker.lr"):
        reranker.train(model, world.examples, params, None)
    with pytest.raises(CorecError, match=r"at step 0 \(its batch is in .*failed_batch.json\): lower reranker.lr"):
        reranker.train(model, world.examples, params, tmp_path)
    assert len(json.loads((tmp_path / "failed_batch.json").read_text())["window"]) == 2


def test_few_requests_take_all_lengths_in_turn(world: World) -> None:
    params = world.params(requests_per_window=1, curriculum_steps=0)
    lengths = [reranker.training_batch(world.examples, params, step).requests[0].shape[1] for step in range(6)]
    assert lengths == [0, 1, 2, 0, 1, 2]


def test_another_architecture_takes_the_adapter_on_all_its_layers(world: World, tmp_path: Path) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    _, tokenizer = backbones.tiny_model()
    config = GPTNeoXConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                           max_position_embeddings=4096)  # fmt: skip
    torch.manual_seed(0)
    backbones.save_whole(tmp_path / "neox", GPTNeoXForCausalLM(config), tokenizer)
    model = world.build(world.params(backbone=str(tmp_path / "neox")))
    unlike_start(model)
    batched = reranker.score(model, world.examples, world.pools, world.requests)
    rows = reranker.make_rows(model, world.examples, world.pools.take(np.array([2])), [world.requests[1][[2]]])
    with torch.no_grad():
        np.testing.assert_allclose(batched[2, 1], textbook_scores(model, rows[0]).numpy(), atol=1e-4)


def test_untied_models_train_both_tables() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=2, tie_word_embeddings=False)  # fmt: skip
    model = LlamaForCausalLM(config)
    assert reranker.token_layers(model, [60, 61], "index") == {"embed_tokens": [60, 61], "lm_head": [60, 61]}
    assert reranker.token_layers(model, [60, 61], "late") == {"embed_tokens": [60, 61]}, "its output layer is not looked at"


def test_llama_3_in_small_goes_all_the_way(world: World, tmp_path: Path) -> None:
    """The architecture of Llama-3-8B (grouped queries, untied head), with the paper's read-out, prompt and settings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    _, tokenizer = backbones.tiny_model()
    shape = estimate.SHAPES["meta-llama/Meta-Llama-3-8B"] | {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 224, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    backbones.save_whole(tmp_path / "llama", LlamaForCausalLM(LlamaConfig(**shape)), tokenizer)
    paper = {"readout": "index", "request_position": "before", "values": "words", "lora_dropout": 0.05, "lr": 1e-2}
    params = world.params(backbone=str(tmp_path / "llama"), gradient_checkpointing=True, curriculum_steps=0, **paper)
    model = world.build(params)
    start = {name: value.detach().clone() for name, value in model.trainable().items()}
    assert sum("trainable_tokens" in name for name in start) == 2, "new rows of both tables are trained"
    curve = reranker.train(model, world.examples, params, None)
    assert np.isfinite(curve["loss"]).all()
    assert all((value != start[name]).any() for name, value in model.trainable().items() if "lora_A" not in name)
    assert all("lora_" in name or "trainable_tokens" in name for name in start), "the tables themselves stay as they were"
    wanted = reranker.score(model, world.examples, world.pools, world.requests)
    reranker.save(model, curve, tmp_path)
    again = reranker.load(tmp_path, world.tables.items, world.prepared.vocabulary, params.reranker)
    np.testing.assert_allclose(reranker.score(again, world.examples, world.pools, world.requests), wanted, atol=1e-5)
    merged = reranker.Reranker(again.model.merge_and_unload(), again.tokenizer, again.head, again.prompter, again.params)
    assert not isinstance(merged.model, PeftModel)
    np.testing.assert_allclose(reranker.score(merged, world.examples, world.pools, world.requests), wanted, atol=1e-4)
    assert reranker.score_gap(wanted, world.pools, world.requests, world.prepared.vocabulary.values_of).keys() == {1, 2}


def test_the_plan_counts_what_training_would_train(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    params = world.params(readout="index")
    model = world.build(params)
    added = len(reranker.new_tokens(world.prepared.vocabulary, params.reranker))
    made = estimate.plan(params.reranker, tokens=100, new_tokens=added)
    assert made.trainable == sum(value.numel() for value in model.trainable().values())
    assert made.parameters == sum(value.numel() for value in model.model.parameters())
    assert estimate.main([str(Path(__file__).parents[1] / "params" / "amazon-electronics.yaml")]) == 0
    said = capsys.readouterr().out
    assert "8,052,117,504" in said and "21,413,888" in said and "4 devices" in said
    with pytest.raises(CorecError, match=r"the configuration of '/no/model' could not be loaded: .*log in to the hub"):
        estimate.plan(params.reranker.model_copy(update={"backbone": "/no/model"}), tokens=10, new_tokens=1)


def test_a_prompt_that_is_too_long_is_cut_by_rule_and_counted(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    model = world.build(world.params())
    prompter, window = model.prompter, int(world.pools.window[0])
    given = (world.examples.history[window], world.pools.candidates[0], [world.requests[1][0], world.requests[2][0]])
    whole = prompter.row(*given)
    prompter.limit = len(whole.prefix) + prompter.reserve - 5
    row = prompter.row(*given)
    lines = len(given[0]) + len(given[1])
    assert prompter.limit - lines < len(row.prefix) + prompter.reserve <= prompter.limit, (
        "no title is cut further than it must be"
    )
    assert prompter.row(given[0], given[1], [given[2][0]]).prefix == row.prefix, "whatever is asked"
    assert max(map(len, row.suffixes)) <= prompter.reserve
    assert row.suffixes == whole.suffixes and len(row.spans) == 6
    assert prompter.cut == {"rows": 3, "shorter titles": 2, "shorter histories": 0}
    bare = prompter._row([], given[1], given[2], False, 0)
    prompter.limit = len(bare.prefix) + prompter.reserve + 4
    assert len(prompter.row(*given).prefix) + prompter.reserve <= prompter.limit
    assert prompter.cut == {"rows": 4, "shorter titles": 3, "shorter histories": 1}
    prompter.limit = len(bare.prefix) + prompter.reserve - 1
    prompter.report_cut()
    assert f"prompts cut to the backbone's {prompter.limit} positions: {{'rows': 4, 'shorter t" in capsys.readouterr().out
    assert prompter.cut["rows"] == 0
    prompter.report_cut()
    assert not capsys.readouterr().out, "nothing cut, nothing said"
    with pytest.raises(CorecError, match="A prompt of 6 candidates takes .* positions even without titles .* lower controls.k"):
        prompter.row(*given)


def test_want_of_memory_names_the_parameter(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    params = world.params()
    model = world.build(params)
    reranker.train(model, world.examples, params, tmp_path, stop_after=2)
    lower = world.params(micro_batch=1, eval_batch_size=1)
    resumed = world.build(lower)
    reranker.train(resumed, world.examples, lower, tmp_path, stop_after=2)
    for name, value in model.trainable().items():
        assert torch.equal(resumed.trainable()[name], value), "what the sentence tells to lower starts nothing anew"

    def refuse(*_: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(reranker.Reranker, "parts", refuse)
    said = "the tensor is not allocated yet"
    with pytest.raises(RuntimeError, match="not allocated yet"):
        reranker.score(model, world.examples, world.pools, world.requests)
    said = "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"
    with pytest.raises(CorecError, match="The memory is not enough: lower reranker.eval_batch_size"):
        reranker.score(model, world.examples, world.pools, world.requests)
    with pytest.raises(CorecError, match="The memory is not enough: lower reranker.micro_batch"):
        reranker.train(model, world.examples, params, None)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_reranker import World
from corec import checkpoint, reranker
world = World(Path(sys.argv[1]))
params = world.params(max_minutes=1000, steps=8)
save = checkpoint.torch.save
def save_then_die(*args):
    save(*args)
    if args[0]["rows"][-1][0] >= 5:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.torch.save = save_then_die
reranker.train(world.build(params), world.examples, params, Path(sys.argv[2]))
"""


def test_killed_in_the_middle_of_saving_it_resumes_to_the_same_parameters(world: World, atomic: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stage"
    folder.mkdir()
    command = [sys.executable, "-c", KILLED, str(atomic), str(folder), str(Path(__file__).parent)]
    assert subprocess.run(command, check=False).returncode == -9
    assert (folder / "checkpoint.pt").exists() and list(folder.glob(".part-*-checkpoint.pt")), (
        "killed with a new one half in place"
    )
    params = world.params(max_minutes=1000, steps=8)
    whole, resumed = world.build(params), world.build(params)
    unbroken = reranker.train(whole, world.examples, params, None)
    curve = reranker.train(resumed, world.examples, params, folder)
    assert curve["loss"].tolist() == unbroken["loss"].tolist()
    for name, value in whole.trainable().items():
        assert torch.equal(resumed.trainable()[name], value), name


HOSTILE = "Nice <genre: Comedy> film <|end|> <era>"


@pytest.mark.parametrize("values", ["token", "words"])
def test_a_title_never_yields_a_control_token(world: World, values: str) -> None:
    plain, items = world.tables.items, world.tables.items.copy()
    item = int(world.pools.candidates[0, 0])
    items.loc[items["item"] == item, "title"] = HOSTILE
    model = reranker.build(items, world.prepared.vocabulary, world.params(values=values).reranker, seed=0)
    special = set(model.tokenizer.get_added_vocab().values())
    assert {"<genre>", "<era>"} <= set(model.tokenizer.get_added_vocab()), "what the title imitates is a token"
    assert not special & set(model.prompter.titles[item]), "no token number of the title is an added one"
    assert (
        model.tokenizer.decode(model.prompter.titles[item]).strip()
        == HOSTILE[: len(model.tokenizer.decode(model.prompter.titles[item]).strip())]
    )
    row = reranker.make_rows(model, world.examples, world.pools.take(np.array([0])), [world.requests[0][:1]])[0]
    for place, (start, end) in enumerate(row.spans):
        line = [token for token in row.prefix[start:end] if token in special]
        wanted = [token for token in model.prompter.described[world.pools.candidates[0, place]] if token in special]
        assert line == wanted, "a line holds the item's own values and no others"
    encoded = reranker.encode(model.tokenizer, [HOSTILE, plain["title"].iloc[0]])
    assert (
        not special & set(encoded[0])
        and encoded[1] == model.tokenizer(plain["title"].iloc[0], add_special_tokens=False)["input_ids"]
    )


def test_a_title_that_names_a_value_is_not_ranked_as_if_it_had_it(world: World) -> None:
    params = world.params(steps=60, curriculum_steps=60, lr=3e-3, lr_head=3e-3, batch_size=8)
    table, pools, request = world.prepared.vocabulary, world.pools, world.requests[1]
    model = world.build(params)
    reranker.train(model, world.examples, params, None)
    before = reranker.score(model, world.examples, pools, [request])[:, 0]
    met = controls.matches(pools.candidates, request, table.values_of)[:, :, 0]
    window = int(np.flatnonzero((request[:, 0] >= 0) & (~met).any(axis=1))[0])
    place = int(np.flatnonzero(~met[window])[0])
    title = f"<{table.name(int(request[window, 0]))}>"
    model.prompter.titles[pools.candidates[window, place]] = reranker.encode(model.tokenizer, [title])[0]
    after = reranker.score(model, world.examples, pools, [request])[:, 0]
    gap = before[window][met[window]].mean() - before[window, place] if met[window].any() else np.ptp(before[window])
    assert after[window, place] - before[window, place] < 0.5 * gap, "the title does not pass for the attribute"


def test_a_second_training_begins_where_the_first_began(world: World) -> None:
    params = world.params()
    model = world.build(params)
    first = reranker.train(model, world.examples, params, None)
    states = {name: value.clone() for name, value in model.trainable().items()}
    second = reranker.train(model, world.examples, params, None)
    assert first["loss"].tolist() == second["loss"].tolist(), "a notebook's cell can be run again"
    for name, value in model.trainable().items():
        assert torch.equal(value, states[name]), name


def test_a_checkpoint_of_another_number_format_is_refused_and_the_advice_works(world: World, tmp_path: Path) -> None:
    reranker.train(world.build(world.params(dtype="float32")), world.examples, world.params(dtype="auto"), tmp_path, stop_after=4)
    other = world.build(world.params(dtype="bfloat16"))
    sentence = r"made in torch.float32, this training computes in torch.bfloat16: set reranker.dtype to 'float32'"
    with pytest.raises(CorecError, match=sentence):
        reranker.train(other, world.examples, world.params(dtype="auto"), tmp_path)
    params = world.params(dtype="float32")
    curve = reranker.train(world.build(params), world.examples, params, tmp_path)
    whole = reranker.train(world.build(params), world.examples, params, None)
    assert curve["loss"].tolist() == whole["loss"].tolist(), "it goes on from the fourth step"


def test_resuming_in_bfloat16_keeps_the_float32_copies(world: World, tmp_path: Path) -> None:
    params = world.params(dtype="bfloat16", max_minutes=1000)
    whole, resumed = world.build(params), world.build(params)
    unbroken = reranker.train(whole, world.examples, params, None)
    reranker.train(world.build(params), world.examples, params, tmp_path, stop_after=4)
    curve = reranker.train(resumed, world.examples, params, tmp_path)
    assert curve["loss"].tolist() == unbroken["loss"].tolist()
    for name, value in whole.trainable().items():
        assert torch.equal(resumed.trainable()[name], value), name
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["optimizer"]["state"]
    assert {value.dtype for state in saved.values() for value in state.values()} == {torch.float32}


def test_an_interrupted_training_cell_can_be_run_again(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = world.params(max_minutes=1000, micro_batch=1)
    unbroken = reranker.train(world.build(params), world.examples, params, None)
    for stop in (1, 9):  # in the first step between two passes, and after the first checkpoint
        model, calls = world.build(params), [0]

        def interrupt(scores: torch.Tensor, control: torch.Tensor, calls: list[int] = calls, stop: int = stop) -> torch.Tensor:
            calls[0] += 1
            if calls[0] == stop + 1:
                raise KeyboardInterrupt
            return reranker.ranknet(scores, control)

        folder = tmp_path / str(stop)
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules["corec.reranker.training"], "ranknet", interrupt)
            with pytest.raises(KeyboardInterrupt):
                reranker.train(model, world.examples, params, folder)
        assert any(value.grad is not None for value in model.trainable().values()), "stopped in the middle of a step"
        curve = reranker.train(model, world.examples, params, folder)
        assert curve["loss"].tolist() == unbroken["loss"].tolist()


def test_a_training_that_was_resumed_to_its_end_can_be_run_again(world: World, tmp_path: Path) -> None:
    params = world.params(max_minutes=1000)
    unbroken = reranker.train(world.build(params), world.examples, params, tmp_path)
    model = world.build(params)
    assert len(reranker.train(model, world.examples, params, tmp_path)) == len(unbroken), "nothing is left to train"
    (tmp_path / "checkpoint.pt").unlink()
    assert reranker.train(model, world.examples, params, tmp_path)["loss"].tolist() == unbroken["loss"].tolist()


def test_other_data_do_not_resume(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = world.params()
    reranker.train(world.build(params), world.examples, params, tmp_path, stop_after=4)
    history = {window: [*items[:-1], items[-1] % 50 + 1] for window, items in world.examples.history.items()}
    other = reranker.Examples(history, world.prepared)
    assert len(reranker.train(world.build(params), other, params, tmp_path, stop_after=1)) == 1
    assert "was made with other data or parameters" in capsys.readouterr().out


def test_a_backbones_folder_counts_from_the_projects(world: World, own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbones.save_whole(own_folder / "models" / "mine", *backbones.tiny_model())
    (own_folder / "elsewhere").mkdir()
    monkeypatch.chdir(own_folder / "elsewhere")
    assert backbones.load("models/mine")[0].config.hidden_size == 64
