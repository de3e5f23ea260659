"""What `posttrain show` prints about a stage's run directory or a pipeline's directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from posttrain.errors import UserError
from posttrain.rundir import metric_rows, read_manifest


def describe(path: Path) -> dict[str, Any]:
    """Everything about a run directory ({"manifest", "last_metrics", "lineage"}) or a pipeline directory
    ({"pipeline", "stages"}), as JSON values. Raises UserError for anything else."""
    path = path.absolute()
    manifest = read_manifest(path)
    if manifest is not None:
        rows = metric_rows(path)
        return {"manifest": manifest, "last_metrics": rows[-1] if rows else None, "lineage": lineage(path)}
    record = path / "pipeline.json"
    if record.is_file():
        pipeline = json.loads(record.read_text(encoding="utf-8"))
        runs = {name: read_manifest(path / name) for name in pipeline["stages"]}
        return {"pipeline": pipeline, "stages": runs}
    raise UserError(
        f"{path}: holds neither manifest.json nor pipeline.json\n"
        "    name a run directory (runs/PIPELINE/STAGE) or a pipeline's (runs/PIPELINE)"
    )


def lineage(run_dir: Path) -> dict[str, Any]:
    """The run and, under "parents", the lineage of each input, followed as far as it is on the disk."""
    manifest = read_manifest(run_dir)
    assert manifest is not None
    node: dict[str, Any] = {
        "name": manifest["name"],
        "stage": manifest["stage"],
        "status": manifest["status"],
        "outputs_hash": manifest["outputs_hash"],
        "parents": [],
    }
    for parent in manifest["parents"]:
        entry = {"field": parent["field"], "ref": parent["ref"], "content_hash": parent["content_hash"]}
        source = _parent_directory(run_dir, parent)
        if source is not None:
            entry["run"] = lineage(source)
        node["parents"].append(entry)
    return node


def _parent_directory(run_dir: Path, parent: dict[str, Any]) -> Path | None:
    """Where the parent run is now: as it was named, or beside this run when the pipeline was moved."""
    if parent["run"] is None:
        return None
    for place in (Path(parent["ref"]).absolute(), run_dir.parent / parent["run"]):
        found = read_manifest(place)
        if found is not None and found["stage"] == parent["stage"]:
            return place
    return None


def print_run(description: dict[str, Any], console: Console) -> None:
    """Print the result of `describe`."""
    if "pipeline" in description:
        _print_pipeline(description, console)
        return
    manifest = description["manifest"]
    table = Table(show_header=False, box=None, pad_edge=False)
    for label, value in _facts(manifest):
        table.add_row(Text(label, style="bold"), Text(value))
    console.print(table)
    for title, values in (
        ("metrics", manifest["metrics"]),
        ("last row of metrics.jsonl", description["last_metrics"]),
    ):
        if values:
            console.print(Text(f"\n{title}", style="bold"))
            for name, value in values.items():
                console.print(Text(f"  {name}: {_short(value)}"))
    console.print()
    console.print(_tree(description["lineage"], None))


def _facts(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    code = manifest["code"]
    commit = (
        f" at {code['git'][:12]}{' (with local changes)' if code['dirty'] else ''}" if code["git"] else ""
    )
    timings = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in manifest["timings"].items())
    facts = [
        ("stage", f"{manifest['stage']} ({manifest['name']})"),
        ("status", manifest["status"]),
        ("error", manifest["error"] or ""),
        ("started", manifest["started"]),
        ("finished", manifest["finished"] or ""),
        ("code", f"posttrain {code['version']}{commit}"),
        ("seed", str(manifest["seeds"]["stage"])),
        ("inputs hash", manifest["inputs_hash"][:16]),
        ("outputs hash", (manifest["outputs_hash"] or "")[:16]),
        ("timings", timings),
    ]
    return [(label, value) for label, value in facts if value]


def _print_pipeline(description: dict[str, Any], console: Console) -> None:
    pipeline = description["pipeline"]
    console.print(Text(f"{pipeline['name']}: {pipeline['status']}  ({pipeline['config']})", style="bold"))
    table = Table("stage", "kind", "status", "seconds", "reads", "outputs", box=None, pad_edge=False)
    for name in pipeline["stages"]:
        detail, manifest = pipeline["details"][name], description["stages"][name]
        status = manifest["status"] if manifest else "not run"
        seconds = f"{manifest['timings']['total']:.1f}" if manifest and "total" in manifest["timings"] else ""
        outputs = (manifest["outputs_hash"] or "")[:12] if manifest else ""
        table.add_row(name, detail["stage"], status, seconds, ", ".join(detail["depends"]), outputs)
    console.print(table)


def _tree(node: dict[str, Any], field: str | None) -> Tree:
    prefix = f"{field}: " if field else ""
    label = Text(
        f"{prefix}{node['name']} ({node['stage']}, {node['status']}) {(node['outputs_hash'] or '')[:12]}"
    )
    tree = Tree(label)
    for parent in node["parents"]:
        if "run" in parent:
            tree.add(_tree(parent["run"], parent["field"]))
        else:
            tree.add(Text(f"{parent['field']}: {parent['ref']} {parent['content_hash'][:12]}"))
    return tree


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else f"{text[:157]}..."
