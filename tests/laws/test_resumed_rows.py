"""What a resumed run reads: its place in the data counts rows and optimizer steps, so that a run
grows, and goes on, on any number of devices; other rows than it began with are refused."""

import json
import shutil
from collections import Counter
from itertools import chain

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import train
from comet_pl import build
from comet_pl.config.load import load
from comet_pl.errors import UserError
from comet_pl.experiment.checkpoint import restore_tokenizer
from data.batches import Shard
from tests.support.rows_read import rows_of_ranks, rows_of_run
from tests.support.tiny_data import write_events, write_scrolls, write_texts, write_traces
from tests.support.tiny_runs import TINY

QUIET = ["monitor.gates=false", "monitor.memory=false", "monitor.length_report=false"]
QUIET += ["monitor.predictions=false", "eval.after_fit=false", "trainer.limit_val_batches=0"]
RUN = [*TINY, *QUIET, "run.name=run", "data.batch_size=2", "train.warmup_steps=1"]
PLAIN = ["backbone.num_key_value_heads=2", "data.keep_events=1.0", "data.shift_days=0"]
PLAIN += ["data.new_days=null"]
KINDS = {
    "passkey": ["data.train_length=96", "data.length_schedule=[[0,48],[3,64],[6,96]]"],
    "scrolls": ["data.max_length=120"],
    "scrolls streamed": ["data.max_length=120", "data.streaming=true", "data.shuffle_window=5"],
    "agent": ["data.max_length=400", "data.val_share=0.3", "data.packing=documents"],
    "books": ["data.max_length=120", "data.val_share=0.2"],
    "books streamed": ["data.max_length=120", "data.streaming=true", "data.shuffle_window=5"],
    "user_behavior": ["data.train_length=200", "data.length_schedule=[[0,120],[4,200]]", *PLAIN],
}
# a resumed run keeps its devices
ALONE = ["resume=true", "trainer.devices=1", "trainer.strategy=auto"]
WRITE = {"scrolls": write_scrolls, "agent": write_traces, "user_behavior": write_events}
WRITE["books"] = write_texts
flat = chain.from_iterable


def keys_of(kind, folder, name="rows"):
    """Keys of a run on data of a kind, written into the folder."""
    conf = kind.split()[0]
    keys = [f"run.root={folder / 'runs'}", f"conf={conf}", *RUN, *KINDS[kind]]
    if conf in WRITE:
        root = folder / name
        keys.append(f"data.root={root if root.exists() else WRITE[conf](root)}")
    return keys + [f"data.cache={folder / 'cache'}"] * (conf in ("scrolls", "agent", "books"))


# ---- more steps than the run was made for


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind == "passkey")) for kind in KINDS]
)
def test_a_finished_run_grows_and_reads_on(tmp_path, kind, capsys):
    keys = keys_of(kind, tmp_path)
    whole = rows_of_run([*keys, "run.name=whole", "trainer.max_steps=9"])
    parts = [rows_of_run([*keys, "trainer.max_steps=4"])]
    parts += [rows_of_run([*keys, "resume=true", f"trainer.max_steps={n}"]) for n in (4, 7, 9)]
    assert [len(part) for part in parts] == [4, 0, 3, 2]
    assert list(flat(parts)) == whole
    lines = capsys.readouterr().out.splitlines()
    ends = [line.split(";")[0] for line in lines if line.startswith("trained")]
    none = "trained 4 steps, none of them now: trainer.max_steps is 4"
    assert ends[1:] == ["trained 4 steps", none, "trained 7 steps", "trained 9 steps"]


