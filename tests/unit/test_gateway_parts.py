"""The gateway's pure parts: buckets, weights, keys and configuration."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from posttrain.cli import app
from posttrain.errors import ConfigError, UserError
from serving.gateway.config import (
    GatewayConfig,
    LimitsConfig,
    ModelConfig,
    is_loopback,
    load_config,
)
from serving.gateway.errors import ApiError
from serving.gateway.keys import (
    ADMIN_VARIABLE,
    KEYS_VARIABLE,
    ApiKey,
    KeyRing,
    describe_new_key,
    hash_key,
    load_keys,
)
from serving.gateway.limits import Bucket, Limiter, headers
from serving.gateway.routes import Model, Router, Table, Version, sticky_point

EXPORT = {"export": "runs/export", "triton": "127.0.0.1:8001"}


class Clock:
    """Time that passes when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_bucket_fills_evenly_and_never_overflows(clock):
    bucket = Bucket(60, clock)
    bucket.take(60)
    assert bucket.wait_for(1) == pytest.approx(1.0)
    clock.now += 10
    assert bucket.level == pytest.approx(10)
    assert bucket.wait_for(25) == pytest.approx(15)
    clock.now += 1000
    assert bucket.level == 60
    bucket.take(-5)
    assert bucket.level == 60


def key(**limits: Any) -> ApiKey:
    return ApiKey(name="alice", sha256=hash_key("secret"), **limits)


