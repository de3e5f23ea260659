"""A versioned model repository and its index: which versions there are, and that none has changed.

    RUN/export.json                              the index: every version, and the sha256 of every file
    RUN/model_repository/<name>/config.pbtxt     shared by all versions
    RUN/model_repository/<name>/<version>/       one version: complete once it is there, never changed

A version is written beside the repository and moved into it by one rename, after which the index is replaced.
A folder that the index does not list (an interrupted export's, or somebody else's) is left alone, and its
number is not used again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from posttrain.errors import UserError
from posttrain.hashing import hash_file
from posttrain.rundir import atomic_write_json, atomic_write_text, fsync_path

MANIFEST = "export.json"
REPOSITORY = "model_repository"
WEIGHTS = "weights"
ADAPTERS = "adapters"
GOLDEN = "golden.json"
SCHEMA_VERSION = 2
EMBEDDED_TARGETS = ("triton-vllm", "triton-python", "kserve")


def describe_files(directory: Path) -> dict[str, dict[str, Any]]:
    """{path inside the directory: {"sha256", "bytes"}}, in a fixed order; Python's caches left out."""
    return {
        file.relative_to(directory).as_posix(): {"sha256": hash_file(file), "bytes": file.stat().st_size}
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.parent.name != "__pycache__"
    }


def read_index(export_dir: Path) -> dict[str, Any] | None:
    """export.json as it is, None where there is none.

    The manifest of the newest version ("name", "version", "limits", ...), "shared": the files outside the
    versions, and "versions": {version: manifest}.
    Raises UserError when another release wrote it.
    """
    path = export_dir / MANIFEST
    if not path.is_file():
        return None
    index = json.loads(path.read_text(encoding="utf-8"))
    if index.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{path}: was not written by this version of posttrain (schema {SCHEMA_VERSION})\n"
            f"    export to another directory, or remove {MANIFEST} and {REPOSITORY} there"
        )
    return index


def choose_version(index: dict[str, Any] | None, model_dir: Path, wanted: int | None) -> str:
    """The number of the version to write: `wanted`, or one more than the largest.

    Raises UserError when `wanted` is there already, listed or not.
    """
    taken = {int(item.name) for item in model_dir.glob("[0-9]*") if item.name.isdecimal()}
    taken |= {int(version) for version in (index or {}).get("versions", {})}
    if wanted is None:
        return str(max(taken, default=0) + 1)
    if wanted in taken:
        raise UserError(
            f"version: {model_dir} already has a version {wanted}, and a version is never overwritten\n"
            f"    remove `version` to write the next one ({max(taken) + 1}), or name another"
        )
    return str(wanted)


def check_same_model(index: dict[str, Any] | None, name: str, target: str, export_dir: Path) -> None:
    """Raise UserError when the repository holds another model or another target's versions."""
    if index is None:
        return
    for field, value in (("name", name), ("target", target)):
        if index[field] != value:
            raise UserError(
                f"{field}: {export_dir / REPOSITORY} has versions of {field} {index[field]}, not {value}\n"
                "    export to another directory (--output, or another stage name in the pipeline)"
            )


def find_same(export_dir: Path, index: dict[str, Any] | None, content: str) -> str | None:
    """The newest version if it was made from the same content and is intact; none need be written then."""
    if index is None:
        return None
    newest = str(index["version"])
    manifest = index["versions"][newest]
    intact = manifest["content"] == content and manifest["files"] == _version_files(
        export_dir, index["name"], newest
    )
    return newest if intact else None


