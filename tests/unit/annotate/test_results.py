"""From votes to results: the report, preferences for training, other tools."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from annotation_study import MODELS, World, answers, make_world, run, vote_all, write_rows

from data_prep.dataset import read_split
from eval.agreement import cohen_kappa, fleiss_kappa, krippendorff_alpha
from eval.annotate import exchange, returned, votes
from eval.annotate.database import Database
from eval.annotate.export import export, preferences
from eval.annotate.quality import LABELS, report
from eval.annotate.store import Study, create_study, open_study
from eval.annotate.study import load_items
from eval.annotate.text import as_text
from posttrain.errors import DataError


@pytest.fixture
def voted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Three annotators on six items and two gold checks, which come first."""
    keyed = Study.keyed
    monkeypatch.setattr(
        Study,
        "keyed",
        lambda self, purpose, *parts: "0" * 64 if purpose == "gold" else keyed(self, purpose, *parts),
    )
    gold = [{**answers(100 + n), "gold": MODELS[1]} for n in range(2)]
    file = write_rows(tmp_path / "gold.jsonl", gold)
    world = make_world(tmp_path, gold=file, gold_share=0.5, overlap=3, criteria=["helpful"])
    right = {f"Question {n}?": "Right" for n in (100, 101)}
    vote_all(world, "ann", right | {"Question 0?": "tie", "Question 1?": "Right"})
    vote_all(world, "bob", right | {"Question 0?": "both_bad"}, 9.0)
    vote_all(world, "carol", {"Question 2?": "Right", "Question 3?": "Right", "Question 0?": "tie"})
    yield world
    world.database.close()


def standing(world: World) -> list[dict[str, Any]]:
    with world.database.reading() as session:
        return votes.standing_votes(session, world.study)


def test_preferences_are_what_the_majority_said(voted: World) -> None:
    found = preferences(standing(voted))
    assert [row["id"] for row in found.rows] == ["q001", "q002", "q003", "q004", "q005"]
    for row in found.rows:
        assert row["chosen"][0]["content"].startswith("Left")
        assert row["models"] == {"chosen": MODELS[0], "rejected": MODELS[1]}
    assert found.rows[0]["votes"] == {"chosen": 2, "rejected": 1, "tie": 0, "both_bad": 0}
    assert found.rows[0]["annotators"] == ["ann", "bob", "carol"]
    kept = sum(row["votes"]["chosen"] for row in found.rows)
    assert kept + sum(found.left_out.values()) == found.counts["votes"]
    assert (found.left_out["tie"], found.left_out["both_bad"], found.left_out["outvoted"]) == (2, 1, 3)
    assert not preferences(standing(voted), min_votes=4).rows


def test_careless_annotators_can_be_left_out(voted: World) -> None:
    gold = [vote for vote in standing(voted) if vote["is_gold"] and vote["annotator"] == "carol"]
    assert gold, "carol had no gold check"
    found = preferences(standing(voted), min_gold_accuracy=0.5)
    assert found.left_out["gold_accuracy"] == 6
    assert {name for row in found.rows for name in row["annotators"]} == {"ann", "bob"}


def test_the_report_says_what_the_statistics_say(voted: World) -> None:
    made = report(voted.database, voted.study)
    rows = [vote for vote in standing(voted) if not vote["is_gold"]]
    label = {(vote["item"], vote["annotator"]): LABELS.index(vote["preferred"]) for vote in rows}
    names, items = ["ann", "bob", "carol"], sorted({vote["item"] for vote in rows})
    table = [[label[item, name] for name in names] for item in items]
    counts = [[row.count(n) for n in range(4)] for row in table]
    agreement = made["agreement"]
    assert agreement["krippendorff"]["value"] == krippendorff_alpha(table).value
    assert agreement["fleiss"]["value"] == fleiss_kappa(counts).value
    pair = agreement["cohen"]["pairs"][0]
    assert pair["annotators"] == ["ann", "bob"]
    assert pair["kappa"]["value"] == cohen_kappa([r[0] for r in table], [r[1] for r in table]).value
    ann, bob, carol = made["annotators"]
    assert (ann["gold"]["value"], carol["gold"]["value"]) == (1.0, 0.0)
    assert (ann["median_seconds"], bob["median_seconds"]) == (5.0, 9.0)
    same = sum(label[i, "ann"] == label[i, other] for i in items for other in ("bob", "carol"))
    assert ann["with_others"] == same / 12
    sided = [vote for vote in standing(voted) if vote["annotator"] == "ann" and vote["choice"] in "ab"]
    assert ann["chose_a"]["n"] == len(sided)
    assert ann["chose_a"]["value"] == sum(vote["choice"] == "a" for vote in sided) / len(sided)
    (models,) = made["models"]
    assert (models["model"], models["wins"], models["ties"], models["losses"]) == (MODELS[0], 12, 3, 3)
    assert {row["item"] for row in made["disagreements"]} == {"q000", "q001", "q002", "q003"}
    divided = {row["item"]: row["annotators"] for row in made["disagreements"]}
    assert divided["q001"] == {"ann": MODELS[1], "bob": MODELS[0], "carol": MODELS[0]}
    assert made["progress"]["votes"] == 18
    text = as_text(made)
    assert "18 of 18 votes, 6 of 6 items complete" in text
    assert "because" not in text


