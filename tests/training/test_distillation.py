"""train.distill: the teacher is the plain decoder, and loss and gradients are as written."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from comet_pl import CometForCausalLM
from comet_pl.config.load import load
from comet_pl.config.schema import TrainConfig
from comet_pl.errors import UserError
from comet_pl.model.chunk_layout import ChunkPlan, fixed_chunks
from comet_pl.model.plain_decoder import plain_decoder
from comet_pl.training.distillation import Distillation, between_resets, without_lora
from comet_pl.training.trainable import add_adapters
from comet_pl.training.windows import count_targets
from tests.support.models import FAMILIES, FEW, VOCABULARY, backbone, text
from tests.support.tiny_runs import TINY, scalars
from tests.support.training import close, cuts, fit, gradients_of, ragged
from train import main

MEMORY = {"chunk_size": 5, "global_size": 2, "compression_stride": 3, "temporary_capacity": 4}
LAYOUTS = ["interleaved", "trailing"]


def decoder(family="qwen3", **more):
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(backbone(family, **more)).double().eval()


def plugged(plain, **comet):
    torch.manual_seed(4)
    return CometForCausalLM.from_decoder(copy.deepcopy(plain), comet=MEMORY | comet)


def stirred(model):
    """Adapters that have learnt something."""
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "trainable_tokens" in name:
            parameter.data.normal_()
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parameters", ["memory", "memory+lora"])
def test_the_teacher_is_the_plain_decoder(family, parameters):
    plain, ids = decoder(family), text(2, 17)
    model = plugged(plain)
    add_adapters(model, TrainConfig(parameters=parameters))
    learning = {name for name, p in stirred(model).named_parameters() if p.requires_grad}
    with torch.no_grad():
        expected = plain(ids).logits
        with without_lora(model):
            found = plain_decoder(model)(ids).logits[..., :VOCABULARY]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        if "lora" in parameters:
            other = plain_decoder(model)(ids).logits[..., :VOCABULARY]
            assert not torch.allclose(other, expected)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == learning


def as_written(plain, model, batch, weight, length):
    """The step's loss and divergence, from all logits of each row and each document."""
    entropy = divergence = targets = 0.0
    for b, mask in enumerate(batch["attention_mask"].bool()):
        ids, labels = batch["input_ids"][b, mask], batch["labels"][b, mask]
        plan = batch["plans"][b] if "plans" in batch else None
        plan = plan or ChunkPlan(tuple(fixed_chunks(len(ids), model.config.chunk_size)))
        if len(ids) == 0:
            continue
        found = model(ids[None], plans=[plan], use_cache=False, logits_to_keep=0).logits[0]
        starts, place = [], 0
        for size, reset in zip(plan.sizes, plan.resets or [False] * len(plan.sizes), strict=True):
            starts += [place] if reset or not place else []
            place += size
        for i in range(len(ids) - 1):
            if labels[i + 1] == -100:
                continue
            first = max(start for start in starts if start <= i)
            half, j = max(1, length // 2), i - first
            # the earliest piece that holds the position
            first += half * max(0, -(-(j + 1 - length) // half))
            with torch.no_grad():
                taught = plain(ids[None, first : i + 1]).logits[0, -1].log_softmax(-1)
            mine = found[i].log_softmax(-1)
            entropy = entropy - mine[labels[i + 1]]
            divergence = divergence + (taught.exp() * (taught - mine[:VOCABULARY])).sum()
            targets += 1
    loss = ((1 - weight) * entropy + weight * divergence) / max(1, targets)
    return loss, divergence / max(1, targets)


@FEW
@given(
    case=cuts(strides=True),
    layout=st.sampled_from(LAYOUTS),
    weight=st.sampled_from([0.3, 1.0]),
    length=st.sampled_from([2, 3, 6, 11, 40]),
)
def test_loss_and_gradients_are_as_written(case, layout, weight, length):
    batch, chunk_size, _ = case
    plain = decoder()
    model = plugged(plain, layout=layout, chunk_size=chunk_size)
    add_adapters(model, TrainConfig(parameters="memory"))
    straight = copy.deepcopy(model).train()
    loss, divergence = as_written(plain, straight, batch, weight, length)
    module, watch = fit(model, [batch], parameters="memory", distill=weight, teacher_length=length)
    divided = float(module.distillation.kl) / max(1, count_targets(batch))
    assert divided == pytest.approx(float(torch.as_tensor(divergence).detach()), rel=1e-8)
    if isinstance(loss, torch.Tensor):
        loss.backward()
    learning = dict(straight.named_parameters())
    for name, expected in gradients_of(straight).items():
        both = watch.gradients[0][name], expected
        one, other = (torch.zeros_like(learning[name]) if g is None else g for g in both)
        close(one, other, 1e-8)


@pytest.mark.parametrize(
    "train", [{"recompute": "cell"}, {"recompute": "chunk"}, {"accumulate": 2}]
)
@pytest.mark.parametrize("windows", [None, 2])
def test_other_ways_to_the_same_step(train, windows):
    batches = [ragged([23, 17, 9], 1.0, seed=seed) for seed in range(2)]
    same = {"parameters": "memory+lora", "distill": 0.7, "bptt_chunks": windows}
    watched = []
    for more in ({}, train):
        model = plugged(decoder())
        add_adapters(model, TrainConfig(parameters="memory+lora"))
        watched.append(fit(stirred(model), batches, **same | more))
    (one, first), (other, second) = watched
    close(first.gradients, second.gradients, 1e-8)
    close(one.distillation.kl, other.distillation.kl)


def test_texts_between_resets():
    plans = [ChunkPlan((2, 3), (True, False)), ChunkPlan((4, 1), (False, True)), ChunkPlan((), ())]
    assert between_resets(plans) == [9, 1]
    assert between_resets([ChunkPlan(())]) == [0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A plain decoder with the tokenizer of a tiny run."""
    root = tmp_path_factory.mktemp("decoder")
    steps = [f"run.root={root}", "run.name=a", "trainer.max_steps=1", "eval.after_fit=false"]
    main([*TINY, "data.kind=passkey", *steps])
    from comet_pl.experiment.checkpoint import load_trained

    model, tokenizer, _ = load_trained(root / "passkey" / "a", [])
    config = copy.deepcopy(model.config.backbone_config)
    config.vocab_size = model.config.first_new_id
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "plain")
    tokenizer.save_pretrained(root / "plain")
    return root / "plain"


@pytest.mark.slow
def test_a_training_follows_its_teacher(folder, tmp_path):
    """The divergence is logged, and shrinks; the loss is the divergence where it has all weight."""
    keys = [*TINY, "data.kind=passkey", f"backbone.path={folder}", f"run.root={tmp_path}"]
    keys += ["run.name=a", "train.parameters=memory", "train.distill=1", "trainer.max_steps=20"]
    keys += ["train.lr=3e-3", "train.warmup_steps=0", "trainer.log_every_n_steps=1"]
    main([*keys, "eval.after_fit=false", "data.train_length=64", "model.layout=trailing"])
    logged = scalars(tmp_path / "passkey" / "a")[0]
    kl, loss = dict(logged["train/kl"]), dict(logged["train/loss"])
    assert len(kl) == 20 and kl == pytest.approx(loss, rel=1e-5)
    assert kl[20] < 0.8 * kl[1]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["train.distill=0.5"], "train.distill: 0.5 given, but train.parameters=all changes"),
        (["train.teacher_length=64"], "train.teacher_length: 64 given, but train.distill is 0"),
        (
            ["train.distill=1", "train.parameters=memory", "trainer.strategy=layer_pipeline"],
            "train.distill: 1.0 given, but trainer.strategy is layer_pipeline",
        ),
        (["train.distill=2"], "train.distill: 2 given, allowed: number >= 0 and <= 1"),
    ],
)
def test_without_a_teacher(keys, message):
    with pytest.raises(UserError) as error:
        load([*TINY, "data.kind=passkey", *keys])
    assert str(error.value).startswith(message), error.value


def test_a_teacher_has_no_more_positions_than_the_decoder():
    model = plugged(decoder(max_position_embeddings=64))
    with pytest.raises(UserError, match=r"^train.teacher_length: 65 given, but .* 64 pos"):
        Distillation(model, 1.0, 65)
    assert Distillation(model, 1.0, None).length == 64
