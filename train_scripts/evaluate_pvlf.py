"""`pvlf-hf evaluate` as a script, for launchers: `torchrun --nproc_per_node 4 train_scripts/evaluate_pvlf.py ...`."""

from pvlf_hf.commands.evaluate import main

if __name__ == "__main__":
    main()
