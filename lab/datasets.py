"""The data sets by name: one class and one line each. (train.py has their recipes.)"""

from lab.data import CIFAR100, Bearing, BearingCorner
from lab.imagenet import ImageNet

DATASETS = {
    "cifar100": CIFAR100,
    "imagenet": ImageNet,
    "bearing": Bearing,
    "bearing-corner": BearingCorner,
}
