"""`--KEY.help` at any depth: it explains the key, with or without a configuration file."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_align.cli.entry import main

EXPLAINED = {
    "--model.network.lora.help": ["model.network.lora: Lora | null", "model.network.lora.r: int = 16", "rank of the"],
    "--model.network.help": ["model.network.name: str (must be given)", "hub name or folder"],
    "--data.train.help": ["data.train: list[Source] (must be given)", "data.train.limit: int | null = null"],
    "--data.init_args.train.limit.help": ["data.train.limit: int | null = null", "read only the first"],
    "--model.help": ["classes for model; --model.help CLASS", "DPOModule: ", "SFTModule: "],
    "--data.help": ["PreferenceDataModule: "],
    "--model.help SFTModule": ["keys of SFTModule", "model.neftune_alpha: float | null = null", "model.sampling: "],
    "--model.help=DPOModule": ["keys of DPOModule", "model.reference: Network | null"],
    "--model.reward.help": ["NumericAnswer: ", "FunctionReward: "],
    "--model.reward.help LengthReward": ["model.reward.target: int (must be given)"],
    "--model.beta.help": ["strength of the KL constraint"],
    "--model.optimizer.help": ["AdamW: "],
    "--model.optimizer.help AdamW": ["model.optimizer.lr: "],
    "--trainer.callbacks.help": ["WeightEMA: "],
    "--trainer.help": ["trainer.max_epochs: "],
    "--checkpoint.monitor.help": ["checkpoint.monitor: "],
}


@pytest.mark.parametrize(("words", "parts"), EXPLAINED.items())
def test_a_key_is_explained(words: str, parts: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(["fit", *words.split()]) is None
    said = capsys.readouterr().out
    assert [part for part in parts if part not in said] == []


def test_the_classes_of_a_configuration_decide(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "c.yaml").write_text(
        "model: {class_path: lit_align.PPOModule, init_args: {reward: {class_path: lit_align.SumReward}}}\n"
    )
    main(["fit", "-c", str(tmp_path / "c.yaml"), "--model.help"])
    assert "keys of PPOModule" in capsys.readouterr().out
    main(["fit", "-c", str(tmp_path / "c.yaml"), "--model.reward.weights.help"])
    assert "model.reward.weights: list[float] | null = null" in capsys.readouterr().out
    main(["fit", "--model=RewardModule", "--model.loss.help"])
    assert "bradley_terry" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--model.nope.help", "no class of model has the key 'nope'"),
        ("--nope.help", "unknown key 'nope'; keys are model, data, trainer, checkpoint"),
        ("--model.help Nope", "no class 'Nope'; known are .*DPOModule"),
        ("--model.reward.help Nope", "no class 'Nope'; known are .*NumericAnswer"),
    ],
)
def test_what_has_no_help(words: str, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        main(["fit", *words.split()])
