"""The stand-in's engine on the two-layer model: equal to generate(), fair, bounded, honest in failure."""

from __future__ import annotations

import threading

import pytest
import torch

from posttrain.models import load_causal_lm, load_tokenizer
from serving.backends.vllm.adapters import Adapters
from serving.backends.vllm.batching import PagedBatch
from serving.backends.vllm.engine import Engine, Limits
from serving.backends.vllm.sampling import RequestError, SamplingParams
from tests.conftest import random_adapter

PROMPT = "<|im_start|>user\nWhere is my order?<|im_end|>\n<|im_start|>assistant\n"
TIMEOUT = 60


class Collector:
    """A sink that keeps everything and can be waited for."""

    def __init__(self, gone_after: int | None = None):
        self.updates, self.error, self.unavailable = [], None, None
        self.gone_after = gone_after
        self.ended = threading.Event()

    def update(self, update):
        self.updates.append(update)
        if update.finish_reason is not None:
            self.ended.set()

    def fail(self, message, unavailable):
        self.error, self.unavailable = message, unavailable
        self.ended.set()

    def cancelled(self):
        gone = self.gone_after is not None and len(self.updates) >= self.gone_after
        if gone:
            self.ended.set()
        return gone

    def wait(self):
        assert self.ended.wait(TIMEOUT)
        return self

    @property
    def ids(self):
        return [update.token_id for update in self.updates]

    @property
    def text(self):
        return "".join(update.text for update in self.updates)


@pytest.fixture(scope="module")
def loaded(tiny_model_dir):
    return load_causal_lm(tiny_model_dir), load_tokenizer(tiny_model_dir)


@pytest.fixture(scope="module")
def engine(loaded):
    made = Engine(*loaded, Limits(max_model_len=128, max_prompt_characters=400, max_active=3))
    yield made
    made.close()


def _ask(engine, prompt=PROMPT, **params):
    sink = Collector()
    engine.submit(prompt, SamplingParams(**({"temperature": 0.0, "max_tokens": 12} | params)), sink)
    return sink


def _refusal(engine):
    """Why a request is not answered, said at once or to its sink, and whether it may be sent again."""
    try:
        sink = _ask(engine).wait()
    except RequestError as error:
        return str(error), error.unavailable
    return sink.error, sink.unavailable


def _generate(loaded, prompt, count):
    model, tokenizer = loaded
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None
    )
    return output[0, ids.shape[1] :].tolist()


def test_greedy_answers_equal_generate_whoever_else_is_served(engine, loaded):
    prompts = [f"{PROMPT}{number}" for number in range(7)]
    sinks = [
        _ask(engine, prompt, max_tokens=4 + 3 * at, ignore_eos=True) for at, prompt in enumerate(prompts)
    ]
    for at, (prompt, sink) in enumerate(zip(prompts, sinks, strict=True)):
        assert sink.wait().ids == _generate(loaded, prompt, 4 + 3 * at)
        assert sink.updates[-1].finish_reason == "length"
        assert sink.updates[-1].num_input_tokens == len(loaded[1](prompt)["input_ids"])


def test_a_short_request_is_not_kept_behind_a_long_one(engine):
    long, short = _ask(engine, max_tokens=100, ignore_eos=True), _ask(engine, max_tokens=1)
    short.wait()
    assert len(long.updates) < 100
    assert len(long.wait().updates) == 100


def test_logprobs_are_the_model_s_own(engine, loaded):
    model, tokenizer = loaded
    sink = _ask(engine, max_tokens=5, logprobs=2, temperature=0.7, seed=3).wait()
    prompt_ids = tokenizer(PROMPT)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + sink.ids])).logits[0, len(prompt_ids) - 1 : -1]
    expected = torch.log_softmax(logits, dim=-1)
    for row, update in zip(expected, sink.updates, strict=True):
        first = update.logprobs[0]
        assert first.token_id == update.token_id
        assert first.logprob == pytest.approx(float(row[update.token_id]), abs=1e-4)
        assert first.rank == int((row > row[update.token_id]).sum()) + 1
        top = {c.token_id for c in update.logprobs if c.rank <= 2}
        assert top == set(row.topk(2).indices.tolist())


