"""Alert rules for Prometheus, written beside the deployment files: RUN/deploy/prometheus-rules.yaml.

Thresholds are starting points for a chat service, one number in each expression. The alerts name what this
repository exports: the gateway (serving/gateway/metrics.py), Triton or vLLM for the exported model, and
`posttrain drift --prometheus` through node_exporter's textfile collector.
"""

from __future__ import annotations

from typing import Any

import yaml

from serving.targets import Layout

RULES = "prometheus-rules.yaml"
GATEWAY_TARGETS = ("triton-vllm", "triton-python", "triton-trtllm", "kserve")
MAX_IN_FLIGHT = 256
_HEADER = """\
# Alert rules for Prometheus. Name this file under rule_files: in prometheus.yml, and check a change with
#     promtool check rules prometheus-rules.yaml
# Scraped: the gateway's /metrics, the server's metrics port, and node_exporter with the textfile collector,
# for the file that `posttrain drift --prometheus` writes.
"""
_API = "/v1/.*"
_ASKING = '{endpoint=~"/v1/(chat/)?completions"}'


def prometheus_rules(layout: Layout) -> str:
    """The rule file for the layout's target, as YAML text."""
    target, name = layout.config.target, layout.config.name
    groups = [_vllm(name)] if target == "vllm" else [_triton(name)]
    if target in GATEWAY_TARGETS:
        groups.insert(0, _gateway())
    groups.append(_drift())
    return _HEADER + yaml.safe_dump({"groups": groups}, sort_keys=False, width=1000)


def _rule(name: str, expr: str, wait: str, severity: str, summary: str, description: str) -> dict[str, Any]:
    return {
        "alert": name,
        "expr": expr,
        "for": wait,
        "labels": {"severity": severity},
        "annotations": {"summary": summary, "description": description},
    }


def _gateway() -> dict[str, Any]:
    p = "posttrain_gateway"
    by = "by (model, version)"
    failed = f'{p}_reloads_total{{outcome="failed"}}'
    rules = [
        _rule(
            "PosttrainGatewayDown",
            f"absent({p}_connections)",
            "5m",
            "critical",
            "No gateway is scraped",
            "It is down, or Prometheus does not reach its /metrics (private_metrics wants a key).",
        ),
        _rule(
            "PosttrainGatewayErrors",
            f'sum {by} (rate({p}_requests_total{{endpoint=~"{_API}",status=~"5.."}}[5m])) '
            f'/ sum {by} (rate({p}_requests_total{{endpoint=~"{_API}"}}[5m])) > 0.05',
            "5m",
            "critical",
            "{{ $value | humanizePercentage }} of the requests to {{ $labels.model }} "
            "{{ $labels.version }} fail",
            "Status 5xx for more than 5 %. See PosttrainUpstreamErrors and the gateway's log.",
        ),
        _rule(
            "PosttrainUpstreamErrors",
            f'sum {by} (rate({p}_upstream_errors_total{{code!="INVALID_ARGUMENT"}}[5m])) '
            f"/ sum {by} (rate({p}_requests_total[5m])) > 0.02",
            "5m",
            "critical",
            "Triton fails {{ $value | humanizePercentage }} of the requests to {{ $labels.model }} "
            "{{ $labels.version }}",
            "More than 2 %, without what it refused because of a parameter. The label `code` of "
            "posttrain_gateway_upstream_errors_total says how.",
        ),
        _rule(
            "PosttrainFirstTokenSlow",
            f"histogram_quantile(0.95, sum by (model, version, le) "
            f"(rate({p}_first_token_seconds_bucket[5m]))) > 5",
            "10m",
            "warning",
            "p95 of the first token of {{ $labels.model }} {{ $labels.version }} is {{ $value }} s",
            "Over 5 s. Usually requests wait in the server: add replicas, or lower the limits of keys.",
        ),
        _rule(
            "PosttrainGatewaySaturated",
            f"{p}_in_flight > {MAX_IN_FLIGHT * 4 // 5}",
            "2m",
            "warning",
            "{{ $value }} requests in flight",
            f"Over 80 % of limits.max_in_flight ({MAX_IN_FLIGHT} by default), beyond which requests get 503.",
        ),
        _rule(
            "PosttrainGatewayRefusesConnections",
            f"increase({p}_refused_connections_total[5m]) > 0",
            "0m",
            "warning",
            "The gateway refused {{ $value }} connections",
            "More than limits.max_connections were open.",
        ),
        _rule(
            "PosttrainKeyLimited",
            f"sum by (key, reason) (increase({p}_limited_total[15m])) > 50",
            "0m",
            "info",
            "Key {{ $labels.key }} was refused {{ $value }} times in 15 minutes",
            "Status 429, reason {{ $labels.reason }}: raise the key's limit, or talk to its owner.",
        ),
        _rule(
            "PosttrainNoTraffic",
            f"(sum(increase({p}_requests_total{_ASKING}[30m])) or vector(0)) == 0 and on() {p}_connections",
            "30m",
            "warning",
            "Nobody has asked the gateway for an answer for an hour",
            "It is up. Look at what is in front of it: DNS, load balancer, certificates, keys.",
        ),
        _rule(
            "PosttrainReloadFailed",
            # The series begins with the first failure, at 1, which increase() does not see.
            f"increase({failed}[1h]) > 0 or ({failed} unless {failed} offset 1h)",
            "0m",
            "warning",
            "A change of {{ $labels.what }} was not taken over",
            "The gateway goes on with what it had. Its log says why.",
        ),
        _rule(
            "PosttrainMonitoringDrops",
            f"increase({p}_monitoring_dropped_total[15m]) > 0",
            "0m",
            "warning",
            "{{ $value }} requests are missing in the monitoring database",
            "Reason {{ $labels.reason }}: `database` is a full disk or a lock, and monitoring_failed in the "
            "log says which; `queue_full` is a disk too slow.",
        ),
    ]
    return {"name": "posttrain-gateway", "rules": rules}


