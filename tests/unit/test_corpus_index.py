"""The index of a corpus: what is found, what is skipped, how it is updated, and that damaged data is never read."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from qadeploy import Corpus
from qadeploy.corpus import building, scanning
from qadeploy.corpus.building import build
from qadeploy.corpus.folder import open_index
from qadeploy.corpus.scanning import reading
from qadeploy.errors import CorpusError, InputError
from qadeploy.files import hash_file, holding
from qadeploy.inference.bundle import MANIFEST, manifest_text
from qadeploy.records import NO_ANSWER, Answer, Snippet
from tests.corpora_for_tests import write_documents


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The index of the documents. Tests must not change it."""
    root = tmp_path_factory.mktemp("corpus")
    return build(write_documents(root / "documents"), root / "index").folder


@pytest.fixture(scope="module")
def corpus(index: Path) -> Corpus:
    return Corpus.load(index)


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "documents")


@pytest.mark.parametrize(
    ("question", "document", "place", "text"),
    [
        ("Who trims the light?", "lamps.md", "Lamps > Trimming", "Mungo Strand"),
        ("When does the boat leave Carrow?", "deep/quay.html", "The quay > Boats & ropes", "At eleven"),
        ("日本の首都はどこですか", "rows.jsonl#t", "Capitals", "東京"),
        ("ภาษาไทย", "rows.jsonl:2", "line 2", "ไม่เว้นวรรค"),
        ("Who has the kettle?", "notes.txt", "line 1", "Cora"),
        ("Who has a PIANO?", "wide.txt", "line 1", "Dora"),
    ],
)
def test_a_passage_is_found_with_its_place_in_the_text(corpus, question, document, place, text):
    found = corpus.search(question)
    assert (found[0].document, found[0].place) == (document, place)
    assert text in found[0].text
    for passage in found:
        assert corpus.text(passage.document)[passage.start : passage.end] == passage.text
    scores = [passage.score for passage in found]
    assert scores == sorted(scores, reverse=True)


def test_offsets_count_in_the_file_without_its_mark(corpus):
    assert corpus.text("notes.txt") == "Bela keeps the ladder.\r\n\r\nCora keeps the kettle."


def test_lines_and_pages_are_no_words_to_be_found(corpus):
    assert corpus.search("line") == []
    assert [each.place for each in corpus.search("capitals")] == ["Capitals"]


def test_what_shares_no_word_is_not_found(corpus):
    assert corpus.search("xyzzy") == []
    assert corpus.search("?") == []
    assert len(corpus.search("keeps", limit=1)) == 1


def test_a_question_and_a_limit_are_checked(corpus):
    for question, limit in (("", 5), (" ", 5), ("who", 0)):
        with pytest.raises(InputError):
            corpus.search(question, limit)
    with pytest.raises(InputError, match=r"nowhere\.md: there is no such document"):
        corpus.text("nowhere.md")


def test_syntax_of_query_languages_is_text(corpus):
    assert corpus.search('document:"lamps.md" AND light^1000 OR (') == corpus.search(
        "document lamps md AND light 1000 OR"
    )


def test_answers_are_placed_in_their_documents_in_the_units_that_are_wanted(corpus):
    passages = corpus.search("Who keeps the bell?", 1)
    start = passages[0].text.index("Zoë")
    answer = Answer(
        "Zoë", start, start + 3, 0.5, passage=0, snippet=Snippet(passages[0].text, 0, len(passages[0].text))
    )
    text = corpus.text("wide.txt")
    for offsets, encoding, size in (("codepoints", "utf-32-le", 4), ("utf16", "utf-16-le", 2), ("utf8", "utf-8", 1)):
        placed, none = corpus.placed([answer, NO_ANSWER], passages, offsets)
        data = text.encode(encoding)
        assert data[placed.start * size : placed.end * size].decode(encoding) == placed.text == "Zoë"
        assert data[placed.snippet.start * size : placed.snippet.end * size].decode(encoding) == placed.snippet.text
        assert (placed.document, placed.place, placed.passage) == ("wide.txt", "line 1", 0)
        assert (none.document, none.passage, none.to_dict().get("snippet")) == ("", None, None)


