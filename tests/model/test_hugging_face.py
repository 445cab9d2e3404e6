"""What people put around a Hugging Face model works around a CoMeT: pipelines, peft, Trainer."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline

from comet_pl import CometConfig, CometForCausalLM
from data.tokenizer import train_tokenizer
from tests.support.models import MEMORY, VOCABULARY, backbone, text, tiny

TEXT = "the cat sat on a mat and ran to the old red barn "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random CoMeT with its tokenizer, as save_pretrained leaves them."""
    folder, tokenizer = tmp_path_factory.mktemp("comet"), train_tokenizer([TEXT * 5], 300)
    torch.manual_seed(0)
    config = backbone("smollm3")
    config.vocab_size = len(tokenizer)
    memory = {"chunk_size": 5, "global_size": 2, "compression_stride": 3, "temporary_capacity": 4}
    CometForCausalLM(CometConfig(backbone_config=config, **memory)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_pipeline_writes_texts_and_chats(folder):
    write = pipeline("text-generation", model=str(folder))
    prompts = ["the cat sat", "on a mat and ran to the barn"]
    together = write(prompts, max_new_tokens=12, batch_size=2, do_sample=False)
    alone = [write([prompt], max_new_tokens=12, do_sample=False)[0] for prompt in prompts]
    assert together == alone
    assert all(
        one[0]["generated_text"].startswith(prompt)
        for one, prompt in zip(together, prompts, strict=True)
    )
    chat = write([{"role": "user", "content": "the cat"}], max_new_tokens=5)
    assert chat[0]["generated_text"][-1]["role"] == "assistant"


def test_peft_wraps_and_merges_it(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)(TEXT * 3, return_tensors="pt").input_ids
    before = model(ids).logits
    wrapped = get_peft_model(
        model,
        LoraConfig(
            target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
        ),
    )
    wrapped(input_ids=ids, labels=ids).loss.backward()
    assert {
        name.split(".")[-3] for name, p in wrapped.named_parameters() if p.grad is not None
    } == {"lora_A", "lora_B"}
    with torch.no_grad():
        logits = wrapped(input_ids=ids).logits
        assert not torch.allclose(logits, before, atol=1e-3)
        out = wrapped.generate(input_ids=ids, max_new_tokens=9, do_sample=False)
        merged = wrapped.merge_and_unload()
        assert isinstance(merged, CometForCausalLM)
        torch.testing.assert_close(merged(ids).logits, logits, atol=1e-4, rtol=1e-4)
        assert torch.equal(merged.generate(ids, max_new_tokens=9, do_sample=False), out)


def test_the_trainer_evaluates_and_keeps_the_best(folder, tmp_path):
    ids = AutoTokenizer.from_pretrained(folder)(TEXT * 2, return_tensors="pt").input_ids[0]
    rows = [{"input_ids": ids, "labels": ids}] * 3
    model = AutoModelForCausalLM.from_pretrained(folder)
    options = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
    }
    arguments = TrainingArguments(
        tmp_path, max_steps=2, report_to=[], use_cpu=True, per_device_eval_batch_size=2, **options
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    assert trainer.label_names == ["labels"]
    trainer.train()
    found = trainer.evaluate()
    with torch.no_grad():
        assert found["eval_loss"] == pytest.approx(
            model.eval()(ids[None], labels=ids[None]).loss.item(), rel=1e-4
        )
    without = trainer.predict([{"input_ids": ids}] * 3)
    assert without.predictions.shape == (3, len(ids), model.config.vocab_size)


@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_trainer_trains_it_with_token_correct_accumulation(folder, tmp_path, recompute):
    """Two micro-batches with different numbers of targets: the loss is the mean over tokens, as of
    one batch."""
    ids = AutoTokenizer.from_pretrained(folder)(TEXT * 2, return_tensors="pt").input_ids[0]
    rows = [
        {"input_ids": ids, "labels": ids},
        {"input_ids": ids, "labels": torch.where(torch.arange(len(ids)) < len(ids) - 4, -100, ids)},
    ]
    weights = []
    for size, accumulate in ((1, 2), (2, 1)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        options = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": accumulate,
            "gradient_checkpointing": recompute,
        }
        arguments = TrainingArguments(
            tmp_path / str(size),
            max_steps=2,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            **options,
        )
        before = model.model.layers[0].global_memory.gate.proj.weight.clone()
        Trainer(model, arguments, train_dataset=rows).train()
        assert not torch.equal(before, model.model.layers[0].global_memory.gate.proj.weight)
        weights.append(model.state_dict())
    torch.testing.assert_close(*weights, atol=1e-5, rtol=1e-4)


def arguments(folder, **options):
    usual = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    return TrainingArguments(folder, **usual | options)


class Named(CometForCausalLM):
    """A user's subclass, whose name no library has heard of."""


@pytest.mark.parametrize(
    "kind", [CometForCausalLM, pytest.param(Named, marks=pytest.mark.slow), "peft"]
)
def test_label_smoothing_learns_the_next_token(kind, tmp_path):
    """Each token is the one before plus 1: a model that learns to repeat its input is at 0 %."""
    torch.manual_seed(0)
    config = CometConfig(backbone("llama", initializer_range=0.02), **MEMORY)
    model = (CometForCausalLM if kind == "peft" else kind)(config)
    if kind == "peft":
        options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "r": 16}
        model = get_peft_model(model, LoraConfig(**options, modules_to_save=["lm_head"]))
    rows = [
        {"input_ids": (ids := (torch.arange(9) + i) % VOCABULARY), "labels": ids}
        for i in range(VOCABULARY)
    ]
    options = {"max_steps": 60, "learning_rate": 3e-2, "per_device_train_batch_size": 20}
    smoothed = arguments(tmp_path, label_smoothing_factor=0.1, **options)
    Trainer(model, smoothed, train_dataset=rows).train()
    ids = torch.stack([row["input_ids"] for row in rows])
    with torch.no_grad():
        likeliest = model.eval()(input_ids=ids).logits.argmax(-1)
    assert (likeliest[:, :-1] == ids[:, 1:]).float().mean() > 0.9