def test_the_seed_of_a_request_decides_its_answer(engine):
    same = [_ask(engine, temperature=1.0, seed=5, max_tokens=20).wait().ids for _ in range(2)]
    other = _ask(engine, temperature=1.0, seed=6, max_tokens=20).wait().ids
    assert same[0] == same[1] != other


def test_it_stops_at_token_ids(engine, loaded):
    ids = _generate(loaded, PROMPT, 12)
    sink = _ask(engine, stop_token_ids=(ids[4],)).wait()
    assert sink.ids == ids[: ids.index(ids[4]) + 1]
    assert sink.updates[-1].finish_reason == "stop"


def test_a_stop_string_ends_the_answer_and_never_shows(engine):
    whole = _ask(engine, max_tokens=40, ignore_eos=True).wait().text
    stop = whole[10:13]
    sink = _ask(engine, max_tokens=40, ignore_eos=True, stop=(stop,)).wait()
    assert sink.text == whole[: whole.index(stop)]
    assert sink.updates[-1].finish_reason == "stop"


def test_streamed_pieces_make_the_whole_text_without_half_characters(loaded, monkeypatch):
    """A model made to say a text of multi-byte characters, one byte-level token at a time."""
    model, tokenizer = loaded
    answer = "é 日本 🙂 ok"
    wanted = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
    said = iter(wanted)
    monkeypatch.setattr("serving.backends.vllm.engine.draw", lambda *_: [next(said)])
    engine = Engine(model, tokenizer, Limits(max_model_len=128))
    sink = _ask(engine, max_tokens=64).wait()
    engine.close()
    assert sink.ids == wanted
    assert sink.text == answer
    assert not any("\ufffd" in update.text for update in sink.updates)


def test_an_answer_ends_where_the_context_does(engine, loaded):
    prompt = "x " * 50
    room = 128 - len(loaded[1](prompt)["input_ids"])
    sink = _ask(engine, prompt, max_tokens=1000, ignore_eos=True).wait()
    assert len(sink.updates) == room
    assert sink.updates[-1].finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("", "empty"), ("x" * 401, "401 characters, at most 400"), ("é" * 128, "no room for an answer")],
)
def test_bad_prompts_are_refused_and_good_ones_served_after(engine, prompt, message):
    with pytest.raises(RequestError, match=message):
        _ask(engine, prompt)
    assert len(_ask(engine, ignore_eos=True).wait().ids) == 12


def test_a_gone_client_is_dropped(engine):
    sink = Collector(gone_after=8)
    engine.submit(PROMPT, SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True), sink)
    sink.wait()
    assert len(_ask(engine, ignore_eos=True).wait().ids) == 12
    assert len(sink.updates) == 8


def test_a_client_that_goes_while_its_prompt_is_read_is_dropped(loaded, monkeypatch):
    """Of a prompt of eight pieces no more than the first are computed."""
    monkeypatch.setattr("serving.backends.vllm.batching.MAX_BATCH_TOKENS", 16)
    engine = Engine(*loaded, Limits(max_model_len=128, max_active=4))
    passes = []
    hook = loaded[0].register_forward_pre_hook(lambda *_: passes.append(1))
    sink = Collector()
    sink.cancelled = lambda: len(passes) >= 2
    engine.submit("é" * 62, SamplingParams(), sink)
    engine.close()
    hook.remove()
    assert sink.updates == []
    assert len(passes) == 2


def test_a_full_queue_is_said_so(loaded):
    engine = Engine(*loaded, Limits(max_model_len=128, max_queue=0))
    with pytest.raises(RequestError, match="queue is full") as caught:
        _ask(engine)
    engine.close()
    assert caught.value.unavailable