def test_a_report_of_nothing(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    world.person("ann")
    made = report(world.database, world.study)
    assert made["agreement"] == {"cohen": {"mean": None, "pairs": []}, "fleiss": None, "krippendorff": None}
    assert "0 of 6 votes" in as_text(made)
    with pytest.raises(DataError, match="none makes a row"):
        export(world.database, world.study, tmp_path / "prefs.jsonl")


def test_a_data_set_directory_is_what_reward_and_dpo_read(tmp_path: Path) -> None:
    world = make_world(tmp_path, rows=[answers(n) for n in range(30)])
    vote_all(world, "ann", {})
    lineage = export(world.database, world.study, tmp_path / "human")
    rows = [row for split in ("train", "eval") for row in read_split(tmp_path / "human", split, "preference")]
    assert len(rows) == lineage["output"]["rows"] == 30
    assert all(row["source"].startswith("human.jsonl") for row in rows)
    row = next(row for row in rows if row["id"] == "q004")
    assert row["chosen"] == [{"role": "assistant", "content": "Left answer 4."}]
    assert json.loads(row["meta"])["models"] == {"chosen": MODELS[0], "rejected": MODELS[1]}
    saved = json.loads((tmp_path / "human.lineage.json").read_text())
    assert saved == lineage
    assert lineage["source"]["items"]["files"][0]["file"].endswith("samples.jsonl")
    assert os.stat(tmp_path / "human.jsonl").st_mode & 0o077 == 0


def test_single_votes_are_exported_as_they_were_seen(voted: World, tmp_path: Path) -> None:
    database = ["--database", voted.database.url]
    done = run("export", "--votes", str(tmp_path / "votes.jsonl"), *database)
    assert done.exit_code == 0, done.output
    assert "18 votes (gold_check 6)" in done.output
    rows = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines()]
    assert os.stat(tmp_path / "votes.jsonl").st_mode & 0o077 == 0
    assert len({(row["id"], row["annotator"]) for row in rows}) == 18
    kept = {(vote["item"], vote["annotator"]): vote for vote in standing(voted)}
    for row in rows:
        vote = kept[row["id"], row["annotator"]]
        won = {"a": row["model_a"], "b": row["model_b"]}.get(row["choice"], row["choice"])
        models = {"first": vote["first_model"], "second": vote["second_model"]}
        assert won == models.get(vote["preferred"], vote["preferred"])
        # `vote_all` rates what it chooses as A, and comments on what it chooses as B.
        assert row["criteria"] == ({"helpful": "a"} if row["choice"] == "a" else {})
        assert row["comment"] == ("because, äöü" if row["choice"] == "b" else "")
        assert row["seconds"] == (9.0 if row["annotator"] == "bob" else 5.0)
        assert row["time"].endswith("+00:00")
    assert {row["model_a"] for row in rows} == set(MODELS)
    done = run("export", "--votes", str(tmp_path / "few.jsonl"), "--min-gold-accuracy", "0.5", *database)
    assert "12 votes (gold_accuracy 6, gold_check 6)" in done.output
    for arguments in ([], ["--votes", "votes.txt"], ["--votes", "v.jsonl", "--min-votes", "2"]):
        assert run("export", *arguments, *database).exit_code == 2


