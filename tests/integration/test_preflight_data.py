"""The preflight and the data: one broken data set or template a test. Exit code 2; key, value and remedy in
the message; nothing written. What is only odd is a warning.
"""

from __future__ import annotations

import json
from typing import Any

TURN = "{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"


def test_empty_train_split(refused, tiny_model_dir, dataset, make_rows):
    data = dataset("conversation", [], make_rows["conversation"](4, 0))
    refused(
        "sft",
        "data",
        f"{data}/train.parquet: has no rows",
        "curate it again",
        model=tiny_model_dir,
        data=data,
    )


def test_dialogues_that_are_all_the_same(refused, tiny_model_dir, dataset, make_rows):
    data = dataset("conversation", make_rows["conversation"](1, 0) * 12)
    said = ("all 12 dialogues are the same", "curate demonstrations that differ")
    refused("sft", "data", *said, model=tiny_model_dir, data=data)


def without_answers(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    for row in rows[:count]:
        row["messages"] = [{"role": "user", "content": f"Hello, {row['id']}?"}]
    return rows


def test_dialogues_without_a_supervised_token(refused, tiny_model_dir, dataset, make_rows):
    data = dataset(
        "conversation", without_answers(make_rows["conversation"](50, 0), 2), make_rows["conversation"](4, 1)
    )
    said = (
        "2 of 50 dialogues (4.0%)",
        "conversation-0, conversation-1",
        "up to 1%",
        "Drop them in the curate stage",
    )
    refused("sft", "data", *said, model=tiny_model_dir, data=data)


def test_few_dialogues_without_a_supervised_token_are_a_warning(warned, tiny_model_dir, dataset, make_rows):
    data = dataset(
        "conversation", without_answers(make_rows["conversation"](101, 0), 1), make_rows["conversation"](4, 1)
    )
    warned("sft", "warning: ", "1 of 101 dialogues (1.0%) have no token", model=tiny_model_dir, data=data)


def test_end_of_turn_that_carries_no_loss(refused, variant, conversation_data):
    model = variant(TURN, "{{- message['content'] -}}{%- endgeneration -%}{{- '<|im_end|>' -}}")
    said = ("48 of 48 dialogues (100.0%) give the end-of-turn token <|im_end|> no loss", "Put it inside")
    refused("sft", "data", *said, model=model, data=conversation_data)


def test_end_of_turn_that_is_another_token(refused, variant, conversation_data):
    model = variant("'<|im_end|>' -}}{%- endgeneration", "'<|im_start|>' -}}{%- endgeneration")
    said = ("give the end-of-turn token <|im_end|> no loss", "make that one the tokenizer's eos_token")
    refused("sft", "data", *said, model=model, data=conversation_data)


def test_doubled_bos(refused, variant, conversation_data):
    model = variant("{%- for message", "{{- bos_token -}}{%- for message", bos_token="<|im_start|>")
    said = ("48 of 48 rows (100.0%) begin with <|im_start|><|im_start|>", "write bos_token once")
    refused("sft", "model", *said, model=model, data=conversation_data)


def test_doubled_bos_before_chosen_and_rejected(refused, variant, preference_data):
    model = variant("{%- for message", "{{- bos_token -}}{%- for message", bos_token="<|im_start|>")
    said = ("48 of 48 rows (100.0%) begin with <|im_start|><|im_start|>", "write bos_token once")
    refused("dpo", "model", *said, model=model, data=preference_data)


def test_bos_that_the_tokenizer_would_add_again_is_a_warning(warned, variant, conversation_data):
    model = variant(bos_token="<|im_start|>")
    fast = json.loads((model / "tokenizer.json").read_text())
    fast["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    (model / "tokenizer.json").write_text(json.dumps(fast))
    warned(
        "sft", "the tokenizer adds it too", "add_special_tokens=False", model=model, data=conversation_data
    )


def test_pad_token_that_is_the_end_token(refused, variant, conversation_data):
    model = variant(pad_token="<|im_end|>")
    said = ("the pad token is the end-of-sequence token (<|im_end|>)", "set it in the tokenizer")
    refused("sft", "model", *said, model=model, data=conversation_data)


def test_missing_pad_token(refused, variant, preference_data):
    model = variant(pad_token=None)
    said = ("the tokenizer has no pad token", "it must differ from eos")
    refused("reward", "model", *said, model=model, data=preference_data)


def test_template_without_generation_markers(refused, variant, conversation_data):
    model = variant(
        "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}",
        "{{- message['content'] + '<|im_end|>' -}}",
    )
    said = ("true: ", "has no such markers", "or set trainer.assistant_only_loss=false")
    refused("sft", "trainer.assistant_only_loss", *said, model=model, data=conversation_data)


def test_template_that_refuses_a_role(refused, variant, conversation_data):
    old = "{%- for message in messages -%}"
    new = (
        old + "{%- if message['role'] == 'system' -%}{{- raise_exception('no system turns') -}}{%- endif -%}"
    )
    said = ("refuses a row (no system turns)", "drop such rows in the curate stage")
    refused("sft", "data", *said, model=variant(old, new), data=conversation_data)


def test_length_that_cuts_answers(refused, tiny_model_dir, conversation_data):
    said = (
        "have their answer cut at trainer.max_length=80",
        "of 48 dialogues (",
        "raise trainer.max_length (the longest",
    )
    fields = {"model": tiny_model_dir, "data": conversation_data, "trainer": {"max_length": 80}}
    refused("sft", "trainer.max_length", *said, **fields)


def test_length_that_cuts_few_answers_is_a_warning(warned, tiny_model_dir, dataset, make_rows):
    long = make_rows["conversation"](20, 0)
    long[3]["messages"][-1]["content"] += " Thank you." * 60
    data = dataset("conversation", long)
    warned(
        "sft", "warning: ", "1 of 20 dialogues (5.0%) have their answer cut", model=tiny_model_dir, data=data
    )


def test_length_that_leaves_nothing_to_learn_from(refused, tiny_model_dir, conversation_data):
    said = (
        "48 of 48 dialogues (100.0%) keep no token to learn from at trainer.max_length=4",
        "raise trainer.max_length",
    )
    fields = {"model": tiny_model_dir, "data": conversation_data, "trainer": {"max_length": 4}}
    refused("sft", "trainer.max_length", *said, **fields)


def test_length_beyond_the_models_positions(refused, tiny_model_dir, conversation_data):
    said = ("trainer.max_length is 512, the model has 256 positions", "lower it")
    fields = {"model": tiny_model_dir, "data": conversation_data, "trainer": {"max_length": 512}}
    refused("sft", "trainer.max_length", *said, **fields)


def test_pairs_identical_after_rendering(refused, variant, dataset, make_rows):
    pairs = make_rows["preference"](8, 0)
    answer = pairs[3]["chosen"][0]["content"]
    pairs[3]["rejected"] = [{"role": "assistant", "content": f"  {answer} "}]
    model = variant(
        "{{- message['content'] + '<|im_end|>' -}}{%- endgen",
        "{{- message['content'] | trim + '<|im_end|>' -}}{%- endgen",
    )
    said = ("1 of 8 pairs (12.5%) have chosen equal to rejected once rendered", "preference-3", "Drop them")
    refused("reward", "data", *said, model=model, data=dataset("preference", pairs))


def test_pairs_that_are_all_the_same(refused, tiny_model_dir, dataset, make_rows):
    data = dataset("preference", make_rows["preference"](1, 0) * 8)
    refused(
        "dpo", "data", "all 8 pairs are the same", "curate pairs that differ", model=tiny_model_dir, data=data
    )


def test_pairs_that_are_there_both_ways_round(refused, tiny_model_dir, dataset, make_rows):
    pairs = make_rows["preference"](6, 0)
    mirrored = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs]
    said = ("each of 12 pairs is there with its sides swapped too", "keep one label of each pair")
    refused("reward", "data", *said, model=tiny_model_dir, data=dataset("preference", pairs + mirrored))


def test_prompt_that_is_rendered_otherwise_before_an_answer(refused, variant, preference_data):
    model = variant("'\\n<|im_start|>assistant\\n'", "'\\n<|im_start|>assistant: '")
    said = (
        "48 of 48 pairs (100.0%) have a prompt whose tokens",
        "use a chat template whose generation prompt",
    )
    refused("dpo", "model", *said, model=model, data=preference_data)


def test_template_that_goes_on_after_the_end_of_turn(refused, variant, preference_data):
    model = variant("{%- endfor -%}", "{{- 'Bye.' -}}{%- endfor -%}")
    said = ("48 of 48 dialogues (100.0%) do not end with <|im_end|> once rendered", "only white space may")
    refused("reward", "model", *said, model=model, data=preference_data)


def test_pairs_that_are_too_long(refused, tiny_model_dir, preference_data):
    said = ("48 of 48 pairs (100.0%) are longer than trainer.max_length=16", "raise trainer.max_length")
    fields = {"model": tiny_model_dir, "data": preference_data, "trainer": {"max_length": 16}}
    refused("dpo", "trainer.max_length", *said, **fields)


def test_chosen_that_is_nearly_always_longer_is_a_warning(warned, tiny_model_dir, preference_data):
    said = ("chosen is the longer side in 48 of 48 pairs of unequal length (100.0%)", "balance the lengths")
    error = warned("reward", *said, model=tiny_model_dir, data=preference_data)
    assert "rejected is the same text in 48 of 48 pairs (100.0%): 'assistant: No." in error


def test_margins_that_the_pairs_do_not_have(refused, tiny_model_dir, preference_data):
    fields = {"model": tiny_model_dir, "data": preference_data, "margin": "gap"}
    refused("reward", "margin", "have no finite number under `gap`", "meta_columns: [gap]", **fields)


def test_more_folds_than_groups(refused, tiny_model_dir, dataset, make_rows):
    pairs = [row | {"group": "all"} for row in make_rows["preference"](8, 0)]
    fields = {"model": tiny_model_dir, "data": dataset("preference", pairs), "folds": 4}
    refused("reward", "folds", "4 folds need as many groups, the data has 1", "lower `folds`", **fields)


def test_calibration_data_of_another_kind(refused, tiny_model_dir, preference_data, prompt_data):
    said = (
        "holds prompt rows, but conversation rows are needed here",
        "curate the sources with `kind: conversation`",
    )
    fields = {"model": tiny_model_dir, "data": preference_data, "calibration_data": prompt_data}
    refused("reward", "calibration_data", *said, **fields)