def test_what_cannot_be_read_is_listed_with_its_reason(documents, tmp_path):
    (documents / "empty.txt").write_bytes(b"")
    (documents / "blank.md").write_text(" \n")
    (documents / "binary.txt").write_bytes(bytes(range(256)) * 4)
    (documents / "old.txt").write_bytes("Straße".encode("cp1252"))
    (documents / "unmarked.txt").write_bytes("Kette".encode("utf-16-le"))
    (documents / "letter.docx").write_bytes(b"PK\x03\x04")
    (documents / "LICENSE").write_text("free")
    (documents / ".git").mkdir()
    (documents / ".hidden.txt").write_text("hidden")
    (documents / "scripts.html").write_text("<script>only()</script>")
    (documents / "loop").symlink_to(documents)
    (documents / "outside.txt").symlink_to("/etc/hostname")
    os.mkfifo(documents / "pipe.txt")
    (documents / "bad.jsonl").write_text("{\n")
    (documents / "some.jsonl").write_text(
        '{"text": "one"}\n[1]\n{"question": "q"}\n{"text": "\\ud800"}\n{"text": " "}\nnot json\n{"text": "one"}\n'
    )
    raw = os.fsencode(documents) + b"/caf\xe9.txt"
    Path(os.fsdecode(raw)).write_text("A name in another encoding.")
    corpus = Corpus.build(documents, tmp_path / "index")
    reasons = {each.path: each.reason for each in corpus.skipped}
    expected = {
        "empty.txt": "holds no text",
        "blank.md": "holds no text",
        "binary.txt": "not UTF-8 text",
        "old.txt": "not UTF-8 text (byte 4), probably Windows-1252",
        "unmarked.txt": "UTF-16 without a byte order mark",
        "letter.docx": "ending '.docx'; read are .txt",
        "LICENSE": "no ending",
        ".git/": "hidden",
        ".hidden.txt": "hidden",
        "scripts.html": "holds no text",
        "loop": "a link, which is not followed",
        "outside.txt": "a link, which is not followed",
        "pipe.txt": "not a plain file",
        "bad.jsonl:1": "not valid JSON",
        "bad.jsonl": "none of its rows can be read",
        "some.jsonl:2": "must be an object with a field text, not a list",
        "some.jsonl:3": "has no field text (or context",
        "some.jsonl:4": "lone surrogate",
        "some.jsonl:5": "must be text that is not blank",
        "some.jsonl:6": "not valid JSON",
        "some.jsonl": "1 row with the text of an earlier row",
    }
    assert reasons.keys() == expected.keys()
    assert {path: reason for path, reason in reasons.items() if expected[path] not in reason} == {}
    (found,) = corpus.search("encoding")
    assert found.document == "caf\\xe9.txt"
    assert Corpus.load(tmp_path / "index").skipped == corpus.skipped


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: path.with_suffix(".docx").write_text("x")])
def test_a_corpus_without_a_readable_file_is_an_error_that_lists_the_reasons(tmp_path, make):
    source = tmp_path / "source"
    make(source)
    with pytest.raises(InputError, match=r"no file can be read|holds no files|no such file"):
        build(source, tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_a_single_file_is_a_corpus(documents, tmp_path):
    assert [p.document for p in Corpus.build(documents / "lamps.md", tmp_path / "index").search("light")] == [
        "lamps.md"
    ] * 2


def test_a_link_that_the_caller_names_is_followed(documents, tmp_path):
    (tmp_path / "folder").symlink_to(documents)
    (tmp_path / "file.md").symlink_to(documents / "lamps.md")
    assert Corpus.build(tmp_path / "folder", tmp_path / "index").files == 5
    assert Corpus.build(tmp_path / "file.md", tmp_path / "other").search("light")[0].document == "lamps.md"


def test_the_text_of_an_update_is_that_of_a_new_index(documents, tmp_path):
    index = tmp_path / "index"
    first = build(documents, index)
    assert (first.added, first.changed, first.removed) == (5, 0, 0)
    before = (index / MANIFEST).stat().st_ino
    assert build(documents, index).up_to_date
    assert (index / MANIFEST).stat().st_ino == before

    (documents / "lamps.md").write_text("# Lamps\n\nNow Ines trims the light, said Zoë.")
    (documents / "notes.txt").unlink()
    (documents / "new.txt").write_text("Lena keeps the clock.")
    os.utime(documents / "wide.txt")  # the same bytes
    os.replace(documents / "deep" / "quay.html", documents / "quay.html")
    found = build(documents, index)
    assert (found.added, found.changed, found.removed) == (2, 1, 2)
    updated, anew = Corpus.load(index), Corpus.build(documents, tmp_path / "anew")
    assert (updated.files, updated.documents, updated.passages) == (anew.files, anew.documents, anew.passages)
    for question in ("Who trims the light?", "kettle ladder", "clock", "日本の首都", "piano bell", "boat", "oil noon"):
        ours = [(p.document, p.place, p.start, p.text) for p in updated.search(question)]
        assert sorted(ours) == sorted((p.document, p.place, p.start, p.text) for p in anew.search(question))
    assert updated.search("kettle") == []
    assert "Ines" in updated.search("Who trims the light?")[0].text
    assert updated.text("wide.txt") == anew.text("wide.txt")


def test_only_changed_files_are_read_again(documents, tmp_path, monkeypatch):
    index = tmp_path / "index"
    build(documents, index)
    (documents / "lamps.md").write_text("# Lamps\n\nAda.")
    read = []
    documents_of = building.documents_of

    def noted(found, reader, skip):
        read.append(found.name)
        return documents_of(found, reader, skip)

    monkeypatch.setattr(building, "documents_of", noted)
    build(documents, index)
    assert read == ["lamps.md"]


def test_a_file_that_becomes_unreadable_leaves_the_index_and_says_why(documents, tmp_path):
    index = tmp_path / "index"
    build(documents, index)
    (documents / "notes.txt").write_bytes(b"\xff\xff\xff")
    (documents / "rows.jsonl").write_bytes(b'{"text": "a sound row"}\n{"text": "\xff"}\n')
    built = build(documents, index)
    assert (built.removed, built.files) == (2, 3)
    assert [each.path for each in built.skipped] == ["notes.txt", "rows.jsonl"]
    corpus = Corpus.load(index)
    assert corpus.search("kettle") == corpus.search("sound row") == []
    assert corpus.search("piano")[0].text.startswith("Dora")


def test_an_io_error_while_a_file_is_compared_does_not_falsify_its_hash(documents, tmp_path, monkeypatch):
    index = tmp_path / "index"
    build(documents, index)
    os.utime(documents / "notes.txt", ns=(1, 1))
    calls = []

    def failing_once(stream, name):
        calls.append(stream)
        if len(calls) == 1:
            stream.read(5)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return hashlib.file_digest(stream, name)

    monkeypatch.setattr(building, "hashlib", SimpleNamespace(file_digest=failing_once))
    assert build(documents, index).changed == 1
    monkeypatch.undo()
    for source in open_index(index).sources:
        assert source.sha256 == hash_file(documents / source.path)


def test_an_io_error_keeps_the_version_that_was_indexed(documents, tmp_path, monkeypatch):
    index = tmp_path / "index"
    build(documents, index)
    for name, content in (("notes.txt", "Anew."), ("rows.jsonl", '{"text": "a sound row"}\n'), ("new.txt", "New.")):
        (documents / name).write_text(content)
    documents_of = building.documents_of

    def failing(found, reader, skip):
        with reading(found.name):
            yield from documents_of(found, reader, skip)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(building, "documents_of", failing)
    built = build(documents, index)
    assert (built.added, built.changed, built.removed, built.files) == (0, 0, 0, 5)
    kept = "cannot be read: Input/output error; the version that was indexed before is kept"
    assert {each.path: each.reason for each in built.skipped} == {
        "new.txt": "cannot be read: Input/output error", "notes.txt": kept, "rows.jsonl": kept,
    }  # fmt: skip
    monkeypatch.undo()
    assert Corpus.load(index).search("kettle")[0].document == "notes.txt"
    again = build(documents, index)
    assert (again.added, again.changed, again.removed, again.skipped) == (1, 2, 0, ())
    assert Corpus.load(index).search("sound row")[0].document == "rows.jsonl:1"


@pytest.mark.parametrize(("number", "kept"), [(errno.EIO, True), (errno.EACCES, False)])
def test_what_an_io_error_hides_stays_in_the_index(documents, tmp_path, monkeypatch, number, kept):
    index, cellar = tmp_path / "index", documents / "deep" / "cellar"
    cellar.mkdir()
    (cellar / "bell.txt").write_text("Cora rings the gong.")
    files = build(documents, index).files
    opening = os.open

    def failing(path, *given, **more):
        if path in {"cellar", "notes.txt"}:
            raise OSError(number, os.strerror(number), path)
        return opening(path, *given, **more)

    monkeypatch.setattr(scanning.os, "open", failing)
    built = build(documents, index)
    monkeypatch.undo()
    assert (built.files, built.removed) == ((files, 0) if kept else (files - 2, 2))
    reason = f"cannot be read: {os.strerror(number)}" + "; the version that was indexed before is kept" * kept
    assert {each.path: each.reason for each in built.skipped} == {"deep/cellar/": reason, "notes.txt": reason}
    assert bool(Corpus.load(index).search("gong")) is kept


@pytest.mark.parametrize(
    "name", [MANIFEST, "files.json", "texts.bin", "meta.json", ".managed.json", ".store", ".idx", ".term"]
)
def test_one_changed_byte_is_refused(index, tmp_path, name):
    copy = tmp_path / "copy"
    shutil.copytree(index, copy)
    path = next(path for path in copy.iterdir() if path.name.endswith(name))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorpusError, match=r"damaged or was changed|cannot be read") as refused:
        Corpus.load(copy)
    assert "qadeploy index" in str(refused.value)
    with pytest.raises(CorpusError):
        build(index.parent / "documents", copy)


