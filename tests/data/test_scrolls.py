"""SCROLLS rows: what is kept, cut, labelled, merged, skipped and refused."""

import gzip
import json
import lzma
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zstandard

from comet_pl.config.schema import ScrollsData
from comet_pl.errors import UserError
from comet_pl.metrics.scrolls import METRICS
from data.batches import Shard
from data.chat_template import encode
from data.jsonl import Complaints
from data.scrolls import Corpus, ScrollsBatches, ScrollsSource, texts
from data.scrolls_rows import MAX_NEW_TOKENS, SCROLLS, hub_rows, split_input, tasks
from data.text.tokenized import encoded
from data.tokenizer import train_tokenizer

PACK = {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress, ".zst": zstandard.compress}
STORY = "The dog ran home . It rained all day , and nobody saw the dog . " * 20
ROWS = [
    {"id": "a", "pid": "a_0", "input": f"Who ran home?\n\n{STORY}", "output": "the dog"},
    {"id": "b", "pid": "b_0", "input": f"What was the weather?\n\n{STORY}", "output": "rain"},
    {"id": "a", "pid": "a_1", "input": f"Who ran home?\n\n{STORY}", "output": "a dog"},
    {"id": "c", "pid": "c_0", "input": "How long?\n\nA very short story .", "output": "very short"},
]
TOKENIZER = train_tokenizer([STORY + json.dumps(ROWS)], 400)


def write(root: Path, task="narrative_qa", split="train", rows=ROWS, suffix="") -> Path:
    path = root / task / f"{split}.jsonl{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_bytes(PACK[suffix]("\n".join(lines).encode() + b"\n"))
    return path


def corpus(root: Path, split: str = "train", **options) -> Corpus:
    return Corpus(ScrollsData(root=str(root), **options), TOKENIZER, split)


@pytest.mark.parametrize("suffix", PACK)
def test_an_example_is_question_document_answer(tmp_path: Path, suffix: str):
    write(tmp_path, suffix=suffix)
    found = corpus(tmp_path)
    assert len(found) == 4, "each reference is a row in training"
    assert len(found.documents) == 2, "a document is kept once"
    for row, (ids, labels) in zip(ROWS, found, strict=True):
        assert TOKENIZER.decode(ids) == f"<|user|>{row['input']}<|assistant|>{row['output']}<|end|>"
        answered = labels != -100
        assert TOKENIZER.decode(labels[answered]) == f"{row['output']}<|end|>"
        assert np.array_equal(ids[answered], labels[answered])
        assert answered[np.argmax(answered) :].all(), "all at the end"


def test_a_long_document_loses_its_left_part_only(tmp_path: Path, capsys):
    write(tmp_path)
    found = corpus(tmp_path, max_length=60)
    for row, (ids, _) in zip(ROWS[:3], list(found)[:3], strict=True):
        question, document = row["input"].split("\n\n")
        assert len(ids) == 60
        before, after = TOKENIZER.decode(ids).split("\n\n")
        assert before == f"<|user|>{question}"
        kept, answer = after.split("<|assistant|>")
        assert document.endswith(kept)
        assert len(kept) > 30
        assert answer == f"{row['output']}<|end|>"
    assert len(found[3][0]) < 60
    prompt = found.prompt(found.examples[0])
    assert len(prompt) == 60, "a prompt leaves no room for an answer that it does not know"
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["train: 3 of 4 documents cut on the left, over data.max_length = 60 tokens"]


def test_special_tokens_in_the_text_are_text(tmp_path: Path):
    text = "What?\n\nA <|end|> of <|assistant|> things"
    write(tmp_path, rows=[{"id": "a", "input": text, "output": "<|end|>"}])
    ids, _ = corpus(tmp_path)[0]
    assert (ids == TOKENIZER.eos_token_id).sum() == 1
    assert ids[-1] == TOKENIZER.eos_token_id
    assert encode(TOKENIZER, "<|end|>") != [TOKENIZER.eos_token_id]


def test_repeated_ids_are_references_of_one_question(tmp_path: Path):
    write(tmp_path, split="validation")
    found = corpus(tmp_path, "validation")
    assert [(one.id, one.references) for one in found.questions("narrative_qa")] == [
        ("a", ["the dog", "a dog"]),
        ("b", ["rain"]),
        ("c", ["very short"]),
    ]
    found = corpus(tmp_path, "validation")
    assert [one.id for one in found.questions("narrative_qa", 2)] == ["a", "c"], "evenly spaced"
    assert [one.id for one in found.questions("narrative_qa", 9)] == ["a", "b", "c"]


