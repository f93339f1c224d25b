"""Make a run folder from a published ViT for ImageNet.

    python -m lab.pretrained model.safetensors --out runs/mixed-small
    python -m lab.evaluate runs/mixed-small --data-dir DIR --sizes 160 224 320 --shift
    python train.py --init runs/mixed-small --out runs/mine --dataset imagenet --data-dir DIR --epochs 5 --opt adamw

It accepts the twelve RoPE-ViTs of Heo et al. 2024 (small, base and large; axial and mixed; with and without an absolute
embedding) and plain ViTs, from timm (model.safetensors or pytorch_model.bin) or from the authors (.pth). Images are
normalised by ImageNet's mean and standard deviation, as RoPE-ViT's are; some plain ViTs want 0.5 for both. For other
sizes, absolute embeddings are resampled with antialiasing, as in timm; the authors' code does without it.
"""

import sys
from pathlib import Path

import torch

from lab.cli import Parser, folder, number
from lab.errors import one_line_errors
from lab.files import locked, write_json
from lab.imagenet import IMAGENET_1K
from lab.run import check_folder, save_checkpoint
from lab.weights import read_weights
from vit import ViT


def parse_args(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="its weights")
    add("--out", type=folder, required=True, help="run folder to write")
    add("--heads", type=number(int, least=1), help="attention heads (width / 64)")
    add("--pe", choices=["axial", "ape"], help="which of the two, if names and shapes are those of both")
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    args = parse_args(argv)
    vit, weights = read_weights(args.file, args.heads, args.pe)
    model = ViT(**vit)
    model.load_state_dict(weights)
    with locked(args.out):
        check_folder(args.out, resume=False)
        config = {"pe": vit["pe"], "pe_options": {}, "dataset": "imagenet", "seed": 0, "epochs": 0}
        classes = IMAGENET_1K if vit["num_classes"] == 1000 else f"{vit['num_classes']} classes that are not known here"
        config |= {"init": args.file, "data_set": classes}
        state = {"model": model, "optimizer": torch.optim.SGD(model.parameters()), "step": 0, "log": []}
        write_json(args.out / "config.json", config | vit)
        save_checkpoint(args.out, state, config, vit=vit, data={"img_size": vit["img_size"], "workers": 8})
    print(f"{args.out}: {', '.join(f'{name} {value}' for name, value in vit.items())}")


if __name__ == "__main__":
    sys.exit(main())
