"""DPO from Python, without the command line: python examples/dpo.py MODEL PAIRS OUT.

PAIRS is a file of rows with `prompt`, `chosen` and `rejected`. OUT gets a Hugging Face folder.
"""

import functools
import sys

import torch
from lightning import Trainer, seed_everything
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_align import DPOModule, Network, PreferenceDataModule, Source


def main(model: str, pairs: str, out: str) -> None:
    """Train and save."""
    seed_everything(0)
    data = PreferenceDataModule(model, [Source(pairs)], batch_size=8, val_fraction=0.1, max_length=512)
    module = DPOModule(
        Network(model),
        beta=0.1,  # the price of leaving the reference, which is the model itself
        optimizer=functools.partial(torch.optim.AdamW, lr=5e-7),
    )
    trainer = Trainer(max_epochs=1, accumulate_grad_batches=2, logger=False, enable_checkpointing=False)
    trainer.fit(module, data)
    print({name: round(float(value), 4) for name, value in trainer.callback_metrics.items()})

    # `exported` is a plain transformers model.
    module.exported().save_pretrained(out)
    data.tokenizer.save_pretrained(out)
    AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