def test_an_id_with_another_input_is_no_further_reference(tmp_path: Path):
    other = ROWS[1] | {"pid": "b_1", "input": "Who else?"}
    path = write(tmp_path, split="validation", rows=[*ROWS, other])
    line = rf"^{path}:5: malformed row: id: 'b' again with another input, first at {path}:2[^\n]*$"
    with pytest.raises(UserError, match=line):
        corpus(tmp_path, "validation")
    assert len(corpus(tmp_path, "validation", on_error="skip").examples) == 4


def test_an_empty_file_is_named(tmp_path: Path):
    write(tmp_path)
    path = write(tmp_path, "contract_nli", rows=[])
    path.write_bytes(b"")
    with pytest.raises(UserError, match=rf"^{path}: malformed row: an empty file"):
        corpus(tmp_path)
    assert len(corpus(tmp_path, on_error="skip")) == 4


def test_where_the_question_ends():
    assert split_input("qmsum", {"input": "Why?\n\nOne.\n\nTwo."}) == ("Why?\n\n", "One.\n\nTwo.")
    assert split_input("gov_report", {"input": "One.\n\nTwo."}) == ("", "One.\n\nTwo.")
    quality = "Why?\n\n (A) x\n (B) y\n\n (C) z\n (D) w\n\nThe story.\n\nIts end."
    assert split_input("quality", {"input": quality}) == (
        "Why?\n\n (A) x\n (B) y\n\n (C) z\n (D) w\n\n",
        "The story.\n\nIts end.",
    )
    assert split_input("qasper", {"input": "Only a question"}) == ("Only a question\n\n", "")
    text = (
        "Answer in a paragraph.\n\nStory:\nIt was.\n\nIt is.\n\nQuestion:\nWhat was?\n\nAnswer:\n"
    )
    told = {
        "input": text,
        "document_start_index": text.index("It was"),
        "document_end_index": text.index("\n\nQuestion"),
    }
    question = "Answer in a paragraph.\n\nStory:\nQuestion:\nWhat was?\n\nAnswer:\n\n"
    assert split_input("squality", told) == (question, "It was.\n\nIt is.")
    assert split_input("squality", told | {"document_end_index": 999}) == (
        "Answer in a paragraph.\n\n",
        text.partition("\n\n")[2],
    )


BAD = {
    '{"id": "a", "input": "Q\\n\\nD", ': "not JSON: ",
    "[1, 2]": "a JSON object is needed, but this is a list",
    '{"id": "a", "input": "Q"}': "output: missing, text is needed",
    '{"id": "a", "input": "Q", "output": 7}': "output: 7 given, text is needed",
    '{"id": "a", "input": " ", "output": "x"}': "input: ' ' given, text is needed",
    '{"id": "a", "input": "Q\\ud800", "output": "x"}': (
        r"input: not Unicode text \(half of a surrogate pair\)"
    ),
    '{"id": "c", "pid": "\\udfff", "input": "Q", "output": "x"}': "pid: not Unicode text",
    '{"id": "c", "pid": "c_0", "input": "Q", "output": "x"}': (
        "pid: 'c_0' again, first at .*train.jsonl:1"
    ),
}


@pytest.mark.parametrize("line", BAD)
def test_a_malformed_row_is_named_or_skipped_and_counted(tmp_path: Path, capsys, line: str):
    path = write(tmp_path, rows=[ROWS[3], "", line, ROWS[3] | {"pid": "c_1"}, line])
    with pytest.raises(UserError, match=rf"^{path}:3: malformed row: {BAD[line]}[^\n]*$"):
        corpus(tmp_path, max_length=90)
    assert len(corpus(tmp_path, max_length=90, on_error="skip")) == 2
    line = capsys.readouterr().out
    assert line.startswith(f"train: 2 unusable rows skipped; the first: {path}:3: ")


def test_a_row_that_is_too_long_may_have_a_larger_max_length(tmp_path: Path, capsys):
    row = {"id": "a", "input": "Why " * 90 + "\n\nD", "output": "x"}
    path = write(tmp_path, rows=[ROWS[3], row])
    message = r"question and answer alone have (\d+) tokens, data.max_length is 90"
    remedy = r"\(data.max_length=\d+ makes room for those of this row; data.on_error=skip"
    with pytest.raises(UserError, match=rf"^{path}:2: {message} {remedy}") as error:
        corpus(tmp_path, max_length=90)
    least = int(str(error.value).split("data.max_length=")[1].split()[0])
    with pytest.raises(UserError):
        corpus(tmp_path, max_length=least - 1)
    assert len(corpus(tmp_path, max_length=least)[1][0]) == least, "as it says"
    assert len(corpus(tmp_path, max_length=90, on_error="skip")) == 1
    line = f"train: 1 unusable row skipped; the first: {path}:2: question and answer"
    assert capsys.readouterr().out.splitlines()[-1].startswith(line)


