# SPDX-License-Identifier: Apache-2.0
"""result.json seals the run: the sha256 of every other file, what made them, and the sha256 of itself.

    files        {"config.json": sha256, ...}
    made_with    version and commit of dmole, backend of the kernels; as in environment.json
    model        the sha256 of model/dmole.json, which holds those of the model's other files
    sha256       of everything in result.json but this line

Results from before there were seals have none of these and are verified without.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from dmole.files import JSON, file_digest, sealed_digest
from dmole.reports.differences import Difference, Verification, expect, expect_tree
from dmole.reports.stored import StoredRun, read_json

SEALED = (
    "config.json",
    "environment.json",
    "losses.csv",
    "matrix.csv",
    "predictions.jsonl.gz",
    "references.jsonl.gz",
)


def made_with(environment: Mapping[str, JSON]) -> dict[str, JSON]:
    """What computed the numbers last: that of the last resume in environment.json."""
    last = {**environment, **(environment.get("resumes") or [{}])[-1]}
    return {"version": last["packages"]["dmole"], "commit": last["commit"], "kernels": last["kernels"]}


def sealed(folder: Path, result: Mapping[str, JSON]) -> dict[str, JSON]:
    """`result` with the seals of the files in `folder`."""
    environment = read_json(folder / "environment.json")
    files = {name: file_digest(folder / name) for name in SEALED}
    # As it will be read: a key that is a number becomes text, which sorts elsewhere.
    body = json.loads(json.dumps({**result, "made_with": made_with(environment), "files": files}))
    return {**body, "sha256": sealed_digest(body)}


def verify_seals(run: StoredRun, file: str, report: Verification) -> None:
    """Compare the seals of a run with what lies in its folder. `file`: the name of its result.json in the report."""
    result, parent = run.result, file.rpartition("/")[0]
    config, environment = (read_json(run.folder / name) for name in ("config.json", "environment.json"))
    _verify_settings(config, environment, parent, report)
    if "files" not in result:
        return
    body = {key: value for key, value in result.items() if key != "sha256"}
    expect(report, file, "sha256", result.get("sha256"), sealed_digest(body))
    expect(report, file, "fingerprint", result.get("fingerprint"), config.get("fingerprint"))
    for name in SEALED:
        expect(report, f"{parent}/{name}", "sha256", file_digest(run.folder / name), result["files"].get(name))
    expect_tree(report, file, "made_with", result.get("made_with"), made_with(environment))
    if result.get("model") is not None:
        _verify_model(run, f"{parent}/model", report)


def _verify_settings(
    config: Mapping[str, JSON], environment: Mapping[str, JSON], parent: str, report: Verification
) -> None:
    """The readable settings are those of the identity, from which the fingerprint is made."""
    identity, readable = config.get("identity") or {}, config.get("config") or {}
    # The identity's "stream" is the digest of the data, the readable one its name.
    for key in sorted((identity.keys() & readable.keys()) - {"stream"}):
        _expect_same(report, f"{parent}/config.json", f"config.{key}", readable[key], identity[key])
    method = identity.get("method")
    if "options" in identity and method in readable:
        _expect_same(report, f"{parent}/config.json", f"config.{method}", readable[method], identity["options"])
    for key, stored in (("base_weights_sha256", "base_weights"), ("threads", "threads"), ("processes", "processes")):
        if key in environment and stored in identity:
            expect(report, f"{parent}/environment.json", key, environment[key], identity[stored])


def _expect_same(report: Verification, file: str, name: str, readable: JSON, identity: JSON) -> None:
    """The identity leaves out what decides no number; what it has, the readable settings have too."""
    if isinstance(readable, dict) and isinstance(identity, dict):
        for key in identity:
            _expect_same(report, file, f"{name}.{key}", readable.get(key), identity[key])
        return
    expect(report, file, name, readable, identity)


def _verify_model(run: StoredRun, file: str, report: Verification) -> None:
    """`model/` is whole, and is what the run left or was made of that by `forget`."""
    from dmole.grown.saved import SavedModelError, read_document  # imports torch, which no number needs
    from dmole.grown.saved import read as read_model

    folder = run.folder / "model"
    if not folder.exists():
        report.without_model += 1
        return
    try:
        saved, document = read_model(folder), read_document(folder)
    except SavedModelError as error:
        report.differences.append(Difference(file=file, cell="reading", stored=str(error), recomputed="a saved model"))
        return
    cell = "sha256" if saved.origin is None else "origin"
    expect(report, f"{file}/dmole.json", cell, saved.origin or saved.digest, run.result["model"])
    expect(report, f"{file}/dmole.json", "method", saved.method, run.method)
    if saved.origin is None:
        expect_tree(report, f"{file}/dmole.json", "report", document["report"], run.result.get("method"))