def _triton(model: str) -> dict[str, Any]:
    chosen = f'model="{model}"'
    finished = f"sum by (model, version) (rate(nv_inference_request_success{{{chosen}}}[5m]))"
    failed = (
        f'sum by (model, version) (rate(nv_inference_request_failure{{{chosen},reason!="CANCELED"}}[5m]))'
    )
    rules = [
        _rule(
            "PosttrainModelDown",
            f"absent(nv_inference_request_success{{{chosen}}})",
            "5m",
            "critical",
            f"No Triton server with {model} is scraped",
            "It is down, did not load the model, or Prometheus does not reach port 8002.",
        ),
        _rule(
            "PosttrainTritonFailures",
            f"{failed} / ({finished} + {failed}) > 0.05",
            "5m",
            "critical",
            "Triton fails {{ $value | humanizePercentage }} of the requests to version {{ $labels.version }}",
            "Requests that clients cancelled are not counted.",
        ),
        _rule(
            "PosttrainTritonQueueSlow",
            f"sum by (model, version) (rate(nv_inference_queue_duration_us{{{chosen}}}[5m])) / 1e6 "
            f"/ {finished} > 1",
            "5m",
            "warning",
            "Requests wait {{ $value }} s in Triton's queue",
            "Over a second on average before the model takes them: add instances or replicas.",
        ),
        _rule(
            "PosttrainTritonQueueLong",
            f"sum by (model, version) (nv_inference_pending_request_count{{{chosen}}}) > 64",
            "5m",
            "warning",
            "{{ $value }} requests wait in Triton",
            "Requests that the backend has not taken yet.",
        ),
    ]
    return {"name": "posttrain-triton", "rules": rules}


def _vllm(model: str) -> dict[str, Any]:
    chosen = f'model_name="{model}"'
    rules = [
        _rule(
            "PosttrainModelDown",
            f"absent(vllm:num_requests_running{{{chosen}}})",
            "5m",
            "critical",
            f"No vLLM server with {model} is scraped",
            "It is down, or Prometheus does not reach its /metrics.",
        ),
        _rule(
            "PosttrainFirstTokenSlow",
            f"histogram_quantile(0.95, sum by (model_name, le) "
            f"(rate(vllm:time_to_first_token_seconds_bucket{{{chosen}}}[5m]))) > 5",
            "10m",
            "warning",
            "p95 of the first token is {{ $value }} s",
            "Over 5 s. See PosttrainVllmQueueLong.",
        ),
        _rule(
            "PosttrainVllmQueueLong",
            f"sum by (model_name) (vllm:num_requests_waiting{{{chosen}}}) > 64",
            "5m",
            "warning",
            "{{ $value }} requests wait in vLLM",
            "There is no room for their KV cache: add replicas, or lower max_model_len.",
        ),
        _rule(
            "PosttrainNoTraffic",
            f"sum by (model_name) (increase(vllm:request_success_total{{{chosen}}}[30m])) == 0",
            "30m",
            "warning",
            "vLLM has answered nobody for an hour",
            "It is up. Look at what is in front of it.",
        ),
    ]
    return {"name": "posttrain-vllm", "rules": rules}


def _drift() -> dict[str, Any]:
    p = "posttrain_drift"
    rules = [
        _rule(
            "PosttrainDrift",
            f"{p}_alarm == 1",
            "0m",
            "warning",
            "Traffic of {{ $labels.model }} has drifted from the training data",
            "posttrain_drift_feature_alarm names the features; the report of `posttrain drift` shows them.",
        ),
        _rule(
            "PosttrainDriftStale",
            f"time() - {p}_last_run_timestamp_seconds > 172800",
            "0m",
            "warning",
            "`posttrain drift` has not ended for two days",
            "The cron job fails (exit code 1 or 2: bad input, too few samples) or does not run.",
        ),
    ]
    return {"name": "posttrain-drift", "rules": rules}
