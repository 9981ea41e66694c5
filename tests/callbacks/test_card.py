"""The model card of an exported folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from support.configs import config
from support.tiny import tiny_folder

from lit_align import Lora, Network, RewardModule
from lit_align.callbacks import HFExport, Manifest, MetricsCSV
from lit_align.callbacks.card import model_card
from lit_align.callbacks.manifest import model_hash
from lit_align.cli.entry import main
from lit_align.data.source import Source


def test_a_card_says_what_the_run_was(parts: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stages by the command line: the second names the first, and what that came from."""
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "cache"))
    start, rows = parts
    first, second = tmp_path / "sft", tmp_path / "dpo"
    for method, folder, out in (("sft", start, first), ("dpo", str(first / "model"), second)):
        content = config(method, folder, rows, out, max_steps=2)
        (tmp_path / f"{method}.yaml").write_text(yaml.safe_dump(content))
        main(["fit", "-c", str(tmp_path / f"{method}.yaml"), "--seed_everything=3"])
    card = ModelCard.load(second / "model" / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lit_align", "dpo"],
    }
    text = card.text
    assert "# dpo\n" in text
    assert "(Rafailov et al. 2023)" in text
    # Data, with what the manifest says of them; metrics, with what was logged last.
    manifest = json.loads((second / "manifest.json").read_text())
    for entry in manifest["data"]:
        assert f"| {entry['part']} | `{rows / 'rankings.json'}` | 8 rows, " in text
        assert f"| `{entry['fingerprint']}` |" in text
    last = (second / "metrics.csv").read_text().splitlines()
    losses = dict(zip(last[0].split(","), last[-1].split(","), strict=True))
    assert f"| train/loss | {float(losses['train/loss']):.5g} |" in text
    assert "after 2 optimizer steps" in text
    # The parent by the keys that name it, with its hash and its method; below it, its own parent.
    hashes = model_hash(first / "model"), model_hash(Path(start))
    lines = text.splitlines()
    at = lines.index(
        f"- model.network.name, data.tokenizer: `{first / 'model'}`, weights of sha256 `{hashes[0]}`, trained by "
        "`SFTModule`"
    )
    assert lines[at + 1] == f"  - model.network.name, data.tokenizer: `{start}`, weights of sha256 `{hashes[1]}`"
    assert "- seed: 3\n" in text
    assert f"torch {manifest['packages']['torch']}" in text
    # The configuration is one that runs, and gives the same card.
    told = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert told["data"]["init_args"]["batch_size"] == 2
    assert not {"out", "ckpt_path"} & {*told, *told["checkpoint"], *told["trainer"]}
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(told))
    main(["fit", "-c", str(tmp_path / "again.yaml"), "--out", str(tmp_path / "again" / "dpo")])
    assert (tmp_path / "again" / "dpo" / "model" / "README.md").read_text() == (second / "model/README.md").read_text()


def test_a_card_without_the_command_line(fit: Callable, parts: tuple[str, Path], tmp_path: Path) -> None:
    trainer = fit(HFExport(tmp_path / "polite"))
    text = (tmp_path / "polite" / "README.md").read_text()
    assert "# polite\n" in text
    assert "SFTModule" in text
    assert "demos.json` | 8 rows, 8 examples |" in text
    assert f"| train/loss | {trainer.callback_metrics['train/loss']:.5g} |" in text
    assert f"- `{parts[0]}`" in text  # its start, without a hash that nothing took
    assert "config.yaml" not in text


def test_metrics_are_those_of_the_last_step(fit: Callable, tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path / "run")
    options = {"max_epochs": -1, "max_steps": 11, "log_every_n_steps": 1}
    trainer = fit(HFExport(tmp_path / "model", tmp_path / "run"), logger=logger, **options)
    text = (tmp_path / "model" / "README.md").read_text()
    assert "after 11 optimizer steps" in text
    assert f"| train/loss | {trainer.callback_metrics['train/loss']:.5g} |" in text


def test_what_the_hub_indexes(fit: Callable, parts: tuple[str, Path], tmp_path: Path) -> None:
    """Names of the hub, through stages that are folders; an adapter fits no model but its own."""
    trainer = fit(Manifest(tmp_path / "run"), logger=MetricsCSV(tmp_path / "run"), log_every_n_steps=1)
    module, data = trainer.lightning_module, trainer.datamodule
    data.sources = {"train": [Source(hub="b/b"), Source(path="x.json")], "val": [Source(hub="a/a", limit=3)]}

    def front() -> dict:
        return ModelCard(model_card(trainer, module, tmp_path / "run", "title")).data.to_dict()

    module.network = Network("org/model")
    assert front()["base_model"] == "org/model"
    assert front()["datasets"] == ["a/a", "b/b"]
    (tmp_path / "stage").mkdir()
    module.network = Network(str(tmp_path / "stage"))
    assert "base_model" not in front()
    (tmp_path / "stage" / "README.md").write_text("---\nbase_model: org/model\n---\n# text\n---\n")
    assert front()["base_model"] == "org/model"
    module.network.lora = Lora()
    assert front()["tags"] == ["lit_align", "sft", "lora"]
    assert front()["library_name"] == "transformers"
    module.network.lora.export = "adapter"
    assert "base_model" not in front()
    assert front()["library_name"] == "peft"
    for text in ("no card", "---\nnot a mapping\n---\n", "---\n---\n", "# text\n\n---\n\nmore\n"):
        (tmp_path / "stage" / "README.md").write_text(text)
        assert "base_model" not in front()


def test_a_reward_model_says_how_to_read_its_score(tmp_path: Path, fit: Callable) -> None:
    trainer = fit(max_steps=1)
    module = RewardModule(Network(tiny_folder(tmp_path / "start")))
    module.configure_model()
    text = model_card(trainer, module, None, "reward")
    assert "AutoModelForSequenceClassification" in text
    assert "(score - mean) / std" in text
    assert "lit-align chat" not in text
    assert ModelCard(text).data.pipeline_tag == "text-classification"
