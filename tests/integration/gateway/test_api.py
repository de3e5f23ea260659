"""The official openai client against the gateway, Triton and a real model."""

from __future__ import annotations

import json

import openai
import pytest

from posttrain.models import load_causal_lm, load_tokenizer
from serving.client import TritonClient
from serving.parity import reference_answer, render

QUESTIONS = [f"Where is my order K{i}?" for i in range(6)]
SYSTEM = {"role": "system", "content": "You are the support desk of a small shop."}
ASKED = [{"role": "user", "content": QUESTIONS[0]}]
SAMPLED = {"model": "support", "messages": ASKED, "max_tokens": 40, "temperature": 1.0, "seed": 7}


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_greedy_answer_is_that_of_the_trained_model(client, ending_model_dir, question):
    """Through the gateway, its template and its stream: the text, the length and the end of generate()."""
    model, tokenizer = load_causal_lm(ending_model_dir), load_tokenizer(ending_model_dir)
    messages = [SYSTEM, {"role": "user", "content": question}]
    expected = reference_answer(model, tokenizer, messages, 24)
    answer = client.chat.completions.create(model="support", messages=messages, temperature=0, max_tokens=24)
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content == expected.text
    assert choice.finish_reason == ("stop" if expected.ids[-1] == tokenizer.eos_token_id else "length")
    assert answer.usage.prompt_tokens == len(expected.prompt_ids)
    assert answer.usage.completion_tokens == len(expected.ids)
    assert answer.usage.total_tokens == len(expected.prompt_ids) + len(expected.ids)


def test_some_greedy_answer_ends_by_itself(client):
    reasons = set()
    for question in QUESTIONS:
        asked = [SYSTEM, {"role": "user", "content": question}]
        answer = client.chat.completions.create(
            model="support", messages=asked, temperature=0, max_completion_tokens=150
        )
        reasons.add(answer.choices[0].finish_reason)
    assert "stop" in reasons


