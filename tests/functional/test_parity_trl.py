"""Our losses against TRL 1.16's own trainers: same weights, same token ids, loss and gradient to 1e-6.

Skipped where TRL is not installed; it needs an environment of its own:

    python -m venv /tmp/trlenv && . /tmp/trlenv/bin/activate && pip install torch==2.13.0
    pip install trl==1.16.0 pytest lightning peft torchmetrics 'jsonargparse[signatures]' hypothesis
    pip install -e . --no-deps && python -m pytest -q tests/functional/test_parity_trl.py

TRL tokenises text and collates a padded batch; the ids of that batch are packed here, prompts shared. Models are
float64, but agreement is that of fp32: TRL's head folds the vocabulary into fp32 statistics (`chunked_logprob.py`), and
Llama's RMSNorm computes in fp32, whatever the dtype of the model.

Each test was seen to fail for mutants of ours: IPO and sigmoid_norm with sums, DPO without beta, the reference of the
other answer, the margin added, centering of the difference, a source off by one, branch positions from 0, branches
that do not see their trunk.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_DISABLE_TELEMETRY", "1")

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

pytest.importorskip("trl", reason="TRL needs an environment of its own")

from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from lit_align.functional.dpo import DPO_LOSSES, PairLogps, dpo_loss
from lit_align.functional.packing import pack
from lit_align.functional.reward import bradley_terry_loss, ranked_pairs
from lit_align.functional.sft import sft_loss
from lit_align.models import LanguageModel, ScalarModel
from lit_align.models.scratch import word_tokenizer
from lit_align.types import Example, PackedBatch, Segment

# TRL warns of what it does itself.
pytestmark = pytest.mark.filterwarnings("ignore")

WORDS = "the a red blue old new cat dog fox sees eats likes fish bread now then".split()
PAIRS = [
    {"prompt": "the red cat", "chosen": " eats fish now", "rejected": " likes the old dog then"},
    {"prompt": "a dog", "chosen": " sees the blue fox and eats", "rejected": " fish"},
    {"prompt": "new bread now the fox", "chosen": " likes", "rejected": " eats a red dog"},
]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer(WORDS)


def config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,  # far from the uniform distribution, so that losses differ
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def language_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(config(tokenizer)).double()


def options(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": len(PAIRS),
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }


def trl_loss(trainer: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """TRL's loss on the first batch of its own dataloader, and the batch."""
    batch = next(iter(trainer.get_train_dataloader()))
    return trainer.compute_loss(trainer.model, dict(batch)), batch


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


def check(loss: Tensor, expected: Tensor, model: LanguageModel | ScalarModel, expected_model: nn.Module) -> None:
    """The same loss and the same gradient of every weight, from rows that were packed and shared."""
    assert model.packs
    assert abs(expected.item()) > 0.01
    assert_close(loss.double(), expected.double(), rtol=1e-6, atol=1e-6)
    ours, theirs = gradients(loss, model), gradients(expected, expected_model)
    assert max(gradient.abs().max().item() for gradient in theirs) > 0.01
    assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def pairs_as_examples(ids: Tensor, attention: Tensor, completion: Tensor) -> list[Example]:
    """A padded batch, chosen answers first and rejected ones after, as one tree per pair."""
    half = len(ids) // 2
    examples = []
    for row in range(half):
        trunk_length = int((attention[row] - completion[row]).sum())
        branches = []
        for answer in (row, row + half):
            tokens = ids[answer][completion[answer].bool()].tolist()
            branches.append(Segment(tokens, [True] * len(tokens)))
        trunk = ids[row, :trunk_length].tolist()
        assert trunk == ids[row + half, :trunk_length].tolist()
        examples.append(Example(Segment(trunk, [False] * trunk_length), branches))
    return examples


def pair_logps(batch: PackedBatch, policy: LanguageModel, reference: LanguageModel) -> PairLogps:
    policy_Q = policy(batch).sums(batch)
    with torch.no_grad():
        reference_Q = reference(batch).sums(batch)
    tokens_Q = torch.bincount(batch.sequence_S, minlength=batch.num_sequences)
    return PairLogps(
        policy_Q[0::2], policy_Q[1::2], reference_Q[0::2], reference_Q[1::2], tokens_Q[0::2], tokens_Q[1::2]
    )