def publish(
    export_dir: Path,
    staged: Path,
    version: str,
    manifest: dict[str, Any],
    index: dict[str, Any] | None,
    config_pbtxt: str | None,
) -> dict[str, Any]:
    """Move a staged version into the repository, list it and return its manifest with "files" and "version".

    config_pbtxt: text of that file, None for a target without one. It is written after the move and directly
    before the index, which has its sha256: an interruption before that leaves the listed versions valid.
    """
    model_dir = export_dir / REPOSITORY / manifest["name"]
    model_dir.mkdir(parents=True, exist_ok=True)
    for folder in (model_dir, model_dir.parent):
        folder.chmod(0o755)
    staged.rename(model_dir / version)
    fsync_path(model_dir)
    files = _version_files(export_dir, manifest["name"], version)
    listed = {**manifest, "version": version, "files": files}
    versions = {**(index or {}).get("versions", {}), version: listed}
    write_config(model_dir, config_pbtxt)
    write_index(export_dir, dict(sorted(versions.items(), key=lambda item: int(item[0]))))
    return listed


def write_config(model_dir: Path, text: str | None) -> None:
    """config.pbtxt, which all versions share, unless it says so already: Triton reloads what is rewritten."""
    path = model_dir / "config.pbtxt"
    if text is None or (path.is_file() and path.read_text(encoding="utf-8") == text):
        return
    atomic_write_text(path, text)


def write_index(export_dir: Path, versions: dict[str, dict[str, Any]]) -> None:
    """Replace export.json; `versions` in order, the newest last. One whose folder is gone is left out."""
    name = versions[list(versions)[-1]]["name"]
    versions = {
        version: manifest
        for version, manifest in versions.items()
        if (export_dir / REPOSITORY / name / version).is_dir()
    }
    newest = versions[list(versions)[-1]]
    index = {
        "schema_version": SCHEMA_VERSION,
        **newest,
        "shared": _shared_files(export_dir, name),
        "versions": versions,
    }
    atomic_write_json(export_dir / MANIFEST, index)


def _version_files(export_dir: Path, name: str, version: str) -> dict[str, dict[str, Any]]:
    files = describe_files(export_dir / REPOSITORY / name / version)
    return {f"{name}/{version}/{path}": entry for path, entry in files.items()}


def _shared_files(export_dir: Path, name: str) -> dict[str, dict[str, Any]]:
    config = export_dir / REPOSITORY / name / "config.pbtxt"
    if not config.is_file():
        return {}
    return {f"{name}/config.pbtxt": {"sha256": hash_file(config), "bytes": config.stat().st_size}}


def read_export(export_dir: Path, version: str | None = None) -> dict[str, Any]:
    """The manifest of one version (the newest by default); "files" has those of the version and config.pbtxt.

    Raises UserError when there is no export or no such version, or one of its files changed, is missing or
    was added.
    """
    index = read_index(export_dir)
    if index is None:
        raise UserError(
            f"{export_dir}: is not an export (no {MANIFEST})\n    make one with `posttrain export`"
        )
    chosen = version or str(index["version"])
    if chosen not in index["versions"]:
        raise UserError(
            f"{export_dir}: has no version {chosen}; its versions are {', '.join(index['versions'])}"
        )
    name, manifest = index["name"], index["versions"][chosen]
    listed = {**index["shared"], **manifest["files"]}
    present = _shared_files(export_dir, name) | _version_files(export_dir, name, chosen)
    for path in sorted(listed.keys() | present.keys()):
        if present.get(path) != listed.get(path):
            what = "is missing" if path not in present else "is not what was exported"
            raise UserError(f"{export_dir / REPOSITORY / path}: {what}; export again")
    return {**manifest, "files": listed}


def check_servable(manifest: dict[str, Any]) -> None:
    """Raise UserError when the embedded server has no backend for an export's target."""
    if manifest["target"] not in EMBEDDED_TARGETS:
        raise UserError(
            f"export: the embedded server does not serve the target {manifest['target']}\n"
            f"    export with the target {' or '.join(EMBEDDED_TARGETS)}"
        )


def version_dir(export_dir: Path, manifest: dict[str, Any]) -> Path:
    """Folder of an exported version."""
    return export_dir / REPOSITORY / str(manifest["name"]) / str(manifest["version"])


def weights_dir(export_dir: Path, manifest: dict[str, Any]) -> Path:
    """Folder of the exported weights and tokenizer."""
    return version_dir(export_dir, manifest) / WEIGHTS
