"""`pvlf-hf train` as a script, for launchers: `accelerate launch train_scripts/train_pvlf.py RECIPE`."""

from pvlf_hf.commands.train import main

if __name__ == "__main__":
    main()