def test_a_failed_request_fails_alone(engine, loaded):
    """Of two requests in one batch, the output of one stops being finite."""
    model, tokenizer = loaded
    bad_token = tokenizer("~")["input_ids"][-1]

    def spoil(module, inputs, output):
        for position in (inputs[0] == bad_token).nonzero().tolist():
            output[tuple(position)] = float("nan")

    hook = model.get_input_embeddings().register_forward_hook(spoil)
    good, bad = _ask(engine, ignore_eos=True, max_tokens=30), _ask(engine, PROMPT + "~")
    bad.wait()
    good.wait()
    hook.remove()
    assert "generation failed" in bad.error
    assert not bad.unavailable
    assert good.ids == _generate(loaded, PROMPT, 30)


class _BrokenSink(Collector):
    def update(self, update):
        super().update(update)
        raise ConnectionError("gone")


def test_a_broken_sink_costs_its_own_request_only(engine, loaded):
    broken = _BrokenSink()
    engine.submit(PROMPT, SamplingParams(temperature=0.0, ignore_eos=True), broken)
    assert _ask(engine, ignore_eos=True).wait().ids == _generate(loaded, PROMPT, 12)
    assert len(broken.updates) == 1


def _failing(model, times):
    """Make the model's forward pass raise for so many times; returns the hook."""
    calls = iter(range(times))

    def fail(module, inputs):
        for number in calls:
            raise RuntimeError(f"boom {number}")

    return model.model.layers[1].register_forward_pre_hook(fail)


def test_a_failure_of_the_loop_fails_live_requests_and_the_next_is_answered(engine, loaded):
    engine_thread = engine._thread
    live = [_ask(engine, ignore_eos=True, max_tokens=100) for _ in range(2)]
    while not all(sink.updates for sink in live):
        live[0].ended.wait(0.001)
    hook = _failing(loaded[0], 1)
    for sink in live:
        assert "the engine failed (RuntimeError: boom 0)" in sink.wait().error
        assert sink.unavailable
    hook.remove()
    assert _ask(engine, ignore_eos=True).wait().ids == _generate(loaded, PROMPT, 12)
    assert engine._thread is engine_thread
    assert engine_thread.is_alive()


def test_an_engine_that_only_fails_stops_and_nobody_hangs(loaded):
    engine = Engine(*loaded, Limits(max_model_len=128, max_active=1))
    hook = _failing(loaded[0], 1000)
    waiting = [_ask(engine) for _ in range(2)]
    refusals = [(sink.wait().error, sink.unavailable) for sink in waiting]
    refusals += [_refusal(engine) for _ in range(3)]
    engine.close()
    hook.remove()
    assert all(unavailable for _, unavailable in refusals)
    assert "the engine failed (RuntimeError: boom 0)" in refusals[0][0]
    stopped = "the engine has stopped after 3 failures in a row, the last one: RuntimeError: boom 2"
    assert stopped in refusals[4][0]
    with pytest.raises(RequestError, match="engine has stopped") as caught:
        engine.submit("", SamplingParams())
    assert caught.value.unavailable, "a probe, which asks for nothing, must see it too"


def test_closing_finishes_what_is_being_served(loaded):
    engine = Engine(*loaded, Limits(max_model_len=128, max_active=2))
    sinks = [_ask(engine, ignore_eos=True, max_tokens=20) for _ in range(5)]
    engine.close()
    assert [len(sink.ids) for sink in sinks] == [20] * 5
    reason, unavailable = _refusal(engine)
    assert "engine has stopped" in reason
    assert unavailable


def test_several_answers_of_one_request_have_seeds_of_their_own(engine):
    params = SamplingParams(seed=7, max_tokens=15, ignore_eos=True)
    sinks = [Collector() for _ in range(3)]
    engine.submit(PROMPT, params, *sinks)
    alone = [_ask(engine, temperature=1.0, seed=7 + i, max_tokens=15, ignore_eos=True) for i in range(3)]
    assert [sink.wait().ids for sink in sinks] == [sink.wait().ids for sink in alone]
    assert len({tuple(sink.ids) for sink in sinks}) == 3


