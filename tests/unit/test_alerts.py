"""The alert rules of an export: metrics that exist, expressions that parse, and alerts that fire and rest."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

from serving.alerts import MAX_IN_FLIGHT, RULES, prometheus_rules
from serving.config import ExportConfig
from serving.gateway.config import LimitsConfig
from serving.gateway.metrics import Metrics
from serving.targets import Layout

TARGETS = ("triton-vllm", "triton-python", "triton-onnx", "triton-trtllm", "kserve", "vllm")
# As a Triton 2.51 shows them; tests/integration/test_serve_triton.py holds a live one to the rules.
TRITON = {
    "nv_inference_request_success",
    "nv_inference_request_failure",
    "nv_inference_queue_duration_us",
    "nv_inference_pending_request_count",
}
# docs.vllm.ai, Production Metrics: the same names from 0.5 to 0.11.
VLLM = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:request_success_total",
}
METRIC = re.compile(r"\b(?:posttrain_(?:gateway|drift)_|nv_|vllm:)\w+")
PROMTOOL = shutil.which("promtool")


def text_of(target: str, name: str = "desk") -> str:
    return prometheus_rules(Layout(ExportConfig(model="m", name=name, target=target), "1", 64, None))


def rules_of(target: str) -> list[dict]:
    return [rule for group in yaml.safe_load(text_of(target))["groups"] for rule in group["rules"]]


def gateway_metrics() -> dict[str, set[str]]:
    """Every series that the gateway's registry can show, with its labels."""
    metrics = Metrics()
    holders = [held for held in vars(metrics).values() if isinstance(held, MetricWrapperBase)]
    labels = {held._name: {*held._labelnames, "le"} for held in holders}
    found = {}
    for metric in metrics.registry.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(metric.type, [""])
        found |= {f"{metric.name}{suffix}": labels[metric.name] for suffix in suffixes}
    return found


def known() -> set[str]:
    from serving.drift.textfile import NAMES, PREFIX

    return {*gateway_metrics(), *TRITON, *VLLM, *(f"{PREFIX}_{name}" for name in NAMES)}


@pytest.mark.parametrize("target", TARGETS)
def test_every_metric_in_the_rules_exists(target):
    expressions = [rule["expr"] for rule in rules_of(target)]
    named = {name for expression in expressions for name in METRIC.findall(expression)}
    assert named and named <= known()
    assert all(METRIC.search(expression) for expression in expressions)
    servers = {"vllm" if name.startswith("vllm:") else name.split("_")[0] for name in named}
    assert servers == ({"vllm", "posttrain"} if target == "vllm" else {"nv", "posttrain"})


def test_the_labels_in_the_gateways_rules_exist():
    metrics = gateway_metrics()
    for rule in rules_of("triton-vllm"):
        for name, selector in re.findall(r"(posttrain_gateway_\w+)\{([^}]*)\}", rule["expr"]):
            assert set(re.findall(r"(\w+)!?=", selector)) <= metrics[name]
        for grouping in re.findall(r"by \(([^)]*)\)", rule["expr"]):
            used = METRIC.findall(rule["expr"])[0]
            if used in metrics:
                assert {label.strip() for label in grouping.split(",")} <= metrics[used]


@pytest.mark.parametrize("target", TARGETS)
def test_the_file_has_the_structure_of_a_rule_file(target):
    document = yaml.safe_load(text_of(target))
    assert set(document) == {"groups"}
    assert len({group["name"] for group in document["groups"]}) == len(document["groups"])
    names = [rule["alert"] for rule in rules_of(target)]
    assert len(set(names)) == len(names)
    for rule in rules_of(target):
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert re.fullmatch(r"\d+[smh]", rule["for"])
        assert rule["annotations"]["summary"] and rule["annotations"]["description"]


def test_the_saturation_threshold_follows_the_gateways_default():
    assert LimitsConfig().max_in_flight == MAX_IN_FLIGHT
    (rule,) = (rule for rule in rules_of("triton-vllm") if rule["alert"] == "PosttrainGatewaySaturated")
    assert rule["expr"] == f"posttrain_gateway_in_flight > {int(0.8 * MAX_IN_FLIGHT)}"


needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="no promtool; Debian's package is `prometheus`")


