"""The accuracy of a model on a test set."""

import math

import torch

from lab.distributed import all_reduce_sum


@torch.no_grad()
def accuracy(model, batches, amp, pos=lambda n: None):
    """Accuracy (%) of the model on the batches of all ranks together; NaN if there are no images.

    pos(n) returns positions (T, 2) or (n, T, 2) for a batch of n images, or None for the model's own.
    """
    model.eval()
    count = torch.zeros(2, dtype=torch.int64, device=next(model.parameters()).device)  # correct, tested
    for images, labels in batches:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            correct = (model(images, pos(len(images))).argmax(dim=1) == labels).sum()
        count += torch.stack([correct, torch.full_like(correct, len(labels))])
    correct, tested = all_reduce_sum(count).tolist()
    return 100 * correct / tested if tested else math.nan