def test_answers_do_not_depend_on_room_or_on_how_prompts_are_cut(loaded, monkeypatch):
    """A cache with room for one longest request, and prompts read in pieces of a few tokens."""
    monkeypatch.setattr("serving.backends.vllm.batching.CACHE_BYTES", 1)
    monkeypatch.setattr("serving.backends.vllm.batching.MAX_BATCH_TOKENS", 8)
    engine = Engine(*loaded, Limits(max_model_len=128, max_active=4))
    assert isinstance(engine._batch, PagedBatch), "in turns there is neither a cache nor pieces"
    prompts = [PROMPT + "x " * count for count in range(0, 16, 2)]
    sinks = [_ask(engine, prompt, ignore_eos=True, max_tokens=20) for prompt in prompts]
    for prompt, sink in zip(prompts, sinks, strict=True):
        assert sink.wait().ids == _generate(loaded, prompt, 20)
    engine.close()


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, tiny_model_dir):
    """A model with adapters, and what each of them and the plain model generate: {name: ids}.

    One adapter changes the output layer, which sees fewer tokens than the layers before it.
    """
    root = tmp_path_factory.mktemp("adapters")
    tokenizer = load_tokenizer(tiny_model_dir)
    paths = {
        "a": random_adapter(root / "a", tiny_model_dir, seed=0),
        "keys": random_adapter(root / "keys", tiny_model_dir, seed=1),
        "head": random_adapter(root / "head", tiny_model_dir, seed=2, target_modules=["q_proj", "lm_head"]),
    }
    expected = {None: _generate((load_causal_lm(tiny_model_dir), tokenizer), PROMPT, 10)}
    for name, path in paths.items():
        expected[name] = _generate((load_causal_lm(path), tokenizer), PROMPT, 10)
    model = load_causal_lm(tiny_model_dir)
    return model, tokenizer, Adapters(model, paths), expected


def test_requests_of_different_adapters_do_not_mix(adapted):
    model, tokenizer, adapters, expected = adapted
    assert len({tuple(ids) for ids in expected.values()}) == 4
    engine = Engine(model, tokenizer, Limits(max_model_len=128, max_active=9), adapters)
    names = ["a", None, "keys", "head", "keys", None, "a", "head", "a"]
    sinks = [_ask(engine, max_tokens=10, ignore_eos=True, lora_name=name) for name in names]
    assert [sink.wait().ids for sink in sinks] == [expected[name] for name in names]
    with pytest.raises(RequestError, match="lora_name 'b' is not served; adapters are a, keys, head"):
        _ask(engine, lora_name="b")
    engine.close()


def test_adapters_keep_to_their_requests_while_prompts_are_read_in_pieces(adapted, monkeypatch):
    """Pieces of the prompts of some requests are computed beside the tokens of others."""
    monkeypatch.setattr("serving.backends.vllm.batching.MAX_BATCH_TOKENS", 8)
    model, tokenizer, adapters, expected = adapted
    engine = Engine(model, tokenizer, Limits(max_model_len=128, max_active=5), adapters)
    names = [*expected, *reversed(expected)]
    sinks = [_ask(engine, max_tokens=10, ignore_eos=True, lora_name=name) for name in names]
    assert [sink.wait().ids for sink in sinks] == [expected[name] for name in names]
    engine.close()


def test_an_adapter_of_the_embeddings_is_refused(tmp_path, tiny_model_dir):
    path = random_adapter(tmp_path / "a", tiny_model_dir, seed=0, target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(ValueError, match="embed_tokens.*export the adapter merged"):
        Adapters(load_causal_lm(tiny_model_dir), {"a": path})


def test_an_adapter_is_unknown_where_there_are_none(engine):
    with pytest.raises(RequestError, match="lora_name 'a' is not served; no adapters are served"):
        _ask(engine, lora_name="a")