@pytest.mark.parametrize("suffix", [".xz", ".gz", ".zst"])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str):
    rows = [{**ROWS[3], "id": str(number)} for number in range(300)]
    path = write(tmp_path, rows=rows, suffix=suffix)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=rf"^{path}: cannot be read after line \d+: [^\n]+$"):
        corpus(tmp_path, on_error="skip")


def test_latin_1_is_no_utf_8(tmp_path: Path):
    path = write(tmp_path)
    path.write_bytes(path.read_bytes() + '{"id": "é"}\n'.encode("latin-1"))
    with pytest.raises(UserError, match=rf"^{path}:5: malformed row: not UTF-8"):
        corpus(tmp_path)


def test_which_tasks(tmp_path: Path):
    for task in ("qmsum", "narrative_qa"):
        write(tmp_path, task)
    (tmp_path / "notes").mkdir()
    assert tasks(ScrollsData(root=str(tmp_path))) == ["qmsum", "narrative_qa"]
    assert tasks(ScrollsData(root=str(tmp_path), tasks=["narrative_qa"])) == ["narrative_qa"]
    assert tasks(ScrollsData(root=None)) == list(SCROLLS)
    assert set(METRICS) == set(MAX_NEW_TOKENS) == {*SCROLLS, "squality"}
    near = r"no task of SCROLLS \(did you mean qmsum\?\); there are: qmsum, narrative_qa"
    refused = {
        "qmsun": f"'qmsun' given, {near}",
        "qasper": rf"'qasper' given, {tmp_path} has no qasper/<split>.jsonl",
        "qmsum qmsum": "qmsum given twice; data.weights says how often",
    }
    for names, message in refused.items():
        with pytest.raises(UserError, match=f"^data.tasks: {message}"):
            tasks(ScrollsData(root=str(tmp_path), tasks=names.split()))
    for root, message in (
        (tmp_path / "none", "is no folder"),
        (tmp_path / "notes", "holds no <task>/<split>.jsonl"),
    ):
        with pytest.raises(UserError, match=f"^data.root: {root} {message}"):
            tasks(ScrollsData(root=str(root)))


def test_batches(tmp_path: Path, capsys):
    write(tmp_path)
    write(tmp_path, split="validation")
    write(tmp_path, "contract_nli", rows=ROWS[3:])
    data = ScrollsData(
        root=str(tmp_path), batch_size=1, val_examples=2, cache=str(tmp_path / "cache")
    )
    module = ScrollsBatches(
        data, TOKENIZER, seed=3, chunk_size=64, stride=8, max_steps=100, max_epochs=2, accumulate=2
    )
    loader = module.train_loader()
    batches = list(loader)
    first, second = batches[:3], batches[3:]
    assert len(batches) == len(loader) == 6
    assert [len(batch["input_ids"]) for batch in first] == [2, 2, 2]
    assert any(
        not np.array_equal(one["input_ids"], other["input_ids"])
        for one, other in zip(first, second, strict=True)
    )
    for batch in first:
        assert (batch["attention_mask"].sum(1) > 0).all()
        assert (
            (batch["input_ids"] == TOKENIZER.pad_token_id) == (batch["attention_mask"] == 0)
        ).all()
        assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
        assert "logits_to_keep" not in batch
    capsys.readouterr()
    assert sum(len(batch["input_ids"]) for batch in module.validation_loader()) == 2, (
        "each question once"
    )
    assert capsys.readouterr().out == "contract_nli: no validation rows\n"
    (idle,) = module.validation_loader(Shard(2, 3))
    assert (idle["labels"] == -100).all(), (
        "two questions, three ranks: the last one reads what does not count"
    )