def refused(work: Any, *arguments: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        work(*arguments)
    return caught.value


def test_requests_per_minute_come_back_one_by_one(clock):
    limiter, alice = Limiter(clock), key(requests_per_minute=6)
    for _ in range(6):
        limiter.admit(alice)
    error = refused(limiter.admit, alice)
    assert (error.status, error.headers["Retry-After"], error.reason) == (429, "10", "requests")
    clock.now += 10
    limiter.admit(alice)
    assert refused(limiter.admit, alice).status == 429


def test_a_refused_request_takes_no_place(clock):
    limiter, alice = Limiter(clock), key(requests_per_minute=1, max_concurrent=1)
    state = limiter.admit(alice)
    assert refused(limiter.admit, alice).reason == "concurrency"
    limiter.release(state)
    assert refused(limiter.admit, alice).reason == "requests"
    clock.now += 60
    limiter.admit(alice)


def test_tokens_that_were_not_used_are_given_back(clock):
    limiter, alice = Limiter(clock), key(tokens_per_minute=120)
    state = limiter.admit(alice)
    limiter.reserve(alice, state, 100)
    assert headers(alice, state) == {
        "x-ratelimit-limit-tokens": "120",
        "x-ratelimit-remaining-tokens": "20",
    }
    error = refused(limiter.reserve, alice, state, 50)
    assert (error.status, error.headers["Retry-After"]) == (429, "15")
    limiter.settle(state, 100, 30)
    limiter.reserve(alice, state, 50)
    assert refused(limiter.reserve, alice, state, 121).status == 400


def test_limits_are_each_keys_own(clock):
    limiter = Limiter(clock)
    limiter.admit(key(requests_per_minute=1))
    limiter.admit(ApiKey(name="bob", sha256=hash_key("other"), requests_per_minute=1))
    assert refused(limiter.admit, key(requests_per_minute=1)).status == 429


def model(weights: dict[str, float], **settings: Any) -> Model:
    config = ModelConfig.model_validate({"versions": dict.fromkeys(weights, EXPORT), **settings})
    versions: dict[str, Any] = {
        name: Version(name, config.versions[name], None, None, None)  # type: ignore[arg-type]
        for name in weights
    }
    return Model("support", config, versions, weights)


POINTS = [(i + 0.5) / 1000 for i in range(1000)]


def test_versions_are_as_wide_as_their_weights():
    split = model({"a": 3, "b": 0, "c": 1})
    assert Counter(split.pick(point).name for point in POINTS) == {"a": 750, "c": 250}
    assert split.pick(0.0).name == "c"
    assert split.pick(1 - 1e-16).name == "a"
    assert {model({"a": 0, "b": 1, "c": 0}).pick(point).name for point in POINTS} == {"b"}


def test_a_growing_canary_keeps_those_it_had():
    shares = [
        {p for p in POINTS if model({"stable": 100 - w, "canary": w}).pick(p).name == "canary"}
        for w in (1, 10, 50, 99)
    ]
    assert all(smaller < larger for smaller, larger in zip(shares, shares[1:], strict=False))


def test_sticky_points_are_fixed_and_even():
    by_user = model({"a": 1, "b": 1}, sticky="user")
    points = {user: sticky_point(by_user, key(), user) for user in map(str, range(2000))}
    assert points == {user: sticky_point(by_user, key(), user) for user in points}
    low = sum(point < 0.5 for point in points.values() if point is not None)
    assert 900 < low < 1100
    by_key = model({"a": 1, "b": 1}, sticky="key")
    assert sticky_point(by_key, key(), "x") == sticky_point(by_key, key(), "y") is not None
    assert sticky_point(model({"a": 1}), key(), "x") is None
    assert sticky_point(by_user, key(), None) is not None


def test_a_shadow_gets_its_share_and_never_its_own_answers():
    draws = iter([0.2, 0.3, 0.1])
    router = Router(LimitsConfig(), ThreadPoolExecutor(1), lambda: next(draws))
    shadowed = model({"a": 1, "b": 0}, shadow={"version": "b", "fraction": 0.25})
    answers = [router.shadow(shadowed, shadowed.versions["a"]) for _ in range(3)]
    assert [answer and answer.name for answer in answers] == ["b", None, "b"]
    assert router.shadow(shadowed, shadowed.versions["b"]) is None
    assert router.shadow(model({"a": 1}), shadowed.versions["a"]) is None


def test_a_key_finds_only_its_models_and_their_versions():
    table = Table({"support": model({"a": 1})})
    assert table.find("support", key())[1] is None
    assert table.find("support@a", key(models=["support"]))[1] == "a"
    for name, who in (
        ("support", key(models=["other"])),
        ("support@b", key()),
        ("support@", key()),
        ("x", key()),
    ):
        assert refused(table.find, name, who).status == 404


def config(**fields: Any) -> GatewayConfig:
    models = {"support": {"versions": {"v1": EXPORT}}}
    return GatewayConfig.model_validate({"models": models, **fields})


def test_only_the_right_key_is_found():
    ring = load_keys(config(), {KEYS_VARIABLE: f"a:{hash_key('one')}, b:{hash_key('two')}"})
    assert [ring.find(text).name for text in ("one", "two")] == ["a", "b"]  # type: ignore[union-attr]
    for text in ("", "on", "one ", "oneone", hash_key("one"), "\udcff"):
        assert ring.find(text) is None
    assert not ring.is_admin("one")
    assert not ring.is_admin("")
    admin = load_keys(config(authentication="none"), {ADMIN_VARIABLE: hash_key("root")})
    assert admin.is_admin("root")
    assert not admin.is_admin("one")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "there are no API keys"),
        ({KEYS_VARIABLE: "alice:the-key-itself"}, "is not a SHA-256"),
        ({KEYS_VARIABLE: f"a b:{hash_key('x')}"}, "the name of a key"),
        ({KEYS_VARIABLE: f"a:{hash_key('x')},b:{hash_key('x')}"}, "two API keys have the sha256"),
        ({KEYS_VARIABLE: f"a:{hash_key('x')},a:{hash_key('y')}"}, "two API keys have the name 'a'"),
        ({KEYS_VARIABLE: f"a:{hash_key('x')}", ADMIN_VARIABLE: "root"}, "is not a SHA-256"),
        ({KEYS_VARIABLE: f"a:{hash_key('')}"}, "the hash of key 'a' is that of an empty text"),
        ({KEYS_VARIABLE: f"a:{hash_key('x')}", ADMIN_VARIABLE: hash_key("")}, "the hash of the admin key is"),
    ],
)
def test_keys_that_cannot_be_used(environment, message):
    with pytest.raises(UserError, match=message) as caught:
        load_keys(config(), environment)
    assert "the-key-itself" not in str(caught.value)


