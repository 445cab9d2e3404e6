"""The validation's accuracy on passkeys."""

import torch

from callbacks.passkey_heatmap import exact_match


def test_exact_match_asks_for_the_digits_alone():
    labels = torch.full((4, 9), -100)
    labels[:3, -4:] = torch.tensor([5, 6, 7, 1])  # three digits and the stop token
    logits = torch.zeros(4, 5, 10)  # the last five columns
    for column, token in enumerate([5, 6, 7, 9]):  # a wrong stop token
        logits[:, column, token] = 1
    logits[1, 1, 8] = 2  # a wrong digit
    assert exact_match(logits, labels, digits=3).tolist() == [True, False, True, False]
