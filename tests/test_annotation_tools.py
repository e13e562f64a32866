"""Exports of Label Studio, Prodigy and doccano: the regions on the context are the answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qadeploy.data.fields import DataOptions
from qadeploy.data.loading import read
from qadeploy.errors import DataError, InputError
from tests.data_for_tests import SKY, answers, classes, found, lines, put


def region(start: int, end: int, text: str | None = None, label: str = "Answer", **more: Any) -> dict[str, Any]:
    value = {"start": start, "end": end, "labels": [label]} | ({} if text is None else {"text": text})
    return {"type": "labels", "from_name": "label", "to_name": "text", "value": value, **more}


def label_studio(*results: Any, text: str = "😀 It sailed.", **data: Any) -> dict[str, Any]:
    return {
        "id": 7,
        "data": {"text": text, "question": "What did it do?", **data},
        "annotations": [{"result": [*results]}],
    }


@pytest.mark.parametrize(
    "results",
    [
        [region(6, 12, "sailed")],
        [region(6, 12)],  # without a text, as by URL
        [region(6, 12, "sailed"), region(0, 4, "What", to_name="question")],
        [region(6, 12, "sailed"), region(0, 4, "What", to_name="asked")],
        [region(6, 12, "sailed"), {"type": "textarea", "value": {"text": ["not sure"]}, "to_name": "text"}],
        [region(6, 12, "sailed"), {"type": "choices", "value": {"choices": ["good"]}, "to_name": "text"}],
    ],
)
def test_label_studio_tasks(tmp_path, results):
    source = put(tmp_path, "tasks.json", json.dumps([label_studio(*results)]))
    assert found(source) == [("7", "😀 It sailed.", "What did it do?", [("sailed", 5)])]
    assert classes(source) == {"utf16": 1}


def test_label_studio_with_several_labels(tmp_path):
    source = put(
        tmp_path, "tasks.json", json.dumps([label_studio(region(6, 12, "sailed"), region(3, 5, "It", "Subject"))])
    )
    with pytest.raises(
        InputError, match="its regions have the labels Answer, Subject: give that of the answers with --label"
    ):
        read(source)
    assert answers(source, DataOptions(label="Answer")) == [[("sailed", 5)]]
    with pytest.raises(InputError, match="no region has the label 'Reply'; the labels found are Answer, Subject"):
        read(source, DataOptions(label="Reply"))


@pytest.mark.parametrize("text", ["s3://bucket/a.txt", "/data/upload/1/a.txt", "https://example.com/a.txt"])
def test_an_address_is_no_context(tmp_path, text):
    with pytest.raises(DataError, match="is an address, not a text: export the tasks with their texts"):
        read(put(tmp_path, "tasks.json", json.dumps([label_studio(region(0, 3, "abc"), text=text)])))


def test_regions_on_the_question_alone_are_no_answer(tmp_path):
    task = label_studio(region(0, 4, "What", to_name="question"))
    with pytest.raises(DataError, match="every region is on the question, none on the context"):
        read(put(tmp_path, "tasks.json", json.dumps([task])))


def test_the_tags_of_hypertext_are_no_context(tmp_path):
    value = {
        "start": "/p[1]/b[1]/text()[1]",
        "end": "/p[1]/b[1]/text()[1]",
        "text": "sailed",
        "hypertextlabels": ["Answer"],
    }
    result = {"type": "hypertextlabels", "to_name": "text", "value": {**value, "globalOffsets": {"start": 3, "end": 9}}}
    task = label_studio(result, text="<p>It <b>sailed</b> &amp; left.</p>")
    assert found(put(tmp_path, "tasks.json", json.dumps([task]))) == [
        ("7", "It sailed & left.", "What did it do?", [("sailed", 3)])
    ]


def test_label_studio_json_min_and_csv(tmp_path):
    regions = [{"start": 6, "end": 12, "text": "sailed", "labels": ["Answer"]}]
    row = {"text": "😀 It sailed.", "question": "What?", "id": 7, "label": regions, "annotator": 1, "annotation_id": 3}
    assert answers(put(tmp_path, "min.json", json.dumps([{**row, "lead_time": 1.5}]))) == [[("sailed", 5)]]
    cell = json.dumps(regions).replace('"', '""')
    text = f'annotation_id,annotator,text,question,label\n3,1,😀 It sailed.,What?,"{cell}"\n'
    assert answers(put(tmp_path, "tasks.csv", text)) == [[("sailed", 5)]]


def test_rows_with_a_written_answer_keep_it(tmp_path):
    text = f"annotation_id,created_at,context,question,answer\n1,now,{SKY},?,blue\n"
    assert answers(put(tmp_path, "written.csv", text)) == [[("blue", 11)]]


def test_several_annotators_of_a_task_are_merged(tmp_path):
    regions = [[{"start": a, "end": b, "labels": ["Answer"]}] for a, b in ((11, 15), (4, 15))]
    rows = [
        {"id": 7, "text": SKY, "question": "?", "label": r, "annotator": n, "annotation_id": n}
        for n, r in enumerate(regions)
    ]
    assert answers(put(tmp_path, "min.json", json.dumps(rows))) == [[("blue", 11), ("sky is blue", 4)]]


def test_label_studio_with_names_in_capitals(tmp_path):
    task = label_studio(region(11, 15, "blue", to_name="t"), region(4, 7, "sky", to_name="t"))
    task["data"] = {"Context": SKY, "Question": "Is it blue?"}
    assert answers(put(tmp_path, "tasks.json", json.dumps([task]))) == [[("blue", 11), ("sky", 4)]]


def test_prodigy_s_answer_is_a_verdict(tmp_path):
    task = {"text": SKY, "question": "?", "spans": [{"start": 11, "end": 15, "label": "ANSWER"}], "_task_hash": 1}
    assert answers(put(tmp_path, "p.jsonl", lines({**task, "answer": "accept"}))) == [[("blue", 11)]]
    source = put(tmp_path, "r.jsonl", lines({**task, "answer": "accept"}, {**task, "answer": "reject"}))
    with pytest.raises(DataError, match="row 2: the annotator's verdict is 'reject'"):
        read(source)


@pytest.mark.parametrize("meta", [True, False])
def test_doccano(tmp_path, meta):
    row = {
        "id": 1,
        "text": SKY,
        "label": [[11, 15, "ANSWER"]],
        **({"meta": {"question": "?"}} if meta else {"question": "?"}),
    }
    assert answers(put(tmp_path, "d.jsonl", lines(row))) == [[("blue", 11)]]
