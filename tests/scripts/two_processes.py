"""For torchrun with two processes: their averaged gradients equal those of one process on the whole batch.

Norms are in eval mode, and all is in float64: rounding that differs with the batch size would flip signs.
"""
import copy

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import timm_el  # noqa: F401

dist.init_process_group('gloo')
torch.manual_seed(0)
model = timm.create_model('el_resnet26', num_classes=5, layers=[1, 1, 1, 1], channels=[16, 16, 32, 32]).eval().double()
x, y = torch.randn(8, 3, 64, 64).double(), torch.randint(5, (8,))
rank = dist.get_rank()
part = slice(4 * rank, 4 * rank + 4)
alone = copy.deepcopy(model)
parallel = DistributedDataParallel(model)  # its reducer must outlive backward
F.cross_entropy(parallel(x[part]), y[part]).backward()
F.cross_entropy(alone(x), y).backward()
for (key, ours), p in zip(model.named_parameters(), alone.parameters()):
    torch.testing.assert_close(ours.grad, p.grad, msg=lambda text, key=key: f"{key}: {text}")
if rank == 0:
    print('gradients agree')
dist.destroy_process_group()