def test_a_run_that_epochs_have_ended_grows_and_says_what_ended_it(tmp_path, capsys):
    keys = [*keys_of("scrolls", tmp_path), "trainer.max_steps=100"]
    whole = rows_of_run([*keys, "run.name=whole", "trainer.max_epochs=3"])
    parts = [rows_of_run([*keys, "trainer.max_epochs=1"])]
    out = capsys.readouterr().out
    assert "trained 8 steps: trainer.max_epochs=1 ends it before trainer.max_steps=100 (" in out
    parts += [rows_of_run([*keys, "resume=true", f"trainer.max_epochs={n}"]) for n in (1, 3, 2)]
    assert [len(part) for part in parts] == [8, 0, 16, 0]
    assert list(flat(parts)) == whole
    last = torch.load(tmp_path / "runs/scrolls/run/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 24
    assert not any(last["lr_schedulers"][0]["_last_lr"]), "the cosine ends with the epochs"


@pytest.mark.parametrize("kind", ["passkey", "scrolls"])
@pytest.mark.parametrize(("keys", "steps"), [("3", 9), ("3 trainer.max_epochs=2", 6)])
def test_limited_epochs(tmp_path, kind, keys, steps):
    keys = [f"trainer.limit_train_batches={keys}".split(), ["trainer.max_steps=9"]]
    assert len(rows_of_run([*keys_of(kind, tmp_path), *flat(keys)])) == steps


# ---- other numbers of data-parallel devices


def fed(source, world, state, steps):
    """(rows of all ranks, step by step; what is saved after the last one)."""
    loaders = [source.train_loader(Shard(rank, world)) for rank in range(world)]
    for loader in loaders if state else ():
        loader.load_state_dict(json.loads(json.dumps(state)))
    read = []
    for batches in zip(*loaders, strict=True):
        rows = [zip(batch["input_ids"], batch["attention_mask"], strict=True) for batch in batches]
        rows = [[ids[mask.bool()].tolist() for ids, mask in rank] for rank in rows]
        read.append([row for dealt in zip(*rows, strict=True) for row in dealt])
        if len(read) == steps:
            break
    return read, loaders[0].state_dict()


@pytest.mark.parametrize("worlds", [(1, 2, 1), (2, 1, 4), (4, 2, 1)])
@pytest.mark.parametrize("kind", ["passkey", "user_behavior"])
def test_rows_go_on_and_lengths_are_those_of_the_step(tmp_path, kind, worlds):
    config = load([*keys_of(kind, tmp_path), "trainer.max_steps=10"])
    source = build.build_data(config, build.build_tokenizer(config)).source
    source.tokenizer.model_max_length = 10**9
    parts, state = [], None
    for world, steps in zip(worlds, (3, 3, 99), strict=True):
        part, state = fed(source, world, state, steps)
        parts.append(part)
    assert [len(part) for part in parts] == [3, 3, 4]
    number = 0
    for step, rows in enumerate(flat(parts)):
        assert len(rows) == 2 * worlds[min(step // 3, 2)]
        for row in rows:
            length = [size for start, size in config.data.length_schedule if start <= step][-1]
            if kind == "passkey":
                expected = source.training.row(number, length)
            else:
                expected = source.questions("train", 1).row_of(number, length)[0]
            assert row == expected.tolist()
            number += 1


@pytest.mark.parametrize("worlds", [(1, 2, 1), (2, 1, 4), (4, 2, 1)])
def test_every_row_once_an_epoch(tmp_path, worlds):
    keys = [*keys_of("scrolls", tmp_path), "trainer.max_steps=100", "trainer.max_epochs=2"]
    config = load(keys)
    source = build.build_data(config, build.build_tokenizer(config)).source
    alone, _ = fed(source, 1, None, 99)
    order, state, read = list(flat(alone)), None, []
    epoch = len(order) // 2
    for world, steps in zip(worlds, (2, 1, 99), strict=True):
        count = source.count(Shard(0, world), state)
        part, state = fed(source, world, state, steps)
        read += part
        assert len(read) == count or steps < 99
    rows = list(flat(read))
    assert rows[:epoch] == order[:epoch]
    (second,) = (n for n in range(epoch, len(rows)) if rows[n : n + epoch] == order[epoch:])
    filling = second - epoch, len(rows) - second - epoch
    assert max(filling) < 2 * worlds[2], "the last batch of an epoch is filled up"


@pytest.mark.slow
def test_one_device_then_two_then_one_follow_the_schedule(tmp_path, capsys):
    keys = keys_of("passkey", tmp_path)
    parts = [rows_of_run([*keys, "trainer.max_steps=2"])]
    part, out = rows_of_ranks(tmp_path, [*keys, "resume=true", "trainer.max_steps=5"], 2)
    assert "a step reads 4 rows from here on, 2 before: data.batch_size rows on each of 2" in out
    parts += [part, rows_of_run([*keys, *ALONE, "trainer.max_steps=8"])]
    assert "a step reads 2 rows from here on, 4 before: data.batch_size" in capsys.readouterr().out
    assert [len(rows) for rows in flat(parts)] == [2, 2, 4, 4, 4, 2, 2, 2]
    config = load([*keys, "trainer.max_steps=8"])
    last = torch.load(tmp_path / "runs/passkey/run/checkpoints/last.ckpt", weights_only=True)
    rows = build.build_data(config, restore_tokenizer(last["comet"])).source.training
    lengths = [48] * 3 + [64] * 3 + [96] * 2
    steps = zip(lengths, flat(parts), strict=True)
    read = [(length, row) for length, rows in steps for row in rows]
    assert [row for _, row in read] == [
        rows.row(number, length).tolist() for number, (length, _) in enumerate(read)
    ]


@pytest.mark.slow
def test_one_device_then_two_then_one_read_every_row_once_an_epoch(tmp_path):
    keys = [*keys_of("scrolls", tmp_path), "trainer.max_epochs=2"]
    parts = [rows_of_run([*keys, "trainer.max_steps=3"])]
    parts.append(rows_of_ranks(tmp_path, [*keys, "resume=true", "trainer.max_steps=5"], 2)[0])
    parts.append(rows_of_run([*keys, *ALONE, "trainer.max_steps=100"]))
    assert [len(part) for part in parts] == [3, 2, 9]
    rows = [tuple(row) for row in flat(flat(parts))]
    assert len(rows) == 32
    assert set(Counter(rows[:16]).values()) == {1}
    assert Counter(rows[:16]) == Counter(rows[16:])


def test_a_checkpoint_of_before_counts_its_steps_by_lightnings(tmp_path):
    keys = keys_of("passkey", tmp_path)
    rows_of_run([*keys, "trainer.max_steps=3"])
    last = tmp_path / "runs/passkey/run/checkpoints/last.ckpt"
    content = torch.load(last, weights_only=True)
    (place,) = content["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    # as two devices left it
    place["position"] = 12
    del place["given"], place["rows"], content["comet"]["data"]
    torch.save(content, last)
    steps = rows_of_run([*keys, "resume=true", "trainer.max_steps=7"])
    assert [len(rows[0]) for rows in steps] == [64, 64, 64, 96]


# ---- the data are what is in the files


@pytest.fixture(params=["passkey", *(kind for kind in KINDS if kind != "passkey")])
def begun(request, tmp_path):
    """(keys of a run that has done two steps, its folder of data)."""
    kind, root = request.param, tmp_path / "rows"
    keys = keys_of(kind, tmp_path)
    if kind == "passkey":
        root.mkdir()
        (root / "book.txt").write_text("The rain in the north falls on the town. " * 50)
        keys.append(f"data.haystack={root / 'book.txt'}")
    train.main([*keys, "trainer.max_steps=2"])
    return [*keys, "resume=true", "trainer.max_steps=3"], root


def test_a_folder_may_move_and_be_spelt_in_another_way(begun, tmp_path, capsys):
    keys, root = begun
    moved = shutil.copytree(root, tmp_path / "elsewhere")
    shutil.rmtree(root)
    name = "book.txt" if (moved / "book.txt").exists() else ""
    key = "data.haystack" if name else "data.root"
    train.main([*keys, f"{key}={tmp_path}/runs/../elsewhere/{name}"])
    assert "trained 3 steps" in capsys.readouterr().out


def test_other_rows_are_refused(begun):
    keys, root = begun
    file = next(path for path in sorted(root.rglob("*")) if path.suffix in (".jsonl", ".txt"))
    content = file.read_bytes()
    last = content.splitlines(keepends=True)[-1]
    for other in (content + last, content[: -len(last)] or b"The sun. " * 90):
        file.write_bytes(other)
        with pytest.raises(UserError, match=rf"other train.* data than .*: {file.name} has [\d,]+"):
            train.main(keys)
    file.write_bytes(content)
    train.main(keys)


def test_another_cache_and_other_validations_are_free(tmp_path, capsys):
    keys = keys_of("scrolls", tmp_path)
    train.main([*keys, "trainer.max_steps=2"])
    file = tmp_path / "rows/qmsum/validation.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    capsys.readouterr()
    free = [f"data.cache={tmp_path / 'other'}", "data.val_examples=1", "data.on_error=skip"]
    train.main([*keys, "resume=true", "trainer.max_steps=3", *free])
    out = capsys.readouterr().out
    assert "validation qmsum data have changed: validation.jsonl has" in out
    assert "trained 3 steps" in out


def test_a_run_of_before_says_that_nothing_is_known(tmp_path, capsys):
    keys = keys_of("scrolls", tmp_path)
    train.main([*keys, "trainer.max_steps=2"])
    last = tmp_path / "runs/scrolls/run/checkpoints/last.ckpt"
    content = torch.load(last, weights_only=True)
    del content["comet"]["data"]
    torch.save(content, last)
    moved = shutil.copytree(tmp_path / "rows", tmp_path / "moved")
    keys = [*keys, "resume=true"]
    train.main([*keys, "trainer.max_steps=3", f"data.root={moved}"])
    assert f"data.root: {moved} given, {tmp_path / 'rows'} before" in capsys.readouterr().out
    (moved / "qmsum/train.jsonl").write_text("")
    with pytest.raises(UserError, match=r"other train qmsum data"):
        train.main([*keys, "trainer.max_steps=4", f"data.root={moved}"])


def decoder(folder, layers=2):
    """A Llama with its tokenizer, as backbone.path takes it."""
    config = load(["data.kind=passkey", "backbone.vocab_size=300"])
    tokenizer = build.build_tokenizer(config)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    settings = LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads)
    LlamaForCausalLM(settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_decoder_may_move_but_not_change_its_shape(tmp_path, capsys):
    keys = [*keys_of("passkey", tmp_path), "trainer.max_steps=2"]
    train.main([*keys, f"backbone.path={decoder(tmp_path / 'one')}"])
    shutil.move(tmp_path / "one", tmp_path / "two")
    keys = [*keys[:-1], "resume=true", "trainer.max_steps=3"]
    train.main([*keys, f"backbone.path={tmp_path / 'two'}"])
    assert "trained 3 steps" in capsys.readouterr().out
    decoder(tmp_path / "two", layers=3)
    layers = r"num_hidden_layers is 3, it was 2"
    with pytest.raises(UserError, match=rf"^backbone.path: .*/two holds another .*: {layers}"):
        train.main([*keys, f"backbone.path={tmp_path / 'two'}"])


def test_the_checkpoints_own_configuration_is_kept_too(tmp_path):
    keys = keys_of("passkey", tmp_path)
    train.main([*keys, "trainer.max_steps=2"])
    (tmp_path / "runs/passkey/run/config.yaml").unlink()
    with pytest.raises(UserError, match=r"^seed: 1 given, but .* was started with 0"):
        train.main([*keys, "resume=true", "trainer.max_steps=3", "seed=1"])
