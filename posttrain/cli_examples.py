"""Examples for the help of the stages' commands."""

from __future__ import annotations

EXAMPLES = {
    "curate": "kind=conversation 'sources=[{path: data/*.jsonl}]'",
    "base": "data=runs/tiny/corpus steps=300",
    "pretrain": "model=runs/tiny/base data=runs/my-texts trainer.max_steps=100",
    "sft": "model=runs/tiny/base data=runs/tiny/demos trainer.max_steps=100",
    "reward": "model=runs/tiny/sft-merged data=runs/tiny/prefs",
    "dpo": "model=runs/tiny/sft-merged data=runs/tiny/prefs trainer.beta=0.2",
    "kto": "model=runs/tiny/sft-merged data=runs/tiny/prefs trainer.beta=0.2",
    "orpo": "model=runs/tiny/base data=runs/tiny/prefs trainer.max_steps=100",
    "cpo": "model=runs/tiny/sft-merged data=runs/tiny/prefs trainer.loss_type=simpo",
    "grpo": "model=runs/tiny/sft-merged reward=runs/tiny/reward data=runs/tiny/prompts "
    "max_prompt_tokens=160 trainer.max_completion_length=64",
    "rloo": "model=runs/tiny/sft-merged reward=runs/tiny/reward data=runs/tiny/prompts "
    "max_prompt_tokens=160 trainer.max_completion_length=64",
    "ppo": "my-ppo.yaml kl_coef=0.1",
    "synthesize": "kind=preference model=runs/tiny/sft-merged data=runs/tiny/prompts reward=runs/tiny/reward "
    "max_prompt_tokens=160 max_new_tokens=64",
    "eval": "models.sft=runs/tiny/sft-merged prompts=runs/tiny/prompts",
    "judge": "'answers=[{run: runs/tiny/eval}]' 'judges={gold: {kind: gold}}'",
    "benchmark": "'targets={sft: {kind: model, model: runs/tiny/sft-merged}}' "
    "'tasks={ppl: {kind: perplexity, dataset: runs/tiny/demos}}'",
    "merge": "model=runs/tiny/sft",
    "export": "model=runs/tiny/sft-merged",
}
"""Arguments of each stage's command for its help: settings as they are typed, or a file of one's own.

`serve` is also more than a stage, and has a command of its own.
"""
