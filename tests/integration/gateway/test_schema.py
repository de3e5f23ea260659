"""schemathesis on the gateway's OpenAPI schema, in front of a real Triton: no answer is a 5xx."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error

pytestmark = pytest.mark.slow
EXAMPLES = 60
KEY = {"Authorization": "Bearer pt-alice"}


@pytest.fixture(scope="module")
def api_schema(start_gateway: Callable[[dict[str, Any]], Any], settings: dict[str, Any]) -> Any:
    """The schema as the gateway gives it out. Both models can be asked, so that health is no 503."""
    models = {name: settings["models"][name] for name in ("support", "long")}
    gateway = start_gateway(settings | {"models": models})
    return schemathesis.openapi.from_url(f"http://127.0.0.1:{gateway.port}/openapi.json")


schema = schemathesis.pytest.from_fixture("api_schema")


@schema.parametrize()
@hypothesis.settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(hypothesis.HealthCheck), derandomize=True
)
def test_no_request_makes_the_gateway_fail(case: Any) -> None:
    """Valid and invalid requests made from the schema; those with a model ask one that is there, briefly."""
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body = {"max_tokens": 2} | case.body | {"model": "support"}
    case.call_and_validate(headers=KEY, checks=[not_a_server_error])
