"""Converts original checkpoints to folders that Transformers loads.

    # BLIP as Salesforce released it, the checkpoint that PVLF is built on
    python train_scripts/convert.py blip model_base_retrieval_coco.pth --tokenizer vocab.txt --output_dir outputs/blip

    # the same for pictures of 224 pixels
    python train_scripts/convert.py blip model_base_retrieval_coco.pth --image_size 224 --output_dir outputs/blip-224

    # the baseline TransAgg, trained on BLIP or on CLIP
    python train_scripts/convert.py transagg model.pt --tokenizer bert-base-uncased --output_dir outputs/transagg

Reads `.pth`, `.pt` and `.safetensors`, and runs nothing that is in them. A tokenizer is a Hub name, a folder or, for
BLIP, BERT's `vocab.txt` (bert-base-uncased); without one, the folder holds the model alone. A checkpoint that is not
exactly of the kind named is refused.
"""

import argparse
import sys
from pathlib import Path

from pvlf_hf.convert import convert_salesforce_blip, convert_transagg

LOADING = {
    "blip": [
        ("model", "from pvlf_hf import PVLFModel", "PVLFModel.from_vl_pretrained"),
        ("processor", "from pvlf_hf import PVLFProcessor", "PVLFProcessor.from_vl_pretrained"),
    ],
    "transagg": [
        ("model", "import pvlf_hf; from transformers import AutoModel", "AutoModel.from_pretrained"),
        ("processor", "from transformers import AutoProcessor", "AutoProcessor.from_pretrained"),
    ],
}


def parse_arguments(command_line: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="{blip,transagg}")
    blip = kinds.add_parser("blip", help="Salesforce's BLIP retrieval .pth -> BlipForImageTextRetrieval")
    transagg = kinds.add_parser("transagg", help="TransAgg, on BLIP or CLIP -> PVLFModel")
    for kind in (blip, transagg):
        kind.add_argument("checkpoint", help=".pth, .pt or .safetensors")
        kind.add_argument("--output_dir", required=True, help="a new or empty folder")
        kind.add_argument("--tokenizer", help="Hub name, folder, or BERT's vocab.txt; writes a processor too")
        kind.add_argument("--vision_heads", type=int, help="image encoder's attention heads, if its size is unusual")
        kind.add_argument("--text_heads", type=int, help="text encoder's attention heads, if its size is unusual")
    blip.add_argument("--image_size", type=int, help="interpolate the positions to this many pixels a side")
    return parser.parse_args(command_line)


def main(command_line: list[str]) -> None:
    """Converts, and says what was written and how to load it."""
    arguments = vars(parse_arguments(command_line))
    kind = arguments.pop("kind")
    (convert_salesforce_blip if kind == "blip" else convert_transagg)(**arguments)
    folder = Path(arguments["output_dir"])
    print(f"\n{folder} holds:")
    for path in sorted(folder.iterdir()):
        print(f"  {path.name:32} {path.stat().st_size:>13,} bytes")
    print("\nLoad it with:")
    for name, imported, loader in LOADING[kind]:
        if name == "model" or arguments["tokenizer"]:
            print(f'  {imported}\n  {name} = {loader}("{folder}")')
    if not arguments["tokenizer"]:
        print("It has no tokenizer: pass --tokenizer to have the processor too.")


if __name__ == "__main__":
    main(sys.argv[1:])