@pytest.mark.parametrize("tool", ["argilla", "label-studio"])
def test_other_tools_give_back_what_they_got(voted: World, tmp_path: Path, tool: exchange.Tool) -> None:
    file = tmp_path / "rows.json"
    assert exchange.write(voted.database, voted.study, file, tool) == 8
    text = file.read_text()
    assert not any(model in text for model in MODELS)
    other = Database(str(tmp_path / "other.db"))
    study = create_study(other, voted.study.config, load_items(voted.study.config))
    found, left_out = returned.read(file, tool)
    # The first answer of an item is drawn for each study.
    turned = {
        row["name"]
        for row in voted.rows("SELECT name, first_model FROM items")
        if row["first_model"] != first_models(other)[row["name"]]
    }
    swap = {"first": "second", "second": "first"}
    for number, vote in enumerate(found):
        if vote.item in turned:
            found[number] = returned.Returned(
                **{**vars(vote), "preferred": swap.get(vote.preferred, vote.preferred)}
            )
    count = len(standing(voted))
    assert (returned.add(other, study, found), left_out) == ({"added": count}, {})
    assert returned.add(other, study, found) == {"there_already": count}
    names = {f"argilla-{id}": name for name, id in voted.ids.items()}
    again = preferences(votes_of(other))
    for row in again.rows:
        row["annotators"] = sorted(names.get(name, name) for name in row["annotators"])
    assert again.rows == preferences(standing(voted)).rows
    comments = sorted(vote["comment"] for vote in votes_of(other))
    assert comments == sorted(vote["comment"] for vote in standing(voted))
    if tool == "label-studio":
        assert sorted(vote["seconds"] for vote in votes_of(other)) == sorted(
            v["seconds"] for v in standing(voted)
        )
    other.close()


def first_models(database: Database) -> dict[str, str]:
    with database.reading() as session:
        return {row["name"]: row["first_model"] for row in session.run("SELECT name, first_model FROM items")}


def votes_of(database: Database) -> list[dict[str, Any]]:
    study = open_study(database)
    with database.reading() as session:
        return votes.standing_votes(session, study)


def test_label_studio_rows_have_the_documented_keys(voted: World, tmp_path: Path) -> None:
    """labelstud.io/guide/task_format; and the configuration names every control of the results."""
    file = tmp_path / "tasks.json"
    exchange.write(voted.database, voted.study, file, "label-studio")
    tasks = json.loads(file.read_text())
    config = file.with_suffix(".xml").read_text()
    for task in tasks:
        assert {"id", "data", "annotations", "predictions"} == set(task)
        for annotation in task["annotations"]:
            assert {"result", "completed_by", "lead_time", "created_at", "was_cancelled"} <= set(annotation)
            for result in annotation["result"]:
                assert {"id", "from_name", "to_name", "type", "value"} == set(result)
                assert f'name="{result["from_name"]}"' in config
                assert set(result["value"]) == {"text" if result["type"] == "textarea" else result["type"]}
        assert all(f'"${name}"' in config for name in task["data"] if name != "item")


def test_argilla_records_have_the_keys_of_its_sdk(voted: World, tmp_path: Path) -> None:
    """Record.to_dict of argilla 2; responses are lists by question, user_id a UUID."""
    file = tmp_path / "records.json"
    exchange.write(voted.database, voted.study, file, "argilla")
    for record in json.loads(file.read_text()):
        keys = {"id", "fields", "metadata", "suggestions", "responses", "vectors", "_server_id"}
        assert set(record) == keys
        for answers_ in record["responses"].values():
            assert all(
                set(answer) == {"value", "user_id"} and len(answer["user_id"]) == 36 for answer in answers_
            )


def test_foreign_label_studio_rows_are_read(voted: World, tmp_path: Path) -> None:
    """Pairwise results, people by number, and what was cancelled."""
    left = {"type": "pairwise", "from_name": "pw", "to_name": "a,b", "value": {"selected": "left"}}
    rows = [
        {"data": {"item": "q001"}, "annotations": [{"result": [left], "completed_by": 10}]},
        {"data": {"item": "q002"}, "annotations": [{"result": [], "was_cancelled": True}]},
    ]
    file = tmp_path / "foreign.json"
    file.write_text(json.dumps(rows))
    (vote,), left_out = returned.read(file, "label-studio")
    assert (vote.item, vote.annotator, vote.preferred) == ("q001", "label-studio-10", "first")
    assert left_out == {"cancelled": 1}
    assert returned.add(voted.database, voted.study, [vote]) == {"over_overlap": 1}
    stranger = returned.Returned("nowhere", "x", "tie")
    with pytest.raises(DataError, match="has no item 'nowhere'"):
        returned.add(voted.database, voted.study, [stranger])


def test_a_few_pairs_are_divided_as_asked(tmp_path: Path) -> None:
    world = make_world(tmp_path, rows=[answers(n) for n in range(6)])
    vote_all(world, "ann", {})
    few = tmp_path / "few"
    with pytest.raises(DataError, match=r"leaves the eval side empty(.|\n)*--eval-fraction(.|\n)*few\.jsonl"):
        export(world.database, world.study, few, eval_fraction=0.001)
    assert len((tmp_path / "few.jsonl").read_text().splitlines()) == 6
    export(world.database, world.study, few, eval_fraction=0.5)
    assert sum(len(read_split(few, split, "preference")) for split in ("train", "eval")) == 6