def test_the_trainer_gets_logits_beside_the_loss(tmp_path):
    rows = [{"input_ids": ids, "labels": ids} for ids in text(5, 12)]
    model, seen = tiny(dtype=torch.float32), []
    options = arguments(tmp_path, per_device_eval_batch_size=2)
    predicted = Trainer(model, options).predict(rows)
    with torch.no_grad():
        logits = model(text(5, 12)).logits
    torch.testing.assert_close(torch.from_numpy(predicted.predictions), logits)

    def accuracy(prediction):
        seen.append(prediction.predictions.shape)
        return {"accuracy": (prediction.predictions == prediction.label_ids).mean()}

    likeliest = {"preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)}
    trainer = Trainer(model, options, compute_metrics=accuracy, **likeliest)
    found = trainer.evaluate(rows)
    assert seen == [(5, 12)]
    expected = (logits.argmax(-1) == text(5, 12)).float().mean().item()
    assert found["eval_accuracy"] == pytest.approx(expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_batches_without_a_label_do_not_end_a_run(accumulate, smoothing, tmp_path):
    ids = text(4, 12)
    labels = ids.masked_fill((torch.arange(4) % 4 > 0)[:, None], -100)
    rows = [{"input_ids": i, "labels": t} for i, t in zip(ids, labels, strict=True)]
    model = tiny(dtype=torch.float32)
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulate}
    options |= {"max_steps": 4, "label_smoothing_factor": smoothing, "learning_rate": 1e-3}
    trainer = Trainer(model, arguments(tmp_path, **options), train_dataset=rows)
    assert trainer.train().global_step == 4
    if not smoothing:  # Hugging Face's own loss divides 0 by 0
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("use_cache", [True, False])
def test_padded_prompts_generate_what_each_does_alone(use_cache):
    model, prompts = tiny(), [text(1, 12, 1), text(1, 7, 2)]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "use_cache": use_cache}
    padded = [torch.nn.functional.pad(ids, (12 - ids.shape[1], 0)) for ids in prompts]
    masks = [
        torch.nn.functional.pad(torch.ones_like(ids), (12 - ids.shape[1], 0)) for ids in prompts
    ]
    together = model.generate(torch.cat(padded), attention_mask=torch.cat(masks), **options)
    for row, ids in zip(together, prompts, strict=True):
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert torch.equal(row[12:], alone[0, ids.shape[1] :])


def test_arguments_that_a_comet_has_not_are_refused_unless_they_are_none(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[5, 6, 7]])
    model(ids, inputs_embeds=None, output_attentions=False)
    with pytest.raises(
        ValueError, match="position_ids: given, but a CoMeT's forward has no such argument"
    ):
        model(ids, position_ids=ids)