@needs_promtool
@pytest.mark.parametrize("target", TARGETS)
def test_promtool_accepts_the_rules(target, tmp_path):
    (tmp_path / RULES).write_text(text_of(target))
    done = subprocess.run([PROMTOOL, "check", "rules", str(tmp_path / RULES)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


REQUESTS = 'posttrain_gateway_requests_total{endpoint="/v1/chat/completions",model="m",version="1",status='
# name of the alert -> series on which it fires, and series on which it does not; a sample each minute.
CASES = {
    "PosttrainGatewayDown": ({"up": "1x120"}, {"posttrain_gateway_connections": "3x120"}),
    "PosttrainGatewayErrors": (
        {REQUESTS + '"200"}': "0+90x120", REQUESTS + '"503"}': "0+10x120"},
        {
            REQUESTS + '"200"}': "0+99x120",
            REQUESTS + '"503"}': "0+1x120",
            'posttrain_gateway_requests_total{endpoint="/health/ready",model="",version="",status="503"}': (
                "0+6x120"
            ),
        },
    ),
    "PosttrainUpstreamErrors": (
        {
            REQUESTS + '"200"}': "0+90x120",
            'posttrain_gateway_upstream_errors_total{model="m",version="1",code="timeout"}': "0+5x120",
        },
        {
            REQUESTS + '"200"}': "0+90x120",
            'posttrain_gateway_upstream_errors_total{model="m",version="1",code="timeout"}': "0+1x120",
            'posttrain_gateway_upstream_errors_total{model="m",version="1",code="INVALID_ARGUMENT"}': (
                "0+50x120"
            ),
        },
    ),
    "PosttrainFirstTokenSlow": (
        {
            'posttrain_gateway_first_token_seconds_bucket{model="m",version="1",le="5.0"}': "0+50x120",
            'posttrain_gateway_first_token_seconds_bucket{model="m",version="1",le="10.0"}': "0+60x120",
            'posttrain_gateway_first_token_seconds_bucket{model="m",version="1",le="+Inf"}': "0+60x120",
        },
        {
            'posttrain_gateway_first_token_seconds_bucket{model="m",version="1",le="5.0"}': "0+59x120",
            'posttrain_gateway_first_token_seconds_bucket{model="m",version="1",le="+Inf"}': "0+60x120",
        },
    ),
    "PosttrainGatewaySaturated": (
        {"posttrain_gateway_in_flight": "210x120"},
        {"posttrain_gateway_in_flight": "200x120"},
    ),
    "PosttrainGatewayRefusesConnections": (
        {"posttrain_gateway_refused_connections_total": "0+1x120"},
        {"posttrain_gateway_refused_connections_total": "4x120"},
    ),
    "PosttrainKeyLimited": (
        {'posttrain_gateway_limited_total{key="a",reason="tokens"}': "0+10x120"},
        {'posttrain_gateway_limited_total{key="a",reason="tokens"}': "0+1x120"},
    ),
    "PosttrainNoTraffic": (
        {"posttrain_gateway_connections": "0x120", REQUESTS + '"200"}': "7x120"},
        {"posttrain_gateway_connections": "0x120", REQUESTS + '"200"}': "0+1x120"},
    ),
    "PosttrainReloadFailed": (
        {'posttrain_gateway_reloads_total{what="keys",outcome="failed"}': "_x89 1x30"},
        {
            'posttrain_gateway_reloads_total{what="keys",outcome="done"}': "_x89 1x30",
            'posttrain_gateway_reloads_total{what="keys",outcome="failed"}': "1x120",
        },
    ),
    "PosttrainMonitoringDrops": (
        {'posttrain_gateway_monitoring_dropped_total{reason="database"}': "0+1x120"},
        {'posttrain_gateway_monitoring_dropped_total{reason="database"}': "4x120"},
    ),
    "PosttrainModelDown": (
        {'nv_inference_request_success{model="other",version="1"}': "1x120"},
        {'nv_inference_request_success{model="desk",version="1"}': "1x120"},
    ),
    "PosttrainTritonFailures": (
        {
            'nv_inference_request_success{model="desk",version="1"}': "0+90x120",
            'nv_inference_request_failure{model="desk",version="1",reason="BACKEND"}': "0+10x120",
        },
        {
            'nv_inference_request_success{model="desk",version="1"}': "0+90x120",
            'nv_inference_request_failure{model="desk",version="1",reason="CANCELED"}': "0+10x120",
        },
    ),
    "PosttrainTritonQueueSlow": (
        {
            'nv_inference_request_success{model="desk",version="1"}': "0+10x120",
            'nv_inference_queue_duration_us{model="desk",version="1"}': "0+20000000x120",
        },
        {
            'nv_inference_request_success{model="desk",version="1"}': "0+10x120",
            'nv_inference_queue_duration_us{model="desk",version="1"}': "0+5000000x120",
        },
    ),
    "PosttrainTritonQueueLong": (
        {'nv_inference_pending_request_count{model="desk",version="1"}': "65x120"},
        {'nv_inference_pending_request_count{model="desk",version="1"}': "64x120"},
    ),
    "PosttrainDrift": (
        {'posttrain_drift_alarm{model="desk",version=""}': "1x120"},
        {'posttrain_drift_alarm{model="desk",version=""}': "0x120"},
    ),
    # Time begins at 0 in promtool's tests: the run ended three days before, or then.
    "PosttrainDriftStale": (
        {'posttrain_drift_last_run_timestamp_seconds{model="desk",version=""}': "-259200x120"},
        {'posttrain_drift_last_run_timestamp_seconds{model="desk",version=""}': "0x120"},
    ),
}


@needs_promtool
def test_every_alert_fires_when_it_should_and_rests_when_it_should(tmp_path):
    """promtool evaluates the rules over series made for each, after an hour and forty minutes."""
    assert set(CASES) == {rule["alert"] for rule in rules_of("triton-vllm")}
    (tmp_path / RULES).write_text(text_of("triton-vllm"))
    tests = []
    for name, sides in CASES.items():
        for series, fires in zip(sides, (1, 0), strict=True):
            count = f'count(ALERTS{{alertname="{name}",alertstate="firing"}}) or vector(0)'
            expected = [{"labels": "{}", "value": fires}]
            tests.append(
                {
                    "interval": "1m",
                    "input_series": [{"series": key, "values": values} for key, values in series.items()],
                    "promql_expr_test": [{"expr": count, "eval_time": "100m", "exp_samples": expected}],
                }
            )
    cases = {"rule_files": [RULES], "evaluation_interval": "1m", "tests": tests}
    (tmp_path / "cases.yaml").write_text(yaml.safe_dump(cases))
    done = subprocess.run(
        [PROMTOOL, "test", "rules", "cases.yaml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
