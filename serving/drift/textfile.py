"""Metrics for node_exporter's textfile collector, which a cron job leaves and Prometheus scrapes."""

from __future__ import annotations

import time
from pathlib import Path

from posttrain.errors import UserError
from serving.drift.compare import Comparison
from serving.drift.records import Selection

PREFIX = "posttrain_drift"
NAMES = {
    "alarm": "1 when a feature has drifted, else 0.",
    "feature_alarm": "1 when this feature has drifted, else 0.",
    "effect_ratio": "Effect of a feature over its floor; 1 and more is large enough for an alarm.",
    "p_value": "Corrected p-value of a feature.",
    "records": "Records compared.",
    "last_run_timestamp_seconds": "When the comparison ended.",
}


def write_metrics(path: Path, comparison: Comparison, selection: Selection) -> None:
    """Write the result of one comparison, atomically. Labels: model and version as selected, "" for any.

    Raises UserError: prometheus-client is missing, the name does not end in .prom, no such directory.
    """
    try:
        from prometheus_client import CollectorRegistry, Gauge, write_to_textfile
    except ModuleNotFoundError as error:
        raise UserError("--prometheus needs prometheus-client\n    pip install 'posttrain[drift]'") from error
    if path.suffix != ".prom" or not path.parent.is_dir():
        raise UserError(
            f"--prometheus {path}: name a file that ends in .prom (the collector reads no other) in a "
            "directory that exists\n    it is the one of node_exporter --collector.textfile.directory"
        )
    registry = CollectorRegistry()
    labels = {"model": selection.model or "", "version": selection.version or ""}

    def gauge(name: str, *more: str) -> Gauge:
        return Gauge(f"{PREFIX}_{name}", NAMES[name], (*labels, *more), registry=registry)

    gauge("alarm").labels(**labels).set(bool(comparison.alarms))
    gauge("records").labels(**labels).set(comparison.records)
    gauge("last_run_timestamp_seconds").labels(**labels).set(time.time())
    alarm, ratio, p_value = (gauge(name, "feature") for name in ("feature_alarm", "effect_ratio", "p_value"))
    for finding in comparison.findings:
        alarm.labels(**labels, feature=finding.feature).set(finding.verdict == "drift")
        ratio.labels(**labels, feature=finding.feature).set(finding.effect / finding.floor)
        p_value.labels(**labels, feature=finding.feature).set(finding.p_corrected)
    write_to_textfile(str(path), registry)