@pytest.mark.parametrize("usage", [True, False])
def test_a_streamed_answer_is_the_same_as_a_whole_one(client, usage):
    whole = client.chat.completions.create(**SAMPLED)
    options = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = list(client.chat.completions.create(**SAMPLED, stream=True, **options))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in deltas) == whole.choices[0].message.content
    assert [choice.finish_reason for choice in deltas if choice.finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert len(deltas) > 3, "it came in one piece"
    told = [chunk.usage for chunk in chunks if chunk.usage]
    assert told == ([whole.usage] if usage else [])
    assert bool(chunks[-1].choices) is not usage


def test_a_text_completion_is_what_triton_answers_to_the_text(client, triton, ending_model_dir):
    prompt = render(load_tokenizer(ending_model_dir), ASKED)
    direct = TritonClient(triton.http_url, triton.grpc_url, "desk")
    expected = direct.generate([prompt], {"temperature": 0, "max_tokens": 20, "logprobs": 0})[0]
    fields = {"model": "support", "prompt": prompt, "temperature": 0, "max_tokens": 20, "logprobs": 2}
    answer = client.completions.create(**fields)
    choice = answer.choices[0]
    assert choice.text == expected.text
    assert choice.logprobs.token_logprobs == pytest.approx(expected.logprobs, abs=1e-6)
    assert all(len(position) == 2 for position in choice.logprobs.top_logprobs)
    assert answer.usage.completion_tokens == len(expected.token_ids)
    pieces = list(client.completions.create(**fields, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == expected.text
    offsets = [offset for piece in pieces for offset in piece.choices[0].logprobs.text_offset]
    assert offsets == choice.logprobs.text_offset == sorted(offsets)


def test_a_text_completion_has_sixteen_tokens_by_default(client):
    answer = client.completions.create(model="long", prompt="Hello", temperature=0)
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


def test_a_chat_answer_may_take_all_the_room_there_is(client):
    answer = client.chat.completions.create(model="long", messages=ASKED, temperature=0)
    assert answer.usage.completion_tokens == 200
    padded = [{"role": "user", "content": "a b c d " * 20}]
    answer = client.chat.completions.create(model="long", messages=padded, temperature=0)
    assert answer.usage.total_tokens == 256


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_before_it(client, stream):
    free = client.chat.completions.create(**SAMPLED).choices[0].message.content
    stop = free[len(free) // 2 :][:3]
    expected = free[: free.index(stop)]
    for given in (stop, ["never said", stop]):
        answer = client.chat.completions.create(**SAMPLED, stop=given, stream=stream)
        choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        text = "".join((c.delta.content if stream else c.message.content) or "" for c in choices)
        assert text == expected
        assert choices[-1].finish_reason == "stop"


def test_n_answers_are_those_of_n_requests_with_the_next_seeds(client):
    create = client.chat.completions.create
    whole = create(**SAMPLED, n=3)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    singles = [create(**SAMPLED | {"seed": 7 + index}) for index in range(3)]
    assert [choice.message for choice in whole.choices] == [one.choices[0].message for one in singles]
    assert [choice.finish_reason for choice in whole.choices] == [
        one.choices[0].finish_reason for one in singles
    ]
    assert len({choice.message.content for choice in whole.choices}) == 3
    assert whole.usage.prompt_tokens == singles[0].usage.prompt_tokens
    assert whole.usage.completion_tokens == sum(one.usage.completion_tokens for one in singles)


def test_n_streamed_answers_are_interleaved_and_the_same(client):
    whole = client.chat.completions.create(**SAMPLED, n=3)
    chunks = list(
        client.chat.completions.create(**SAMPLED, n=3, stream=True, stream_options={"include_usage": True})
    )
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert [choice.index for choice in choices if choice.delta.role] == [0, 1, 2]
    for expected in whole.choices:
        own = [choice for choice in choices if choice.index == expected.index]
        assert "".join(choice.delta.content or "" for choice in own) == expected.message.content
        assert [choice.finish_reason for choice in own if choice.finish_reason] == [expected.finish_reason]
    first_end = next(i for i, choice in enumerate(choices) if choice.finish_reason)
    assert {choice.index for choice in choices[3:first_end]} == {0, 1, 2}, "one answer after the other"
    assert [chunk.usage for chunk in chunks if chunk.usage] == [whole.usage]


def test_n_texts_have_log_probabilities_and_offsets_of_their_own(client):
    fields = {"model": "long", "prompt": "Hello", "max_tokens": 8, "seed": 3, "logprobs": 1}
    whole = client.completions.create(**fields, n=2)
    singles = [client.completions.create(**fields | {"seed": 3 + index}).choices[0] for index in range(2)]
    for choice, single in zip(whole.choices, singles, strict=True):
        assert (choice.text, choice.logprobs.tokens) == (single.text, single.logprobs.tokens)
        assert choice.logprobs.text_offset == single.logprobs.text_offset
        # Computed side by side, they may differ in the last bits.
        assert choice.logprobs.token_logprobs == pytest.approx(single.logprobs.token_logprobs, abs=1e-5)
    streamed = [chunk.choices[0] for chunk in client.completions.create(**fields, n=2, stream=True)]
    for choice in whole.choices:
        offsets = [o for c in streamed if c.index == choice.index for o in c.logprobs.text_offset]
        assert offsets == choice.logprobs.text_offset


def test_n_answers_without_a_seed_differ(client):
    fields = SAMPLED | {"n": 4}
    del fields["seed"]
    answer = client.chat.completions.create(**fields)
    assert len({choice.message.content for choice in answer.choices}) == 4


@pytest.mark.parametrize("stream", [False, True])
def test_n_answers_of_a_model_that_is_not_there_are_one_error(client, stream):
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="down", messages=ASKED, n=3, stream=stream)
    assert caught.value.code == "model_unavailable"


def test_a_seed_is_repeatable_and_seeds_differ(client):
    texts = [
        client.chat.completions.create(**SAMPLED | {"seed": seed}).choices[0].message.content
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_top_k_of_one_is_greedy(client):
    greedy = client.chat.completions.create(**SAMPLED | {"temperature": 0})
    drawn = client.chat.completions.create(**SAMPLED, extra_body={"top_k": 1})
    assert drawn.choices[0].message.content == greedy.choices[0].message.content


def test_log_probabilities_name_the_drawn_token_and_the_likeliest(client):
    fields = SAMPLED | {"temperature": 0, "logprobs": True, "top_logprobs": 3, "max_tokens": 12}
    whole = client.chat.completions.create(**fields).choices[0].logprobs.content
    assert len(whole) == client.chat.completions.create(**fields).usage.completion_tokens
    for position in whole:
        values = [candidate.logprob for candidate in position.top_logprobs]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert position.logprob == values[0]
        assert position.bytes is None or bytes(position.bytes).decode() == position.token
    chunks = client.chat.completions.create(**fields, stream=True)
    streamed = [
        entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content
    ]
    assert streamed == whole
    bare = client.chat.completions.create(**fields | {"top_logprobs": 0}).choices[0].logprobs.content
    assert [(entry.token, entry.top_logprobs) for entry in bare] == [(entry.token, []) for entry in whole]


def test_parts_and_the_developer_role_are_rendered_as_text_and_system(client):
    plain = [SYSTEM, {"role": "user", "content": "Hello\nthere"}]
    fancy = [
        {"role": "developer", "content": SYSTEM["content"]},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}]},
    ]
    answers = [
        client.chat.completions.create(**SAMPLED | {"messages": messages}) for messages in (plain, fancy)
    ]
    assert answers[0].choices[0].message == answers[1].choices[0].message
    assert answers[0].usage == answers[1].usage


def test_what_says_nothing_is_taken(client):
    answer = client.chat.completions.create(
        **SAMPLED,
        n=1,
        tools=[],
        metadata={"a": "b"},
        store=False,
        response_format={"type": "text"},
        presence_penalty=0,
        top_p=None,
        service_tier="auto",
        user="u1",
    )
    assert answer.choices[0].message.content == (
        client.chat.completions.create(**SAMPLED).choices[0].message.content
    )


def test_models_are_listed_with_their_versions_to_those_who_may_use_them(gateway, client):
    names = {model.id for model in client.models.list()}
    assert {"support", "support@stable", "long", "long@only"} <= names
    assert {model.id for model in gateway.client("dora").models.list()} == {"long", "long@only"}
    assert client.models.retrieve("support@stable").id == "support@stable"
    for name in ("nope", "support@nope", "@", "support@"):
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(name)


@pytest.mark.parametrize(
    ("model", "error", "code"),
    [
        ("absent", openai.InternalServerError, "model_unavailable"),
        ("down", openai.InternalServerError, "model_unavailable"),
        ("nope", openai.NotFoundError, "model_not_found"),
        ("adapted", openai.BadRequestError, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_cannot_answer_is_an_error_status(client, model, error, code, stream):
    with pytest.raises(error) as caught:
        client.chat.completions.create(model=model, messages=ASKED, stream=stream)
    assert caught.value.code == code
    if code == "model_unavailable":
        assert caught.value.status_code == 503
        assert int(caught.value.response.headers["retry-after"]) >= 1


def test_a_key_may_use_only_its_models(gateway):
    with pytest.raises(openai.NotFoundError, match="does not exist or you may not use it"):
        gateway.client("dora").chat.completions.create(model="support", messages=ASKED)


def test_requests_per_minute(gateway):
    bob = gateway.client("bob")
    left = []
    for _ in range(3):
        answer = bob.chat.completions.with_raw_response.create(model="support", messages=ASKED, max_tokens=2)
        left.append(answer.headers["x-ratelimit-remaining-requests"])
    assert left == ["2", "1", "0"]
    with pytest.raises(openai.RateLimitError, match="3 requests per minute") as caught:
        bob.chat.completions.create(model="support", messages=ASKED, max_tokens=2)
    assert caught.value.code == "rate_limit_exceeded"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 20
    assert gateway.metric("posttrain_gateway_limited_total", key="bob", reason="requests") == 1


def test_tokens_per_minute_count_what_was_used_and_not_what_was_asked_for(gateway):
    carol = gateway.client("carol")

    def ask(max_tokens):
        return carol.chat.completions.with_raw_response.create(
            model="support", messages=ASKED, temperature=0, max_tokens=max_tokens, stop="\t"
        )

    with pytest.raises(openai.BadRequestError, match="has 100 per minute"):
        carol.chat.completions.create(model="support", messages=ASKED, max_tokens=30, n=3)
    with pytest.raises(openai.BadRequestError, match="has 100 per minute") as caught:
        ask(150)
    assert caught.value.code == "request_too_large"
    used = json.loads(ask(60).content)["usage"]["total_tokens"]
    spent = gateway.metric("posttrain_gateway_key_tokens_total", key="carol")
    assert spent == used
    left = 100 - used
    while left >= 30:
        left -= json.loads(ask(10).content)["usage"]["total_tokens"]
    with pytest.raises(openai.RateLimitError, match="100 tokens per minute") as caught:
        ask(80)
    assert int(caught.value.response.headers["retry-after"]) >= 1
    assert caught.value.response.headers["content-type"] == "application/json"


def test_requests_at_a_time(gateway):
    dora = gateway.client("dora")
    fields = {"model": "long", "messages": ASKED, "temperature": 0}
    first = dora.chat.completions.create(**fields, stream=True)
    next(iter(first))
    with pytest.raises(openai.RateLimitError, match="at most 1 requests at a time"):
        dora.chat.completions.create(**fields)
    assert len(list(first)) > 1
    assert dora.chat.completions.create(**fields, max_tokens=2).usage.completion_tokens == 2


def test_a_request_leaves_numbers_and_no_text(gateway, client):
    secret = "Maria Lopez, card no. 4929-1111"
    asked = client.chat.completions.with_raw_response.create(
        model="support",
        messages=[{"role": "user", "content": secret}],
        max_tokens=3,
        user="someone@example.org",
        extra_headers={"X-Request-Id": "mine-1"},
    )
    assert asked.headers["x-request-id"] == "mine-1"
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(
            model="support", messages=[{"role": "user", "content": secret, "name": secret}]
        )
    line = next(
        found for found in iter(lambda: gateway.wait_for("request"), None) if found["request_id"] == "mine-1"
    )
    usage = json.loads(asked.content)["usage"]
    assert {name: line[name] for name in usage} == usage
    assert (line["key"], line["model"], line["version"], line["status"]) == (
        "alice",
        "support",
        "stable",
        200,
    )
    written = "".join(gateway.lines)
    for text in ("Maria", "no. 4929", "someone", "pt-alice"):
        assert text not in written


def test_metrics_count_requests_and_tokens(gateway, client):
    def counts():
        return (
            gateway.metric("posttrain_gateway_requests_total", model="support", status="200"),
            gateway.metric("posttrain_gateway_tokens_total", model="support", kind="completion"),
        )

    before = counts()
    client.chat.completions.create(model="support@stable", messages=ASKED, max_tokens=5, temperature=0)
    after = counts()
    assert after[0] == before[0] + 1
    assert before[1] < after[1] <= before[1] + 5


def test_health_says_which_version_cannot_be_asked(gateway, client):
    base = client.with_options(base_url=f"http://127.0.0.1:{gateway.port}")
    assert base.get("/health/live", cast_to=object) == {"status": "live"}
    with pytest.raises(openai.InternalServerError) as caught:
        base.get("/health/ready", cast_to=object)
    states = caught.value.response.json()["versions"]
    assert states["support@stable"]
    assert states["long@only"]
    assert not states["absent@only"]
    assert not states["down@only"]
