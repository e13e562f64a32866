"""A corpus on the command line, PDF files read in a separate process, and index builders that are killed."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

from qadeploy import Answerer, Corpus
from qadeploy.corpus import building, pdf
from qadeploy.corpus.building import build
from qadeploy.corpus.cutting import cut
from qadeploy.corpus.pdf import pdf_document
from qadeploy.errors import InputError
from tests.cli_for_tests import run
from tests.conftest import triplets
from tests.corpora_for_tests import ENCRYPTED, write_documents
from tests.corpora_for_tests import pdf as make_pdf


@pytest.fixture(scope="module")
def keepers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of texts that the tiny model knows, and an unreadable file."""
    folder = tmp_path_factory.mktemp("keepers")
    for number, row in enumerate(triplets(16)):
        (folder / f"{number}.md").write_text(f"# Room {number}\n\n{row['context']}\n", encoding="utf-8")
    (folder / "scan.pdf").write_bytes(b"no PDF")
    return folder


def test_pages_of_a_pdf_are_places():
    document = pdf_document(make_pdf("Mungo Strand trims the light.", "", "Bela keeps the rope."), "lamps.pdf")
    found = [(document.text[each.start : each.end], each.place) for each in cut(document)]
    assert found == [("Mungo Strand trims the light.", "page 1"), ("Bela keeps the rope.", "page 3")]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a readable PDF: it is damaged"),
        (b"%PDF-1.4\nnothing", "not a readable PDF: it is damaged"),
        (make_pdf("Whole.")[:200], "not a readable PDF: it is damaged"),
        (make_pdf("Secret.", trailer=ENCRYPTED), "encrypted: save it without a password"),
    ],
)
def test_a_pdf_that_cannot_be_read_says_why(content, reason):
    with pytest.raises(InputError, match=rf"^x\.pdf: {reason}"):
        pdf_document(content, "x.pdf")


