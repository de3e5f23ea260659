"""The lineage of a pipeline as a graph: stages as boxes, an edge for every input taken from another stage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from statistics import fmean
from typing import Any

from eval.report.load import Pipeline, Stage
from posttrain.svg import rect, svg, text

BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y, MARGIN = 148, 50, 22, 44, 14
KIND_COLOURS = {
    **{
        "curate": 0,
        "synthesize": 0,
        "base": 3,
        "pretrain": 3,
        "sft": 3,
        "merge": 3,
        "reward": 4,
        "ppo": 2,
        "grpo": 2,
        "rloo": 2,
        "eval": 5,
    },
    **{"dpo": 1, "kto": 1, "orpo": 1, "cpo": 1},
}
"""Palette index by stage kind; data grey, language models one hue, serving the default."""


@dataclass
class Node:
    """A box: a stage, or an input from outside the pipeline."""

    name: str
    kind: str
    digest: str
    status: str
    layer: int = 0
    column: float = 0.0


def output_hash(stage: Stage) -> str:
    """Content hash of what the stage handed on: its model, else its dataset, else everything it wrote."""
    outputs: dict[str, Any] = stage.manifest.get("outputs") or {}
    return str(outputs.get("model") or outputs.get("dataset") or stage.manifest.get("outputs_hash") or "")


def build_graph(pipeline: Pipeline) -> tuple[dict[str, Node], list[tuple[str, str]]]:
    """Nodes by name and (from, to) edges, from the parents in the manifests."""
    nodes = {
        stage.name: Node(stage.name, stage.kind, output_hash(stage), stage.status)
        for stage in pipeline.stages
    }
    edges = []
    for stage in pipeline.stages:
        for parent in stage.manifest.get("parents", []):
            source = parent.get("run") or PurePath(str(parent.get("ref", ""))).name
            if source not in nodes:
                digest = str(parent.get("content_hash") or "")
                nodes[source] = Node(source, "external input", digest, "complete")
            if (source, stage.name) not in edges and source != stage.name:
                edges.append((source, stage.name))
    return nodes, edges


def place(nodes: dict[str, Node], edges: list[tuple[str, str]]) -> None:
    """Layers by the longest path from a source, columns under the mean of the parents. In place."""
    for _ in nodes:
        for source, target in edges:
            nodes[target].layer = max(nodes[target].layer, nodes[source].layer + 1)
    # A source sits just above its first user, so that edges stay short.
    for name, node in nodes.items():
        users = [nodes[target].layer for source, target in edges if source == name]
        if users and not any(target == name for _, target in edges):
            node.layer = min(users) - 1
    for layer in range(max(node.layer for node in nodes.values()) + 1):
        row = [node for node in nodes.values() if node.layer == layer]
        above = {node.name: [nodes[a].column for a, b in edges if b == node.name] for node in row}
        children = sorted(
            (node for node in row if above[node.name]), key=lambda node: fmean(above[node.name])
        )
        for left, node in zip([None, *children], children, strict=False):
            node.column = fmean(above[node.name])
            if left is not None:
                node.column = max(node.column, left.column + 1)
        drift = [node.column - fmean(above[node.name]) for node in children]
        for node in children:
            node.column -= fmean(drift)
        right = max((node.column for node in children), default=-1.0)
        for offset, node in enumerate((node for node in row if not above[node.name]), start=1):
            node.column = right + offset


def lineage_svg(pipeline: Pipeline) -> str:
    """The graph, sources at the top. Box borders are dashed where a stage did not complete."""
    nodes, edges = build_graph(pipeline)
    place(nodes, edges)
    layers = max(node.layer for node in nodes.values()) + 1
    first = min(node.column for node in nodes.values())
    span = max(node.column for node in nodes.values()) - first
    width = 2 * MARGIN + BOX_WIDTH + span * (BOX_WIDTH + GAP_X)
    height = 2 * MARGIN + layers * BOX_HEIGHT + (layers - 1) * GAP_Y

    def corner(node: Node) -> tuple[float, float]:
        x = MARGIN + (node.column - first) * (BOX_WIDTH + GAP_X)
        return x, MARGIN + node.layer * (BOX_HEIGHT + GAP_Y)

    body = []
    for source, target in edges:
        (x1, y1), (x2, y2) = corner(nodes[source]), corner(nodes[target])
        start, end = (x1 + BOX_WIDTH / 2, y1 + BOX_HEIGHT), (x2 + BOX_WIDTH / 2, y2)
        bend = max(GAP_Y / 2, (end[1] - start[1]) / 2)
        bends = f"C{start[0]:.1f} {start[1] + bend:.1f} {end[0]:.1f} {end[1] - bend:.1f}"
        line = f"M{start[0]:.1f} {start[1]:.1f}{bends} {end[0]:.1f} {end[1]:.1f}"
        body.append(f'<path d="{line}" class="edge"/>')
    for node in nodes.values():
        x, y = corner(node)
        css = "box" + ("" if node.status == "complete" else " dash")
        tip = f"{node.name}: {node.kind}, {node.status}, content {node.digest or 'unknown'}"
        body.append(rect(x, y, BOX_WIDTH, BOX_HEIGHT, css, tip, 6))
        body.append(rect(x, y + 6, 4, BOX_HEIGHT - 12, f"fill c{KIND_COLOURS.get(node.kind, 5)}"))
        body.append(text(x + 14, y + 21, shorten(node.name, 18), "t strong"))
        detail = node.kind if node.kind != node.name else node.status
        body.append(text(x + 14, y + 38, f"{shorten(detail, 9)} {node.digest[:8]}".rstrip(), "t mono"))
    label = f"Lineage of {pipeline.name}: {len(nodes)} boxes, {len(edges)} edges"
    return f'<div class="lineage" style="max-width: {width:.0f}px">{svg(body, label, width, height)}</div>'


def shorten(content: str, limit: int) -> str:
    """`content`, its middle replaced by a dot leader when it is longer than `limit` characters."""
    if len(content) <= limit:
        return content
    return f"{content[: limit // 2 - 1]}..{content[-(limit - limit // 2 - 1) :]}"
