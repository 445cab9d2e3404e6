"""Files from outside: no code of theirs runs, nothing is missing, unknown or not finite in silence,
and what was damaged after it was written is refused, or is the same."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from comet_pl import CometCache, CometForCausalLM
from comet_pl.errors import UserError
from comet_pl.experiment.checkpoint import RESUMED, check_resumable, load_trained, read_checkpoint
from comet_pl.experiment.loading import load_model, load_tokenizer
from comet_pl.export import export
from tests.support.damage import damages
from tests.support.models import backbone, text
from tests.support.trained import SMALL, main

ROOT = Path(__file__).resolve().parents[2]
EVIL = """
open({note!r}, "w")
from transformers import PreTrainedTokenizerFast, PretrainedConfig
class Tokenizer(PreTrainedTokenizerFast): pass
class Config(PretrainedConfig): model_type = "unheard_of"
"""


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    export(trained, folder)
    return folder


@pytest.fixture
def folder(exported, tmp_path):
    """A copy of an exported model without digests, as others write folders."""
    copy = Path(shutil.copytree(exported, tmp_path / "model"))
    (copy / "sha256.json").unlink()
    return copy


def edit_json(file, **changes):
    facts = json.loads(file.read_text())
    facts.update(changes)
    file.write_text(json.dumps({key: value for key, value in facts.items() if value is not None}))


def edit_weights(folder, change):
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


# ---- foreign code


@pytest.mark.parametrize("what", ["tokenizer", pytest.param("config", marks=pytest.mark.slow)])
def test_no_code_of_a_folder_runs_and_nobody_is_asked(folder, what, tmp_path):
    note = tmp_path / "it ran"
    (folder / "evil.py").write_text(EVIL.format(note=str(note)))
    if what == "tokenizer":
        names = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
        file, changes = "tokenizer_config.json", {"tokenizer_class": "EvilTokenizer"}
    else:
        names, file = {"AutoConfig": "evil.Config"}, "config.json"
        changes = {"model_type": "unheard_of"}
    edit_json(folder / file, auto_map=names, **changes)
    ended = subprocess.run(
        [sys.executable, "-m", "comet_pl.ask", str(folder), "--interactive"],
        input="y\ny\nWhat is blue?\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=False,
        timeout=120,
    )
    assert not note.exists()
    assert "[y/N]" not in ended.stdout + ended.stderr
    assert ended.returncode == 2, ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert str(folder) in line
    load = load_model if what == "config" else load_tokenizer
    with pytest.raises(UserError, match=r"^what: "):
        load(folder, "what")
    assert not note.exists()


class Bomb:
    """What runs a command when it is unpickled."""

    def __init__(self, note):
        self.note = str(note)

    def __reduce__(self):
        return os.system, (f"touch {self.note}",)


def test_pickles_are_read_as_plain_types_only(folder, tmp_path):
    note = tmp_path / "it ran"
    checkpoint = tmp_path / "last.ckpt"
    for content in (Bomb(note), {"comet": {}, "state_dict": {"x": Bomb(note)}, "global_step": 1}):
        torch.save(content, checkpoint)
        with pytest.raises(UserError, match=r"not a readable checkpoint|not one that train"):
            read_checkpoint(checkpoint)
        checkpoint.write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match=r"not a readable checkpoint|not one that train"):
            read_checkpoint(checkpoint)
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Bomb(note)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"^what: ."):
        load_model(folder, "what")
    assert not note.exists()


# ---- weights


def drop(name):
    return lambda weights: weights.pop(name)


FAULTS = {
    "missing for model.layers.0.self_attn.q": drop("model.layers.0.self_attn.q_proj.weight"),
    "missing for model.layers.1.global_memory.norm": drop(
        "model.layers.1.global_memory.norm.weight"
    ),
    "unknown weights model.layers.9.mlp": lambda w: w.update(
        {"model.layers.9.mlp.up_proj.weight": torch.ones(2)}
    ),
    r"model.layers.0.mlp.up_proj.weight has values that are NaN": lambda w: w[
        "model.layers.0.mlp.up_proj.weight"
    ][0].fill_(torch.nan),
    r"model.norm.weight has values that are NaN or infinite": lambda w: w["model.norm.weight"][
        :1
    ].fill_(torch.inf),
}


@pytest.mark.parametrize("line", FAULTS)
def test_weights_are_all_there_and_finite(folder, line):
    edit_weights(folder, FAULTS[line])
    with pytest.raises(ValueError, match=line):
        CometForCausalLM.from_pretrained(folder)
    with pytest.raises(UserError, match=line):
        load_trained(folder, [f"ckpt={folder}"])
    target = folder.with_name("again")
    with pytest.raises(UserError, match=line):
        export(folder, target)
    assert not target.exists()


@pytest.mark.parametrize("layers", [1, 4])
def test_a_configuration_of_other_layers_is_refused(folder, layers):
    facts = json.loads((folder / "config.json").read_text())["backbone_config"]
    facts["num_hidden_layers"] = layers
    facts.pop("layer_types", None)
    edit_json(folder / "config.json", backbone_config=facts)
    with pytest.raises(UserError, match="weights"):
        load_model(folder, "what")


def test_memories_and_biases_that_are_asked_for_or_switched_off(folder):
    model = CometForCausalLM.from_pretrained(folder, comet={"global_size": 0})
    assert model.config.global_size == 0
    bias = CometForCausalLM.from_pretrained(folder, comet={"gate_bias": 2.0})
    found = [p for name, p in bias.named_parameters() if name.endswith("gate.proj.bias")]
    assert found and all(float(p) for p in found)


def test_a_plain_decoder_lacks_nothing_either(tmp_path):
    LlamaForCausalLM(backbone("llama")).save_pretrained(tmp_path)
    CometForCausalLM.from_pretrained(tmp_path, comet={"chunk_size": 8})
    edit_weights(tmp_path, drop("model.layers.0.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"weights are missing for model.layers.0.mlp.up_proj"):
        CometForCausalLM.from_pretrained(tmp_path, comet={"chunk_size": 8})


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone_config": None},
        {"backbone_config": []},
        {"chunk_size": "x"},
        {"backbone_config": {"model_type": "llama", "num_attention_heads": 0}},
        {"readout_token_ids": [-3]},
        {"dtype": "no_such_dtype"},
    ],
    ids=str,
)
def test_impossible_configurations_are_one_line(folder, changes):
    edit_json(folder / "config.json", **changes)
    with pytest.raises(UserError, match=r"^what: .") as caught:
        load_model(folder, "what")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "null", "{", ""])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_other_content_is_one_line(folder, name, content):
    (folder / name).write_text(content)
    load = load_model if name == "config.json" else load_tokenizer
    with pytest.raises(UserError, match=r"^what: .") as caught:
        load(folder, "what")
    assert "\n" not in str(caught.value)


# ---- digests


def test_a_folder_that_changed_says_how_to_accept_it(exported, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "model"))
    edit_json(folder / "config.json", chunk_size=8)
    remedy = f"delete {folder / 'sha256.json'}"
    with pytest.raises(ValueError, match=r"config.json: damaged: .*" + remedy):
        CometForCausalLM.from_pretrained(folder)
    (folder / "sha256.json").unlink()
    model = CometForCausalLM.from_pretrained(folder)
    assert model.config.chunk_size == 8
    # What it saves has digests of nobody.
    shutil.copy(exported / "sha256.json", folder)
    model.save_pretrained(folder)
    assert CometForCausalLM.from_pretrained(folder).config.chunk_size == 8


# ---- checkpoints that resume


@pytest.mark.parametrize("key", RESUMED)
def test_a_checkpoint_without_a_part_is_not_resumed(trained, key):
    path = trained / "checkpoints" / "last.ckpt"
    content = read_checkpoint(path)
    check_resumable(content, path)
    kind = RESUMED[key]
    for value in (None, 3 if kind is str else "x", *([] if kind is int else [kind()])):
        with pytest.raises(UserError, match=f"cannot be resumed: no {key} in it"):
            check_resumable(content | {key: value}, path)


@pytest.mark.parametrize("part", ["optimizer", "random"])
def test_states_that_cannot_be_gone_on_from_are_one_line(trained, tmp_path, part):
    run = Path(shutil.copytree(trained, tmp_path / "passkey" / "trained"))
    path = run / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    if part == "optimizer":
        content["optimizer_states"][0]["state"][3]["exp_avg"][0] = torch.nan
    else:
        content["random_states"][0]["torch"] = content["random_states"][0]["torch"][:10]
    torch.save(content, path)
    keys = [f"run.root={tmp_path}", "run.name=trained", *SMALL, "resume=true"]
    with pytest.raises(UserError, match=rf"last.ckpt: cannot be resumed: .*{part}_state"):
        main([*keys, "trainer.max_steps=6"])


def test_a_damaged_state_inside_is_one_line(trained, tmp_path):
    run = Path(shutil.copytree(trained, tmp_path / "passkey" / "trained"))
    path = run / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    content["optimizer_states"] = [{"state": {}, "param_groups": []}]
    torch.save(content, path)
    keys = [
        f"run.root={tmp_path}",
        "run.name=trained",
        *SMALL,
        "resume=true",
        "trainer.max_steps=6",
    ]
    with pytest.raises(UserError, match=r"last.ckpt: cannot be resumed: .") as caught:
        main(keys)
    assert "\n" not in str(caught.value)


def test_the_checkpoint_of_another_run_is_refused(trained, tmp_path):
    run = Path(shutil.copytree(trained, tmp_path / "passkey" / "trained"))
    (run / "config.yaml").unlink()
    keys = [f"run.root={tmp_path}", "run.name=trained", *SMALL, "resume=true", "seed=7"]
    with pytest.raises(UserError, match=r"^seed: 7 given, but .* was started with 0"):
        main(keys)


def test_best_ckpt_resumes_where_last_ckpt_is_gone(trained, tmp_path, capsys):
    run = Path(shutil.copytree(trained, tmp_path / "passkey" / "trained"))
    (run / "checkpoints" / "last.ckpt").unlink()
    step = read_checkpoint(run / "checkpoints" / "best.ckpt")["global_step"]
    main([f"run.root={tmp_path}", "run.name=trained", *SMALL, "resume=true", "trainer.max_steps=5"])
    assert (
        f"continues from step {step} of best.ckpt (there is no last.ckpt)"
        in capsys.readouterr().out
    )
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 5


def test_a_damaged_last_ckpt_names_best_ckpt(trained, tmp_path):
    run = Path(shutil.copytree(trained, tmp_path / "passkey" / "trained"))
    last, best = (run / "checkpoints" / name for name in ("last.ckpt", "best.ckpt"))
    content = bytearray(last.read_bytes())
    weight = next(iter(torch.load(last, weights_only=True)["state_dict"].values()))
    content[content.index(weight.numpy().tobytes())] ^= 4
    last.write_bytes(content)
    with pytest.raises(UserError, match=rf"last.ckpt: damaged: .*; {best} may be whole"):
        main([f"run.root={tmp_path}", "run.name=trained", *SMALL, "resume=true"])


# ---- random damage


@pytest.fixture(scope="module")
def targets(trained, exported, tmp_path_factory):
    """{name: (file, what a reader makes of it)}; all as this version writes them."""
    place = tmp_path_factory.mktemp("targets")
    shutil.copy(trained / "checkpoints" / "last.ckpt", place / "last.ckpt")
    model = CometForCausalLM.from_pretrained(exported)
    with torch.no_grad():
        model(text(1, 50) + 4).past_key_values.save(place / "book.memory")
    copy = Path(shutil.copytree(exported, place / "model"))

    def weights(_):
        return dict(load_model(copy, "what").state_dict())

    def words(_):
        return load_tokenizer(copy, "what").backend_tokenizer.to_str()

    def memory(path):
        cache = CometCache.load(path)
        tensors = {
            f"{i}.{k}": t for i, m in enumerate(cache.memories) for k, t in m._asdict().items()
        }
        return tensors | {"rows": cache.rows, "columns": cache.columns}

    return {
        "checkpoint": (place / "last.ckpt", read_checkpoint),
        "memory": (place / "book.memory", memory),
        "weights": (copy / "model.safetensors", weights),
        "config": (copy / "config.json", weights),
        "tokenizer": (copy / "tokenizer.json", words),
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize(
    "times", [8, pytest.param(400, marks=pytest.mark.slow)], ids=["", "2,000 in all"]
)
@pytest.mark.parametrize("name", ["checkpoint", "memory", "weights", "config", "tokenizer"])
def test_flipped_bits_and_cuts_are_refused_or_harmless(targets, name, times):
    file, read = targets[name]
    expected, refused = read(file), 0
    for number in damages(file, times):
        try:
            found = read(file)
        except (UserError, ValueError) as error:
            refused += "\n" not in str(error)
        else:
            assert same(found, expected), f"damage {number} was read as something else"
    assert refused >= times // 2
