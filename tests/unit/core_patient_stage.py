"""A stage that can be sent SIGTERM at a known moment, and a command line that knows it.

`python -m core_patient_stage run pipe.yaml` is `posttrain run pipe.yaml` with the stage kind `patient`. In
step PAUSE_AT (environment) it says so on stdout and waits for a line on stdin, as a slow update would.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from pydantic import Field

from posttrain.config import StageConfig
from posttrain.context import StageContext
from posttrain.errors import RequeueError
from posttrain.preemption import PreemptionFlag, agree


class PatientConfig(StageConfig):
    steps: int = Field(4, ge=1, description="How many steps.")


def run(config: PatientConfig, context: StageContext) -> dict[str, Any]:
    state = context.checkpoints / "state.json"
    context.checkpoints.mkdir(exist_ok=True)
    start = json.loads(state.read_text())["step"] if state.is_file() else 0
    context.rewind(start)
    with PreemptionFlag() as flag, context.phase("train"):
        for step in range(start + 1, config.steps + 1):
            if step == int(os.environ.get("PAUSE_AT", "0")):
                print(f"in step {step}", flush=True)
                sys.stdin.readline()
            context.log(step, loss=1.0 / step)
            if agree(flag.requested, lambda value: value):
                state.write_text(json.dumps({"step": step}))
                raise RequeueError(f"step {step} of {config.steps}")
    (context.run_dir / "value.txt").write_text(f"{config.steps}\n")
    return {"resumed_from": start}


if __name__ == "__main__":
    from posttrain import cli, registry

    registry.STAGES["patient"] = registry.StageSpec(
        "patient", "core_patient_stage:PatientConfig", "core_patient_stage:run", None, 1, "Waits."
    )
    cli.main()
