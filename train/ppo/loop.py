"""The run around the trainer: resume, metrics, samples, held-out evaluations, checkpoints, warnings, an early
end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from posttrain.errors import PosttrainError, RequeueError
from posttrain.preemption import PreemptionFlag, agree
from posttrain.rundir import append_rows, truncate_rows
from posttrain.stage import StageContext
from train.ppo.checkpoint import complete_checkpoints, load_checkpoint, save_checkpoint
from train.ppo.config import PpoStageConfig
from train.ppo.experience import NotFiniteError
from train.ppo.held_out import Best, HeldOutEvaluation
from train.ppo.reporting import Reporter
from train.ppo.trainer import PpoTrainer
from train.ppo.watch import Watch

OFFENDING_BATCH = "offending_batch.pt"


@dataclass
class PpoLoop:
    """One execution of the training loop in a run directory."""

    config: PpoStageConfig
    context: StageContext
    trainer: PpoTrainer
    tokenizer: PreTrainedTokenizerBase
    held_out: HeldOutEvaluation | None

    def __post_init__(self) -> None:
        self.best = Best.of(self.config, self.context.checkpoints)
        self.watch = Watch(
            kl_target=self.config.kl_controller.target, max_new_tokens=self.config.max_new_tokens
        )
        trained = self.trainer.updater.trained
        self.policy = trained["policy"]
        self.parameters = trained["policy"] | trained["value"]

    @property
    def main(self) -> bool:
        return self.trainer.accelerator.is_main_process

    def train(self) -> None:
        """All updates, from the last complete checkpoint on.

        Raises RequeueError after SIGTERM, at the next end of an update and with a checkpoint of it;
        NotFiniteError when something is not finite, with the rollout saved.
        """
        config, trainer = self.config, self.trainer
        self._resume()
        reporter = Reporter(
            config.report_to if self.main else [],
            self.context.run_dir,
            self.context.run_dir.name,
            config.model_dump(mode="json"),
        )
        reporter.begin(config.num_updates, trainer.step)
        try:
            with PreemptionFlag() as flag, self.context.progress("ppo", total=config.num_updates) as bar:
                bar.advance(trainer.step)
                while trainer.step < config.num_updates:
                    metrics = self._update()
                    self._record(metrics, reporter)
                    bar.update(text=_headline(metrics))
                    bar.advance()
                    last = trainer.step == config.num_updates
                    stop = agree(flag.requested, self._sum)
                    if stop or (not last and trainer.step % config.save_every == 0):
                        self._save()
                    if stop:
                        raise RequeueError(f"update {trainer.step} of {config.num_updates}")
        finally:
            reporter.end()
        self._choose()

    def _sum(self, number: int) -> int:
        return int(self.trainer.reduce(torch.tensor(number, device=self.trainer.accelerator.device)))

    def _update(self) -> dict[str, float]:
        try:
            metrics = self.trainer.run_update()
            if self.held_out is not None and self._evaluates():
                metrics |= self.held_out()
                if self.best.offer(self.trainer.step, metrics) and self.main and self.config.keep == "best":
                    self.best.save(self.policy)
        except NotFiniteError as error:
            raise PosttrainError(f"{error}\n    {self._save_offender(error.step)}") from error
        return metrics

    def _evaluates(self) -> bool:
        """Whether the update just made is followed by a held-out evaluation."""
        assert self.config.held_out is not None
        step = self.trainer.step
        return step % self.config.held_out.every == 0 or step == self.config.num_updates

    def _record(self, metrics: dict[str, float], reporter: Reporter) -> None:
        if not self.main:
            return
        step = self.trainer.step
        self.context.log(step, **metrics)
        reporter.log(step, metrics)
        for warning in self.watch.observe(step, metrics):
            self.context.console.print(f"[yellow]warning[/yellow] ppo update {step}: {warning.message}")
            append_rows(
                self.context.run_dir / "warnings.jsonl",
                [{"step": step, "kind": warning.kind, "message": warning.message}],
            )
        if step % self.config.log_samples_every == 0 or step == self.config.num_updates:
            append_rows(self.context.run_dir / "samples.jsonl", self._sample_rows())

    def _resume(self) -> None:
        trainer, run_dir = self.trainer, self.context.run_dir
        checkpoints = complete_checkpoints(self.context.checkpoints)
        if checkpoints:
            state = load_checkpoint(checkpoints[-1], self.parameters, trainer.accelerator)
            trainer.load_state_dict(state["trainer"])
            self.best.load_state_dict(state["best"])
            if self.main:
                self.best.recall(checkpoints[-1].path)
            self.context.console.print(
                f"ppo: resuming after update {trainer.step} of {self.config.num_updates}"
            )
        if self.main:
            self.context.rewind(trainer.step)
            for name in ("samples.jsonl", "warnings.jsonl"):
                truncate_rows(run_dir / name, trainer.step)
            (run_dir / OFFENDING_BATCH).unlink(missing_ok=True)
        self.watch.replay(self.context.metrics())

    def _save(self) -> None:
        save_checkpoint(
            self.context.checkpoints,
            self.trainer.step,
            self.parameters,
            {"trainer": self.trainer.state_dict(), "best": self.best.state_dict()},
            self.trainer.accelerator,
            self.config.save_total_limit,
            self.best.files,
        )

    def _choose(self) -> None:
        """With `keep: best`, put the best policy's weights back."""
        if self.config.keep == "last":
            return
        if self.best.score is None:
            self.context.console.print(
                f"[yellow]warning[/yellow] ppo: no held-out evaluation had a KL under {self.best.max_kl}; "
                "the last policy is kept. Raise held_out.max_kl or kl_coef."
            )
            return
        self.trainer.accelerator.wait_for_everyone()
        self.best.restore(self.policy)
        self.context.console.print(
            f"ppo: keeping the policy of update {self.best.step}, held-out score {self.best.score:.3f}"
        )

    def _save_offender(self, step: int) -> str:
        process = "" if self.main else f"{self.trainer.accelerator.process_index}-"
        file = self.context.run_dir / f"{process}{OFFENDING_BATCH}"
        torch.save({"update": step, **self.trainer.last_rollout()}, file)
        return f"the rollout (prompts, responses, scores) is in {file}"

    def _sample_rows(self) -> list[dict[str, Any]]:
        """The last rollout's first few responses, special tokens kept."""
        decode = self.tokenizer.decode
        return [
            {
                "step": self.trainer.step,
                "prompt": decode(sample.prompt, skip_special_tokens=False),
                "response": decode(sample.response, skip_special_tokens=False),
                "score": sample.score,
                "kl": sample.kl,
                "finished": sample.finished,
                "tokens": len(sample.response),
            }
            for sample in self.trainer.samples
        ]


def _headline(metrics: dict[str, float]) -> str:
    text = f"score {metrics['score']:.2f}  KL {metrics['kl']:.2f}"
    return text + (f"  gold {metrics['reward/gold']:.2f}" if "reward/gold" in metrics else "")
