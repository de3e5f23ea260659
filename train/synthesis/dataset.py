"""The dataset directory of a synthesize run, as curate writes one: rows, ledger, lineage, card, report."""

from __future__ import annotations

import html
import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.card import card_markdown
from data_prep.dataset import DATASET_FILES, SPLITS, Split, columns, content_hash, to_row, write_split
from data_prep.figures import Figures, length_summary
from data_prep.ingest import Reject
from data_prep.page import report_html, sample_places
from data_prep.records import ConversationRecord, InvalidRecord, Message, PreferenceRecord, Record, excerpt
from posttrain.errors import DataError
from posttrain.rundir import STAGING_PREFIX
from train.synthesis.config import SynthesizeConfig
from train.synthesis.selection import (
    Answer,
    Answered,
    Dropped,
    Usable,
    choose_demonstrations,
    choose_pairs,
    scored,
    usable,
)
from train.synthesis.summary import ANSWERS_FILE, lineage_lines, spread


@dataclass
class Selected:
    """What is written: rows by side, prompts that gave none and why, answers that were left out by reason,
    margins of the pairs. several: rows beyond the first of a prompt."""

    rows: dict[Split, list[dict[str, Any]]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    dropped: list[Reject] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    margins: list[float] = field(default_factory=list)
    several: int = 0


def select(config: SynthesizeConfig, prompts: Sequence[Answered], too_long: Sequence[Reject]) -> Selected:
    """The rows that the configuration asks for, in the order of the prompts.

    Raises DataError when a side has no row.
    """
    selected = Selected(dropped=list(too_long))
    for prompt in prompts:
        found = usable(prompt.answers, truncated=config.truncated)
        selected.left_out += found.left_out
        records = _records(config, prompt, found, selected)
        if isinstance(records, Dropped):
            text = excerpt(prompt.row["prompt"][-1]["content"])
            file = f"{prompt.split}.parquet"
            selected.dropped.append(Reject(file, prompt.line, records.reason, records.detail, text))
            continue
        selected.several += len(records) - 1
        selected.rows[prompt.split] += [to_row(record) for record in records]
    for split in SPLITS:
        if not selected.rows[split]:
            counts = Counter(drop.reason for drop in selected.dropped if drop.file == f"{split}.parquet")
            reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
            raise DataError(
                f"no {config.kind} row is left on the {split} side ({reasons or 'no prompts'})\n"
                "    sample more answers (n) or more varied ones (temperature), raise max_new_tokens, give "
                "more prompts, or ask less of the scores"
            )
    return selected


def _records(
    config: SynthesizeConfig, prompt: Answered, found: Usable, selected: Selected
) -> list[Record] | Dropped:
    """The rows of one prompt, or why there is none."""
    key = f"{prompt.split}/{prompt.row['id']}"
    try:
        if config.kind == "preference":
            pairs = choose_pairs(found, config.preference, config.seed, key)
            if isinstance(pairs, Dropped):
                return pairs
            records: list[Record] = [_pair(prompt.row, chosen, rejected) for chosen, rejected in pairs]
            selected.margins += [scored(chosen) - scored(rejected) for chosen, rejected in pairs]
            return records
        answers = choose_demonstrations(found, config.conversation)
        return answers if isinstance(answers, Dropped) else [_demo(prompt.row, one) for one in answers]
    except InvalidRecord as error:
        return Dropped(error.reason, str(error))


def _turns(row: Mapping[str, Any]) -> tuple[Message, ...]:
    return tuple(Message(turn["role"], turn["content"]) for turn in row["prompt"])


def _said(answer: Answer) -> Message:
    return Message("assistant", answer.text)


def _common(row: Mapping[str, Any], name: str, extra: Mapping[str, Any]) -> dict[str, str]:
    meta = {**json.loads(row["meta"] or "{}"), **extra}
    return {
        "id": f"{row['id']}-{name}",
        "source": row["source"],
        "group": row["group"],
        "meta": json.dumps(meta, ensure_ascii=False),
    }


def _pair(row: Mapping[str, Any], chosen: Answer, rejected: Answer) -> PreferenceRecord:
    """meta: the prompt's, and `margin`, which the reward stage reads with `margin: margin`."""
    extra: dict[str, Any] = {
        "margin": scored(chosen) - scored(rejected),
        "score_chosen": chosen.score,
        "score_rejected": rejected.score,
    }
    if not (chosen.finished and rejected.finished):
        extra["truncated"] = True
    name = f"{chosen.sample}-{rejected.sample}"
    return PreferenceRecord(
        prompt=_turns(row),
        chosen=(_said(chosen),),
        rejected=(_said(rejected),),
        **_common(row, name, extra),
    )


def _demo(row: Mapping[str, Any], answer: Answer) -> ConversationRecord:
    """meta: the prompt's, and `score`."""
    extra: dict[str, Any] = {"score": answer.score} | ({} if answer.finished else {"truncated": True})
    return ConversationRecord(
        messages=(*_turns(row), _said(answer)), **_common(row, str(answer.sample), extra)
    )


def describe(
    config: SynthesizeConfig,
    selected: Selected,
    figures: Figures,
    prompts_in: int,
    source: Mapping[str, Any],
    split: Mapping[str, Any],
    synthesis: Mapping[str, Any],
) -> dict[str, Any]:
    """What dataset.json says: that of a curate run, and `synthesis`. rows_in are prompts:
    rows_in + rows_repeated = rows_out + drops.

    figures: of the selected rows. source: name, rows and sha256 of the prompts. split: how they were divided.
    """
    rows = selected.rows
    counts = {side: len(rows[side]) for side in SPLITS}
    drops = dict(sorted(Counter(drop.reason for drop in selected.dropped).items()))
    assert prompts_in + selected.several == sum(counts.values()) + sum(drops.values())
    groups = {side: len({row["group"] for row in rows[side]}) for side in SPLITS}
    return {
        "schema_version": 1,
        "kind": config.kind,
        "rows_in": prompts_in,
        "rows_repeated": selected.several,
        "rows_out": counts,
        "drops": drops,
        "sources": [{"format": "prompts", **source}],
        "last_user_turns": None,
        "dedup": True,
        "filters": {"min_chars": None, "max_chars": None},
        "split": {**split, "groups": groups},
        "columns": columns(config.kind),
        "lengths": length_summary(figures),
        "synthesis": {
            **synthesis,
            "selection": selection_settings(config),
            "answers_left_out": dict(sorted(selected.left_out.items())),
            "margins": spread(selected.margins),
        },
        "content_hash": content_hash(rows),
    }


def selection_settings(config: SynthesizeConfig) -> dict[str, Any]:
    """The settings that select."""
    block = config.preference if config.kind == "preference" else config.conversation
    return {"truncated": config.truncated, **block.model_dump()}


def write_directory(
    directory: Path,
    info: Mapping[str, Any],
    selected: Selected,
    figures: Figures,
    prompts: Sequence[Answered],
) -> None:
    """Write DATASET_FILES and answers.jsonl: first all aside, then renamed into place, dataset.json last."""
    lines = lineage_lines(info["synthesis"])
    train = selected.rows["train"]
    page = report_html(
        info,
        figures,
        [train[place] for place in sample_places(len(train))],
        {drop.reason: drop for drop in reversed(selected.dropped)},
        Counter(drop.reason for drop in selected.dropped),
    )
    text = "\n".join(lines)
    section = f"<pre>{html.escape(text)}</pre>"
    rejects = (json.dumps(asdict(drop), ensure_ascii=False) + "\n" for drop in selected.dropped)
    answers = (json.dumps(prompt.as_json(), ensure_ascii=False) + "\n" for prompt in prompts)
    texts = {
        ANSWERS_FILE: "".join(answers),
        "rejects.jsonl": "".join(rejects),
        "card.md": card_markdown(dict(info)) + text,
        "report.html": page.replace("</body>", f"{section}\n</body>", 1),
        "dataset.json": json.dumps(info, indent=2, ensure_ascii=False) + "\n",
    }
    with tempfile.TemporaryDirectory(dir=directory, prefix=STAGING_PREFIX) as name:
        staging = Path(name)
        for split in SPLITS:
            write_split(staging / f"{split}.parquet", info["kind"], selected.rows[split])
        for file, content in texts.items():
            (staging / file).write_text(content, encoding="utf-8")
        for file in (ANSWERS_FILE, *DATASET_FILES):
            os.replace(staging / file, directory / file)
