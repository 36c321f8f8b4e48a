"""Trains the tiny model on random tensors for a few steps; started by `test_distributed.py`, alone or by torchrun."""

import sys

import torch
from safetensors.torch import save_file
from tiny import make_inputs, make_model, make_processor

from pvlf_hf import PVLFTrainer, PVLFTrainingArguments

BATCH = 12


class Rows(torch.utils.data.Dataset):
    """36 queries; every third wants the same target as the row before, across the border of processes too."""

    def __init__(self):
        self.inputs = make_inputs("blip", batch=36)
        self.target_ids = torch.arange(36) - (torch.arange(36) % 3 == 2).long()
        repeated = torch.where(self.target_ids != torch.arange(36))[0]
        self.inputs["target_pixel_values"][repeated] = self.inputs["target_pixel_values"][repeated - 1]

    def __len__(self):
        return 36

    def __getitem__(self, row):
        return {**{k: v[row] for k, v in self.inputs.items()}, "target_ids": self.target_ids[row]}


def main(output_dir, finetuning, gather, chunk_size=None):
    torch.set_num_threads(1)
    args = PVLFTrainingArguments(
        output_dir=output_dir,
        use_cpu=True,
        max_steps=3,
        finetuning=finetuning,
        learning_rate=1e-3,
        encoder_learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,  # every trained weight gets a gradient
        gather_negatives=gather == "gather",
        gradient_cache_chunk_size=chunk_size and int(chunk_size),
        loss_chunk_size=chunk_size and int(chunk_size),
    )
    args.per_device_train_batch_size = BATCH // args.world_size
    model = make_model("blip", dropout=0.0)
    trainer = PVLFTrainer(
        model, args, Rows(), processing_class=make_processor(), data_collator=torch.utils.data.default_collate
    )
    trainer.train()
    if trainer.is_world_process_zero():
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        facts = {
            "loss": torch.tensor([entry["loss"] for entry in history]),
            "grad_norm": torch.tensor([entry["grad_norm"] for entry in history]),
            "world_size": torch.tensor(args.world_size),
        }
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        save_file({**facts, **weights}, f"{output_dir}/outcome.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