def test_sft_loss_of_completions(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """No difference: a sum over completion tokens, EOS included, divided by their number.

    TRL divides by the count of the batch here, and by that of all micro-batches when its Trainer hands it over; we
    return sum and count, and the module divides. TRL appends EOS to text that lacks it; our data does so, not the loss.
    """
    rows = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS]
    trainer = SFTTrainer(
        language_model(tokenizer, 0),
        args=SFTConfig(**options(tmp_path)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    expected, padded = trl_loss(trainer)
    assert (padded["labels"] == tokenizer.eos_token_id).any(1).all()
    lengths = padded["attention_mask"].sum(1).tolist()
    examples = [
        Example(Segment(ids[:n].tolist(), (labels[:n] != -100).tolist()))
        for ids, labels, n in zip(padded["input_ids"], padded["labels"], lengths, strict=True)
    ]
    batch = pack(examples, row_tokens=32)
    assert len(batch.tokens_RN) < len(rows)
    model = LanguageModel(language_model(tokenizer, 0))
    total, count = sft_loss(model(batch).logps_S)
    check(total / count, expected, model, trainer.model)


@pytest.mark.parametrize(("name", "beta"), [("sigmoid", 0.1), ("ipo", 0.1), ("ipo", 2.0), ("sigmoid_norm", 5.0)])
def test_dpo_family(name: str, beta: float, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """No difference in the numbers; TRL takes the mean over pairs, and we leave that to the module.

    For IPO and sigmoid_norm TRL divides by all completion tokens, we by the scored ones: the same count, as no
    completion here is without a prompt before it.
    """
    trainer = DPOTrainer(
        language_model(tokenizer, 0),
        ref_model=language_model(tokenizer, 1),
        args=DPOConfig(**options(tmp_path), loss_type=name, beta=beta),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )
    expected, padded = trl_loss(trainer)
    batch = pack(pairs_as_examples(padded["input_ids"], padded["attention_mask"], padded["completion_mask"]))
    model, reference = LanguageModel(language_model(tokenizer, 0)), LanguageModel(language_model(tokenizer, 1))
    pairs = pair_logps(batch, model, reference)
    assert (pairs.better_tokens_P != pairs.worse_tokens_P).any()
    check(DPO_LOSSES[name](pairs, beta=beta).mean(), expected, model, trainer.model)


def test_dpo_label_smoothing_is_where_the_definitions_part(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """TRL 1.16 ignores `label_smoothing` in the sigmoid loss; its `robust` loss is another estimator.

    Ours is conservative DPO, (1 - e) L(h) + e L(-h). Robust DPO (Chowdhury et al. 2024) is ((1 - e) L(h) - e L(-h)) /
    (1 - 2 e). The two flipped parts make both out of one.
    """
    smoothing = 0.2
    losses = {}
    for name in ("sigmoid", "robust"):
        trainer = DPOTrainer(
            language_model(tokenizer, 0),
            ref_model=language_model(tokenizer, 1),
            args=DPOConfig(**options(tmp_path / name), loss_type=name, beta=0.1, label_smoothing=smoothing),
            train_dataset=Dataset.from_list(PAIRS),
            processing_class=tokenizer,
        )
        losses[name], padded = trl_loss(trainer)
    batch = pack(pairs_as_examples(padded["input_ids"], padded["attention_mask"], padded["completion_mask"]))
    model, reference = LanguageModel(language_model(tokenizer, 0)), LanguageModel(language_model(tokenizer, 1))
    pairs = pair_logps(batch, model, reference)
    right, smoothed = dpo_loss(pairs).mean(), dpo_loss(pairs, label_smoothing=smoothing).mean()
    wrong = (smoothed - (1 - smoothing) * right) / smoothing
    robust = ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing)
    assert_close(losses["sigmoid"].double(), right, rtol=1e-6, atol=1e-6)
    assert_close(losses["robust"].double(), robust, rtol=1e-5, atol=1e-6)
    assert abs(smoothed - right) > 0.01


@pytest.mark.parametrize("centering", [None, 0.05])
@pytest.mark.parametrize("margins", [None, [0.5, 0.0, 1.5]])
def test_bradley_terry(
    margins: list[float] | None, centering: float | None, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """No difference in the numbers; three in what surrounds them.

    TRL has one margin per pair, we one number per answer whose difference is the margin. Its score is read where
    transformers finds the last token that is not padding, ours at the sequence's own last token: they part where
    padding and EOS are one id (not here). Its loss is the mean over the pairs of a batch; ours weighs pairs by prompt,
    and a prompt with one pair by 1.
    """
    rows: list[dict[str, Any]] = [dict(pair) for pair in PAIRS]
    if margins is not None:
        rows = [{**row, "margin": margin} for row, margin in zip(rows, margins, strict=True)]

    def scorer() -> LlamaForSequenceClassification:
        torch.manual_seed(0)
        settings = config(tokenizer)
        settings.num_labels = 1
        return LlamaForSequenceClassification(settings).double()

    trainer = RewardTrainer(
        scorer(),
        args=RewardConfig(**options(tmp_path), center_rewards_coefficient=centering),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    expected, padded = trl_loss(trainer)
    ids, attention = padded["input_ids"], padded["attention_mask"]
    half = len(ids) // 2
    # The prompt of a reward batch is not marked: what two answers have in common stands for it.
    shared = (ids[:half] == ids[half:]).int().cumprod(1).sum(1).repeat(2)
    completion = attention * (torch.arange(ids.shape[1]) >= shared[:, None])
    batch = pack(pairs_as_examples(ids, attention, completion))
    model = ScalarModel(scorer())
    score_Q = model(batch)
    pairs = ranked_pairs(torch.tensor([0, 1] * half), batch.example_Q)
    loss_P = bradley_terry_loss(
        score_Q[pairs.better_P],
        score_Q[pairs.worse_P],
        padded["margin"].double() if margins is not None else 0.0,
        centering=centering or 0.0,
    )
    check((pairs.weight_P * loss_P).sum() / half, expected, model, trainer.model)
