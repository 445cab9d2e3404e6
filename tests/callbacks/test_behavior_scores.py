"""The accuracy on questions about behaviour that validation shows."""

import pytest
import torch

from callbacks.behavior_scores import BehaviorScores


class Module:
    device = torch.device("cpu")

    class model:
        class config:
            first_new_id = 9


@pytest.mark.parametrize("wrong", [None, 0, 1, 2])
def test_an_answer_is_right_if_all_its_tokens_are(wrong):
    """Left-padded answers of two and of three tokens; new tokens never count, however likely."""
    labels = torch.tensor([[-100, -100, -100, 5, 6], [-100, -100, 3, 4, 7]])
    logits = torch.zeros(2, 4, 11)
    for row in range(2):
        for column in range(2, 5):
            if labels[row, column] != -100:
                logits[row, column - 2, labels[row, column]] = 1.0
    logits[:, :, 10] = 5.0
    if wrong is not None:
        logits[1, wrong, 8] = 2.0
    scores = BehaviorScores()
    scores.on_validation_epoch_start(None, Module)
    batch = {"labels": labels, "logits_to_keep": 4}
    batch |= {"kinds": ["count", "last_time"], "ages": [5, 2000]}
    scores.on_validation_batch_end(None, Module, {"logits": logits}, batch, 0)
    kinds = scores.metric.compute()["kinds"]
    assert kinds["count"]["accuracy"] == 1
    assert kinds["last_time"]["accuracy"] == (wrong is None)