def changed_manifest(index: Path, copy: Path, **changes: object) -> Path:
    shutil.copytree(index, copy)
    values = json.loads((copy / MANIFEST).read_text())
    del values["manifest_sha256"]
    (copy / MANIFEST).write_text(manifest_text({**values, **changes}))
    return copy


def test_another_version_is_refused(index, tmp_path):
    with pytest.raises(CorpusError, match="version 2 of the index is not 1"):
        Corpus.load(changed_manifest(index, tmp_path / "copy", schema=2))


def test_other_folders_are_refused(index, tmp_path, documents):
    with pytest.raises(InputError, match="no such index"):
        Corpus.load(tmp_path / "nowhere")
    with pytest.raises(CorpusError, match=r"has no manifest\.json"):
        Corpus.load(documents)
    with pytest.raises(CorpusError, match="is no index"):
        Corpus.load(changed_manifest(index, tmp_path / "kind", kind="bundle"))
    listed = json.loads((index / MANIFEST).read_text())["files"]
    for name in ("../lamps.md", "/etc/passwd", "other.txt"):
        copy = changed_manifest(index, tmp_path / name.replace("/", "-"), files={**listed, name: listed["files.json"]})
        with pytest.raises(CorpusError, match="other files than an index has"):
            Corpus.load(copy)