def test_a_pdf_is_read_where_memory_cannot_be_limited(tmp_path, monkeypatch):
    refuse = "def refuse(kind, limits):\n    if kind == resource.RLIMIT_AS:\n        raise ValueError\n"
    (tmp_path / "sitecustomize.py").write_text(f"import resource\n{refuse}resource.setrlimit = refuse\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert pdf_document(make_pdf("Bela keeps the rope."), "x.pdf").text == "Bela keeps the rope."


def test_a_pdf_of_too_much_text_is_refused(monkeypatch):
    monkeypatch.setenv("QADEPLOY_MAX_UNPACKED_BYTES", "20")
    with pytest.raises(InputError, match="unpacks to more than 20 bytes of text"):
        pdf_document(make_pdf("Twenty-one characters"), "x.pdf")


def test_the_text_of_a_pdf_is_limited_in_bytes(monkeypatch):
    monkeypatch.setenv("QADEPLOY_MAX_UNPACKED_BYTES", "20")
    pdf_document(make_pdf(r"\351" * 10), "x.pdf")  # 10 times Ø, of 2 bytes each
    with pytest.raises(InputError, match="unpacks to more than 20 bytes of text"):
        pdf_document(make_pdf(r"\351" * 11), "x.pdf")


@pytest.mark.parametrize(
    ("script", "seconds", "reason"),
    [
        ("import time; time.sleep(60)", 0.5, "took longer than 0.5 seconds"),
        ("import os; os.abort()", 60, "its reader ended with signal 6"),
        ("raise SystemExit(3)", 60, "its reader ended with exit code 3"),
    ],
)
def test_a_reader_that_hangs_or_crashes_is_the_file_s_problem(script, seconds, reason, tmp_path, monkeypatch):
    child = tmp_path / "child.py"
    child.write_text(script)
    monkeypatch.setattr(pdf, "_CHILD", child)
    monkeypatch.setattr(pdf, "MOST_SECONDS", seconds)
    with pytest.raises(InputError, match=reason):
        pdf_document(make_pdf("Some text."), "x.pdf")


def test_without_a_reader_its_files_are_listed_with_the_pip_line(tmp_path, monkeypatch):
    source = write_documents(tmp_path / "documents")
    (source / "lamps.pdf").write_bytes(make_pdf("Ada."))
    for name in ("lxml", "lxml.etree", "markdown_it", "pypdfium2"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(pdf, "find_spec", lambda name: None)
    built = build(source, tmp_path / "index")
    fix = "which is not installed: pip install 'qadeploy[corpus]'"
    assert {each.path: each.reason for each in built.skipped} == {
        "deep/quay.html": f"reading HTML needs the package lxml, {fix}",
        "lamps.md": f"reading Markdown needs the package markdown-it-py, {fix}",
        "lamps.pdf": f"reading PDF files needs the package pypdfium2, {fix}",
    }
    monkeypatch.undo()
    assert build(source, tmp_path / "index").added == 3


def test_a_kill_at_any_time_leaves_the_old_index_and_no_leftovers(tmp_path):
    source, index = write_documents(tmp_path / "documents"), tmp_path / "index"
    build(source, index)
    (source / "lamps.md").write_text("# Lamps\n\nAda.")
    steps = ("documents_of", "seal", "replace_folder")
    for step in steps:
        pid = os.fork()
        if not pid:
            setattr(building, step, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
            build(source, index)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        assert "Mungo" in Corpus.load(index).search("Who trims the light?")[0].text
    assert build(source, index).changed == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["documents", "index"]
    assert Corpus.load(index).search("trims") == []


def test_of_two_builders_at_once_one_is_refused(tmp_path):
    source, index = write_documents(tmp_path / "documents"), tmp_path / "index"
    begun, pid = tmp_path / "begun", os.fork()
    if not pid:

        def wait(number: int, name: str) -> None:
            if number == 1:
                begun.touch()
                while begun.exists():
                    time.sleep(0.01)

        build(source, index, wait)
        os._exit(0)
    while not begun.exists():
        time.sleep(0.01)
    with pytest.raises(InputError, match=f"another command is writing it .process {pid} "):
        build(source, index)
    begun.unlink()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert build(source, index).up_to_date


def test_questions_are_answered_from_documents_and_from_their_index(bundle, keepers, tmp_path):
    question = ("--question", "Who keeps the lamp?", "--top-k", "1", "--json")
    asked = run("ask", bundle, "--corpus", keepers, *question)
    assert asked.exit_code == 0, asked.output
    assert "not in the corpus: scan.pdf: not a readable PDF" in asked.stderr
    indexed = run("index", keepers, "--out", tmp_path / "index", "--json")
    assert indexed.exit_code == 0, indexed.output
    counts = json.loads(indexed.stdout)
    assert (counts["files"], counts["added"], counts["skipped"][0]["path"]) == (16, 16, "scan.pdf")
    again = run("ask", bundle, "--corpus", tmp_path / "index", *question)
    found, other = json.loads(asked.stdout), json.loads(again.stdout)
    assert found["answers"] == other["answers"]
    (answer,) = found["answers"]
    text = (keepers / answer["document"]).read_text(encoding="utf-8")
    assert text[answer["start"] : answer["end"]] == answer["text"]
    snippet = answer["snippet"]
    assert text[snippet["start"] : snippet["end"]] == snippet["text"]
    assert answer["place"] == f"Room {answer['document'].removesuffix('.md')}"
    assert len(found["passages"]) == 5
    corpus, answerer = Corpus.load(tmp_path / "index"), Answerer.load(bundle)
    assert [each.to_dict() for each in corpus.answer(answerer, "Who keeps the lamp?")] == found["answers"]
    assert corpus.answer(answerer, "xyzzy") == []


def test_answers_for_people_name_document_and_place(bundle, keepers, tmp_path):
    assert run("index", keepers, "--out", tmp_path / "index").exit_code == 0
    shown = run("index", keepers, "--out", tmp_path / "index")
    first, second, reason = shown.stdout.splitlines()
    assert first.endswith("index: 16 files, 16 documents, 16 passages (was up to date)")
    assert (second, reason.split(":")[0]) == ("skipped:", "  scan.pdf")
    asked = run("ask", bundle, "--corpus", tmp_path / "index", "--question", "Who keeps the boat?", "--passages", "2")
    answer, snippet = asked.stdout.splitlines()[:2]
    assert ".md, Room " in answer
    assert snippet.startswith("   # Room ")
    traced = run("ask", bundle, "--corpus", tmp_path / "index", "--question", "Who keeps the boat?", "--trace")
    assert traced.exit_code == 0, traced.output
    nothing = run("ask", bundle, "--corpus", tmp_path / "index", "--question", "xyzzy")
    assert (nothing.exit_code, nothing.stdout) == (0, "no answer: no word of the question occurs in the corpus\n")
    nothing = run("ask", bundle, "--corpus", tmp_path / "index", "--question", "xyzzy", "--json")
    found = json.loads(nothing.stdout)
    assert (found["answers"], found["passages"], [each["path"] for each in found["skipped"]]) == ([], [], ["scan.pdf"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "give --context, or --corpus for documents, and not both"),
        (("--context", "a", "--corpus", "b"), "give --context, or --corpus for documents, and not both"),
        (("--corpus", "nowhere"), "nowhere: no such file or folder"),
        (("--corpus", ""), "the name of the corpus is empty: give a folder, a file or an index"),
        (("--corpus", "nowhere", "--passages", "0"), "--passages"),
    ],
)
def test_bad_calls_are_one_clear_error(args, message, bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run("ask", bundle, "--question", "Who?", *args)
    assert found.exit_code == 2
    assert message in found.stderr
    assert "Traceback" not in found.stderr


def test_a_lock_file_that_appears_while_an_index_is_opened_is_removed_too(keepers, tmp_path, monkeypatch):
    """A thread of Tantivy creates one whenever it looks for changes, even while the folder of links is being removed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    built = build(keepers, tmp_path / "index")
    real, left = os.rmdir, ["one", "two"]

    def rmdir(path: str, **options: int) -> None:
        if "qadeploy-" in str(path) and left:
            (Path(path) / left.pop()).touch()
        real(path, **options)

    monkeypatch.setattr(os, "rmdir", rmdir)
    assert Corpus.load(built.folder).search("Who keeps room 3?")
    assert not left
    assert [each.name for each in tmp_path.iterdir()] == ["index"]


def test_a_damaged_index_is_an_error_of_the_command(keepers, bundle, tmp_path):
    index = build(keepers, tmp_path / "index").folder
    (index / "texts.bin").write_bytes(b"x" + (index / "texts.bin").read_bytes()[1:])
    found = run("ask", bundle, "--corpus", index, "--question", "Who?")
    assert (found.exit_code, "texts.bin: does not match the manifest" in found.stderr) == (1, True)


def test_a_text_too_large_for_memory_is_refused_by_its_size(tmp_path):
    with (tmp_path / "huge.txt").open("wb") as stream:
        stream.truncate(2**28 + 1)
    with pytest.raises(InputError, match=r"huge\.txt: 268,435,457 bytes are more than 268,435,456: split it"):
        build(tmp_path / "huge.txt", tmp_path / "index")