def test_no_key_is_nobodys_key_even_where_its_hash_is_listed():
    ring = KeyRing([ApiKey(name="a", sha256=hash_key(""))], hash_key(""))
    assert ring.find("") is None
    assert not ring.is_admin("")


def test_a_keys_file_is_checked_line_by_line(tmp_path):
    path = tmp_path / "keys.yaml"
    path.write_text(f"keys:\n  - name: a\n    sha256: {hash_key('x')}\n    request_per_minute: 5\n")
    with pytest.raises(ConfigError, match="keys.yaml:4: .*unknown key(.|\n)*'requests_per_minute'"):
        load_keys(config(keys_file=str(path)), {})
    path.write_text(f"keys:\n  - {{name: a, sha256: {hash_key('x')}, models: [nope]}}\n")
    with pytest.raises(UserError, match="models that are not served: nope"):
        load_keys(config(keys_file=str(path)), {})


def test_a_new_key_fits_the_line_that_is_printed_for_it(tmp_path):
    made, line = describe_new_key("alice")
    path = tmp_path / "keys.yaml"
    path.write_text(f"keys:\n{line}\n")
    found = load_keys(config(keys_file=str(path)), {}).find(made)
    assert found is not None
    assert found.name == "alice"
    assert made != describe_new_key("alice")[0]
    done = CliRunner().invoke(app, ["gateway-key", "bob"])
    assert done.exit_code == 0
    assert hash_key(done.stdout.strip()) in done.stderr
    assert CliRunner().invoke(app, ["gateway-key", "not a name"]).exit_code == 2


def write(path: Any, **fields: Any) -> Any:
    content = {"models": {"support": {"versions": {"v1": EXPORT}}}, **fields}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_a_file_and_what_replaces_it(tmp_path):
    path = write(tmp_path / "g.yaml", port=9000)
    loaded = load_config(path, ["port=9001", "models.support.versions.v1.weight=2.5"])
    assert loaded.port == 9001
    assert loaded.models["support"].versions["v1"].weight == 2.5
    only = [f"models.m.versions.v.{name}={value}" for name, value in EXPORT.items()]
    assert load_config(None, only).models["m"].versions["v"].triton == "127.0.0.1:8001"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prot": 1}, r"g\.yaml:\d+: prot: unknown key 'prot'\n    did you mean 'port'"),
        ({"models": {}}, "models: dictionary should have at least 1 item"),
        ({"models": {"a/b": {"versions": {"v1": EXPORT}}}}, "models"),
        ({"models": {"m": {"versions": {"v@1": EXPORT}}}}, r"models\.m\.versions"),
        ({"models": {"m": {"versions": {"v": EXPORT | {"weight": 0}}}}}, "no version has a weight above 0"),
        ({"models": {"m": {"versions": {"v": EXPORT | {"weight": "1"}}}}}, "weight: must be a valid number"),
        ({"models": {"m": {"versions": {"v": EXPORT | {"triton": "http://x:1"}}}}}, "triton"),
        (
            {"models": {"m": {"versions": {"v": EXPORT}, "shadow": {"version": "w"}}}},
            "there is no version 'w'\n    versions: v",
        ),
        ({"host": "0.0.0.0", "authentication": "none"}, "without keys everyone who reaches 0.0.0.0"),
        ({"limits": {"request_seconds": 0}}, "must be greater than 0"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path, fields, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path / "g.yaml", **fields))


def test_what_is_a_loopback_address():
    assert all(is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "127.1.2.3"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", ""))