def test_files_beside_an_index_links_and_missing_files_are_refused(index, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(index, copy)
    (copy / "more.txt").touch()
    with pytest.raises(CorpusError, match=r"holds 'more\.txt'"):
        Corpus.load(copy)
    (copy / "more.txt").unlink()
    (copy / "texts.bin").unlink()
    with pytest.raises(CorpusError, match=r"texts\.bin: is missing"):
        Corpus.load(copy)
    (copy / "texts.bin").symlink_to(index / "texts.bin")
    with pytest.raises(CorpusError, match=r"texts\.bin: is missing or not a plain file"):
        Corpus.load(copy)


def test_an_index_in_a_folder_that_cannot_be_written_can_be_read(index, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(index, copy)
    before = sorted(os.listdir(copy))
    corpus = Corpus.load(copy)
    shutil.rmtree(copy)  # nor is it needed once it is open
    assert corpus.search("piano")[0].document == "wide.txt"
    assert sorted(os.listdir(index)) == before


def test_a_text_that_is_changed_in_place_while_it_is_open_is_refused(index, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(index, copy)
    corpus = Corpus.load(copy)
    data = (copy / "texts.bin").read_bytes()
    with (copy / "texts.bin").open("r+b") as stream:
        stream.write(data.replace(b"trims", b"snuff"))
    with pytest.raises(CorpusError, match="damaged or was changed"):
        corpus.search("Who trims the light?")


def test_an_index_is_replaced_while_it_is_in_use(documents, tmp_path):
    before = Corpus.build(documents, tmp_path / "index")
    (documents / "lamps.md").write_text("# Lamps\n\nAda.")
    after = Corpus.build(documents, tmp_path / "index")
    assert "Mungo" in before.search("Who trims the light?")[0].text
    assert after.search("trims") == []
    assert before.hash != after.hash


def test_what_is_no_index_is_not_overwritten(documents, tmp_path):
    with pytest.raises(InputError, match="exists and is not an index"):
        build(documents, documents / "deep")
    with pytest.raises(InputError, match="lies in the corpus itself"):
        build(documents, documents / "index")
    (tmp_path / "link").symlink_to(tmp_path / "index")
    with pytest.raises(InputError, match="is a link"):
        build(documents, tmp_path / "link")


def test_a_second_builder_is_told_who_is_first(documents, tmp_path):
    with holding(tmp_path / "index"), pytest.raises(InputError, match="another command is writing it"):
        build(documents, tmp_path / "index")
    assert build(documents, tmp_path / "index").files == 5


@pytest.mark.parametrize("room", [200, 3_000])
def test_a_full_disk_is_one_clear_error_and_leaves_the_old_index(documents, tmp_path, room):
    index = tmp_path / "index"
    build(documents, index)
    (documents / "long.txt").write_text(" ".join(f"word{number}" for number in range(5_000)))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises((CorpusError, OSError), match=f"{index}.*File too large|File too large.*{index}"):
            build(documents, index)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["documents", "index"]
    assert build(documents, index).added == 1


def test_documents_are_opened_through_the_cache(documents, monkeypatch, tmp_path):
    monkeypatch.setenv("QADEPLOY_CACHE", str(tmp_path / "cache"))
    corpus = Corpus.open(documents)
    assert corpus.folder.is_relative_to(tmp_path / "cache")
    again = Corpus.open(documents)
    assert again.hash == corpus.hash
    (corpus.folder / "texts.bin").write_bytes(b"")
    assert Corpus.open(documents).search("piano")  # a damaged one is only a cache
    assert Corpus.open(corpus.folder).hash


def test_a_foreign_index_with_fitting_hashes_ends_in_an_error(index, tmp_path):
    """Its author writes the hashes too, so the content of the files is not trusted either."""
    copy = tmp_path / "copy"
    shutil.copytree(index, copy)
    values = json.loads((copy / "files.json").read_text())
    values["files"][0][6] = 2**40
    (copy / "files.json").write_text(json.dumps(values))
    reseal(copy)
    with pytest.raises(CorpusError, match=r"a text lies outside of texts\.bin"):
        Corpus.load(copy)
    (copy / "files.json").write_text("[" * 100_000)
    reseal(copy)
    with pytest.raises(CorpusError, match=r"files\.json: cannot be used"):
        open_index(copy)
    shutil.copy(index / "files.json", copy)
    store = next(copy.glob("*.store"))
    store.write_bytes(os.urandom(store.stat().st_size))
    reseal(copy)
    with pytest.raises(CorpusError):
        Corpus.load(copy).search("Who trims the light?")


def reseal(folder: Path) -> None:
    """Writes the hashes of an index's files into its manifest."""
    from qadeploy.inference.bundle import seal

    values = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).unlink()
    seal(folder, {name: value for name, value in values.items() if name not in {"manifest_sha256", "files"}})


def test_equal_scores_are_in_the_order_of_the_documents(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    names = [f"{number:02}.txt" for number in range(15)]
    for name in reversed(names):
        (source / name).write_text("The rope is long.")
    corpus = Corpus.build(source, tmp_path / "index")
    assert [each.document for each in corpus.search("How long is the rope?", 5)] == names[:5]
    (source / "00.txt").write_text("The rope is so long.")
    (source / "03.txt").unlink()
    corpus = Corpus.build(source, tmp_path / "index")
    assert [each.document for each in corpus.search("How long is the rope?", 4)] == [
        "01.txt",
        "02.txt",
        "04.txt",
        "05.txt",
    ]
