"""How many answers a generation of grpo and rloo samples, and settings under which they could not differ.

TRL raises for some of it as it builds its arguments, naming no field of the YAML; here each problem has the
field, the numbers and settings that would do.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from train.launch import launch_problems, world_size
from train.online_config import GrpoConfig, OnlineConfig

Rule = tuple[str, str, str]
_BOTH = ("steps_per_generation", "generation_batch_size")


def group_rules(config: OnlineConfig) -> list[Rule]:
    """(field of ``trainer:``, what is wrong, the remedy) for groups that TRL refuses or that teach nothing.

    The numbers are those of this process's launcher; without one, of a single process.
    """
    given = _defaults(config) | config.trainer
    found = _identical(given)
    if all(given[name] is not None for name in _BOTH):
        message = f"{given['generation_batch_size']} says again what steps_per_generation says"
        return [*found, ("generation_batch_size", message, "remove one of the two")]
    generations = given["num_generations"]
    if generations is None or generations < 2 or given["per_device_train_batch_size"] < 1:
        return found
    world = 1 if launch_problems("") else world_size()
    step = given["per_device_train_batch_size"] * world
    spelled = f"per_device_train_batch_size {given['per_device_train_batch_size']} x {world} process(es)"
    asked = given["generation_batch_size"]
    if asked is None:
        steps = given["steps_per_generation"] or given["gradient_accumulation_steps"]
        if step * steps % generations:
            found.append(_whole_groups(spelled, world * steps, step * steps, given))
    elif asked % step:
        message = f"{asked} is not a multiple of {spelled} = {step}, the answers of one step"
        found.append(("generation_batch_size", message, f"use a multiple of {step}"))
    elif asked % generations:
        message = f"{asked} is not a multiple of num_generations {generations}, the answers to one prompt"
        several = next(n for n in range(asked, asked + step * generations + 1, step) if n % generations == 0)
        found.append(("generation_batch_size", message, _either(several, asked, generations)))
    return found + _evaluation(given, world)


def _whole_groups(spelled: str, others: int, size: int, given: dict[str, Any]) -> Rule:
    """others: answers of a generation for each one of per_device_train_batch_size."""
    generations, per_device = given["num_generations"], given["per_device_train_batch_size"]
    by = "steps_per_generation" if given["steps_per_generation"] else "gradient_accumulation_steps"
    message = (
        f"{spelled} x {by} {given[by]} = {size} answers a generation, which is not a multiple of "
        f"num_generations {generations}, the answers to one prompt"
    )
    whole = next(n for n in range(per_device, per_device + generations + 1) if n * others % generations == 0)
    return "per_device_train_batch_size", message, _either(whole, size, generations)


def _either(batch: int, size: int, generations: int) -> str:
    """The remedy: a batch of whole groups, or the sizes of group nearest to the one asked for."""
    divisors = [number for number in range(2, size + 1) if size % number == 0]
    near = sorted(sorted(divisors, key=lambda number: abs(number - generations))[:2])
    groups = f", or num_generations {' or '.join(map(str, near))}" if near else ""
    return f"use {batch}{groups}"


def _evaluation(given: dict[str, Any], world: int) -> list[Rule]:
    if given["eval_strategy"] == "no":
        return []
    per_device = given["per_device_eval_batch_size"]
    generations = given["num_generations_eval"] or given["num_generations"]
    if per_device * world % generations == 0:
        return []
    message = (
        f"{per_device} x {world} process(es) is not a multiple of the {generations} answers to one prompt "
        "that an evaluation samples"
    )
    whole = next(n for n in range(per_device, per_device + generations + 1) if n * world % generations == 0)
    return [("per_device_eval_batch_size", message, f"use {whole}, or set num_generations_eval")]


def _identical(given: dict[str, Any]) -> list[Rule]:
    """Groups of one answer, and sampling that gives a prompt the same answer every time."""
    found = []
    same = "all answers to a prompt would be the same, and every advantage 0"
    if given["num_generations"] is not None and given["num_generations"] < 2:
        message = f"{given['num_generations']}: an answer is measured against the others to its prompt"
        found.append(("num_generations", message, "use 2 or more"))
    if given["temperature"] <= 0:
        found.append(("temperature", f"{given['temperature']:g}: {same}", "use more than 0; 1.0 is usual"))
    if given["top_k"] == 1:
        found.append(("top_k", f"1: {same}", "remove it, or use more than 1"))
    if (given["generation_kwargs"] or {}).get("do_sample") is False:
        found.append(("generation_kwargs", f"do_sample false: {same}", "remove it"))
    return found


def _defaults(config: OnlineConfig) -> dict[str, Any]:
    """What TRL and `build_args` take where ``trainer:`` does not say."""
    import trl

    cls = trl.GRPOConfig if isinstance(config, GrpoConfig) else trl.RLOOConfig
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(cls)
        if field.default is not dataclasses.MISSING
    }
    train = config.trainer.get("per_device_train_batch_size")
    return defaults if train is None else defaults | {"per_device_eval_batch_size": train}