def test_training_samples_are_the_rows_that_evaluation_reads(tmp_path: Path):
    """Tasks in turn; the same ids and labels, whatever has to be cut."""
    write(tmp_path)
    write(tmp_path, "contract_nli", rows=ROWS[3:])
    for length in (4096, 60):
        data = ScrollsData(root=str(tmp_path), max_length=length)
        source, whole = ScrollsSource(data, TOKENIZER, "train"), Corpus(data, TOKENIZER, "train")
        samples = list(encoded(source, Complaints("raise")))
        assert [sample.group for sample in samples][:2] == ["narrative_qa", "contract_nli"]
        pairs = {tuple(map(tuple, sample.pair())) for sample in samples}
        assert pairs == {tuple(map(tuple, whole[k])) for k in range(len(whole))}
        assert len(samples) == len(whole)
        assert sum(sample.notes["cut"] for sample in samples) == whole.cut


def test_nothing_to_train_on(tmp_path: Path):
    write(tmp_path, split="validation")
    data = ScrollsData(root=str(tmp_path), cache=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"^data.root: .* has no training rows for narrative_qa$"):
        ScrollsBatches(data, TOKENIZER, seed=0, chunk_size=64, stride=8, max_steps=3)


def test_weights_that_leave_nothing(tmp_path: Path):
    write(tmp_path)
    data = ScrollsData(root=str(tmp_path), cache=str(tmp_path / "cache"), weights=[0.0])
    with pytest.raises(UserError, match=r"^data.weights: all 0 given, nothing would be trained on"):
        ScrollsBatches(data, TOKENIZER, seed=0, chunk_size=64, stride=8, max_steps=3)


def test_streaming_looks_beyond_unusable_rows_and_counts_them(tmp_path: Path, capsys):
    """More of them than the first window has; and a corpus with nothing else names them."""
    bad = [{**ROWS[3], "id": str(n), "pid": str(n), "output": None} for n in range(40)]
    path = write(tmp_path, rows=[*bad, ROWS[3]])
    data = ScrollsData(
        root=str(tmp_path), streaming=True, on_error="skip", batch_size=1, max_length=90
    )
    module = ScrollsBatches(data, TOKENIZER, seed=0, chunk_size=64, stride=8, max_steps=3)
    assert len(list(module.train_loader())) == 3  # the only row in three epochs
    module.finish()
    line = f"train: 40 unusable rows skipped; the first: {path}:1: output: None given"
    assert line in capsys.readouterr().out
    write(tmp_path, rows=bad)
    line = "no training rows for narrative_qa; 40 unusable rows skipped; the first: .*:1: output"
    with pytest.raises(UserError, match=line):
        ScrollsBatches(data, TOKENIZER, seed=0, chunk_size=64, stride=8, max_steps=3)


def test_texts_have_every_document_once(tmp_path: Path):
    write(tmp_path)
    found = list(texts(ScrollsData(root=str(tmp_path))))
    assert "".join(found).count(STORY) == 1
    assert all(
        row["output"] in text and row["input"].split("\n\n")[0] in text
        for row, text in zip(ROWS, found, strict=True)
    )


def test_rows_of_a_zip_as_on_the_hub(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    with zipfile.ZipFile(tmp_path / "qmsum.zip", "w") as archive:
        archive.writestr("qmsum/train.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS))
    found = list(hub_rows("qmsum", "train", str(tmp_path / "{task}.zip")))
    assert [row for _, row in found] == ROWS
    assert found[2][0] == f"{tmp_path}/qmsum.zip/train.jsonl:3"
    line = r"^data.root: null given, but validation rows of .*qmsum.zip cannot be read: [^\n]+$"
    with pytest.raises(UserError, match=line):
        list(hub_rows("qmsum", "validation", str(tmp_path / "{task}.zip")))


def test_a_tokenizer_without_chat_template(tmp_path: Path):
    write(tmp_path)
    plain = train_tokenizer([STORY + json.dumps(ROWS)], 400)
    plain.chat_template = None
    ids, _ = Corpus(ScrollsData(root=str(tmp_path)), plain, "train")[0]
    assert plain.decode(ids) == f"{ROWS[0]['input']}\n\nAnswer:\n{ROWS[0]['output']}<|end|>"


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["scrolls", "scrolls_small"])
def test_real_rows(shared_data: Path, folder: str):
    data = ScrollsData(
        root=str(shared_data / folder), tasks=["narrative_qa", "contract_nli"], max_length=1024
    )
    if not (shared_data / folder).is_dir():
        pytest.skip(f"no {folder} in {shared_data}")
    found = Corpus(data, TOKENIZER, "validation")
    assert {one.task for one in found.examples} == set(data.tasks)
    assert all(len(ids) <= 1024 and labels[-1] == TOKENIZER.eos_token_id for ids, labels in found)
    assert {len(one.references) for one in found.questions("narrative_qa")} <= {1, 2}
