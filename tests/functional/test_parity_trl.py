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
that do not see their trunk; of the family's, a sign or a factor of each loss.

What TRL has and we have not: `aot` and `aot_unpaired` sort the pairs of a micro-batch, so their loss depends on how a
batch is cut up; LD-DPO and WPO weigh single tokens, which `PairLogps` has summed. `sft` is our `nll_coef`.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

pytest.importorskip("trl", reason="TRL needs an environment of its own")

from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from lit_align.functional.dpo import PairLogps, dpo_loss, nll_loss, orpo_loss
from lit_align.functional.dpo_losses import DPO_LOSSES
from lit_align.functional.kto import kto_loss
from lit_align.functional.packing import pack
from lit_align.functional.reward import bradley_terry_loss, ranked_pairs
from lit_align.functional.sft import SFT_LOSSES, sft_loss
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


def reference_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Another model, but not worlds apart: losses that square or exponentiate a log-ratio do so to fp32's error too."""
    model, other = language_model(tokenizer, 0), language_model(tokenizer, 1)
    with torch.no_grad():
        for weight, far in zip(model.parameters(), other.parameters(), strict=True):
            weight.lerp_(far, 0.02)
    return model


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
    largest = max(gradient.abs().max().item() for gradient in theirs)
    assert largest > 0.01
    assert_close(ours, theirs, rtol=1e-6, atol=1e-6 * max(1.0, largest))


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


@pytest.mark.parametrize("loss", ["nll", "dft"])
def test_sft_loss_of_completions(loss: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """No difference: a sum over completion tokens, EOS included, divided by their number.

    TRL divides by the count of the batch here, and by that of all micro-batches when its Trainer hands it over; we
    return sum and count, and the module divides. TRL appends EOS to text that lacks it; our data does so, not the loss.
    """
    rows = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS]
    trainer = SFTTrainer(
        language_model(tokenizer, 0),
        args=SFTConfig(**options(tmp_path), loss_type=loss),
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
    total, count = SFT_LOSSES[loss](model(batch).logps_S)
    check(total / count, expected, model, trainer.model)


def dpo_parity(
    name: str | list[str],
    ours: Callable[[PairLogps], Tensor],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    **options_: Any,
) -> None:
    """TRL's DPO trainer against a loss of ours, averaged over pairs."""
    trainer = DPOTrainer(
        language_model(tokenizer, 0),
        ref_model=reference_model(tokenizer),
        args=DPOConfig(**options(folder), loss_type=name, **options_),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )
    expected, padded = trl_loss(trainer)
    batch = pack(pairs_as_examples(padded["input_ids"], padded["attention_mask"], padded["completion_mask"]))
    model, reference = LanguageModel(language_model(tokenizer, 0)), LanguageModel(reference_model(tokenizer))
    pairs = pair_logps(batch, model, reference)
    assert (pairs.better_tokens_P != pairs.worse_tokens_P).any()
    check(ours(pairs).mean(), expected, model, trainer.model)


SAME: list[tuple[str, dict[str, float]]] = [
    ("sigmoid", {"beta": 0.1}),
    ("ipo", {"beta": 0.1}),
    ("ipo", {"beta": 2.0}),
    ("sigmoid_norm", {"beta": 5.0}),
    ("hinge", {"beta": 0.1}),
    ("robust", {"beta": 0.1, "label_smoothing": 0.2}),
    ("exo_pair", {"beta": 0.1, "label_smoothing": 1e-3}),
    ("exo_pair", {"beta": 0.3, "label_smoothing": 0.2}),
    ("nca_pair", {"beta": 0.1}),
    ("bco_pair", {"beta": 0.1}),
    ("sppo_hard", {"beta": 0.1}),
    ("apo_zero", {"beta": 0.1}),
    ("apo_down", {"beta": 0.1}),
]


@pytest.mark.parametrize(("name", "coefficients"), SAME)
def test_dpo_family(
    name: str, coefficients: dict[str, float], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """No difference in the numbers; TRL takes the mean over pairs, and we leave that to the module.

    For IPO and sigmoid_norm TRL divides by all completion tokens, we by the scored ones: the same count, as no
    completion here is without a prompt before it. EXO needs a smoothing above 0, which TRL leaves to the user (its
    default of 0 is an error); ours is 1e-3 unless given. Robust DPO has TRL's default of 0, which makes it DPO; ours is
    0.1.
    """
    ours = functools.partial(DPO_LOSSES[name], **coefficients)
    dpo_parity(name, ours, tokenizer, tmp_path, **coefficients)


def test_discopop(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """No difference; TRL's default beta is 0.1, ours the paper's 0.05, and where TRL has 0 times infinity we have 0."""
    for beta, tau in ((0.1, 0.05), (0.05, 0.5)):
        ours = functools.partial(DPO_LOSSES["discopop"], beta=beta, tau=tau)
        dpo_parity("discopop", ours, tokenizer, tmp_path, beta=beta, discopop_tau=tau)


@pytest.mark.parametrize("name", ["forward_kl", "js_divergence"])
def test_divergences(name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """No difference in the numbers; TRL's forward KL has no cap, and overflows where an answer is given up."""
    ours = functools.partial(DPO_LOSSES[name], beta=0.3)
    dpo_parity("sigmoid", ours, tokenizer, tmp_path, beta=0.3, f_divergence_type=name)


@pytest.mark.parametrize("alpha", [0.3, 0.5])
def test_alpha_divergence_is_counted_from_the_other_end(
    alpha: float, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """TRL 1.16 has f'(u) = (u^(a - 1) - 1) / (a - 1), the paper and we (1 - u^-alpha) / alpha: a is 1 - alpha.

    The forward KL is alpha 1 in the paper and a 0 in TRL. Its help text still speaks of u^-alpha.
    """
    ours = functools.partial(DPO_LOSSES["alpha_divergence"], beta=0.3, alpha=alpha)
    theirs = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0 - alpha}
    dpo_parity("sigmoid", ours, tokenizer, tmp_path, beta=0.3, **theirs)


def test_likelihood_of_the_better_answer_is_weighed_by_pair(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """TRL's `sft` term is the mean over all tokens of the better answers in the micro-batch, ours the mean of means.

    RPO divides each answer by its own length, as we do; a mean over the tokens of a micro-batch gives a pair a weight
    by its length, and depends on who is in the micro-batch.
    """

    def by_token(pairs: PairLogps) -> Tensor:
        share_P = pairs.better_tokens_P / pairs.better_tokens_P.sum() * len(pairs.better_P)
        assert not torch.allclose((share_P * nll_loss(pairs)).mean(), nll_loss(pairs).mean(), rtol=1e-3)
        return dpo_loss(pairs) + 0.5 * share_P * nll_loss(pairs)

    dpo_parity(["sigmoid", "sft"], by_token, tokenizer, tmp_path, beta=0.1, loss_weights=[1.0, 0.5])


def test_dpo_label_smoothing_is_where_the_definitions_part(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """TRL 1.16 ignores `label_smoothing` in the sigmoid loss: it has no conservative DPO, which ours then is."""
    smoothing = 0.2
    dpo_parity("sigmoid", dpo_loss, tokenizer, tmp_path, beta=0.1, label_smoothing=smoothing)
    smoothed = functools.partial(dpo_loss, label_smoothing=smoothing)
    with pytest.raises(AssertionError):
        dpo_parity("sigmoid", smoothed, tokenizer, tmp_path, beta=0.1, label_smoothing=smoothing)


def labelled_examples(padded: dict[str, Tensor]) -> list[Example]:
    """A padded batch of the CPO and ORPO trainers as one tree per pair."""
    sides = ("chosen", "rejected")
    width = max(padded[f"{side}_input_ids"].shape[1] for side in sides)

    def both(field: str, value: int) -> Tensor:
        rows = [padded[f"{side}_{field}"] for side in sides]
        return torch.cat([nn.functional.pad(x, (0, width - x.shape[1]), value=value) for x in rows])

    return pairs_as_examples(both("input_ids", 0), both("attention_mask", 0), (both("labels", -100) != -100).long())


@pytest.mark.parametrize(
    ("name", "theirs", "coefficients"),
    [
        ("cpo", {"loss_type": "sigmoid", "cpo_alpha": 0.0}, {"beta": 0.1, "nll_coef": 0.0}),
        ("cpo", {"loss_type": "sigmoid", "cpo_alpha": 0.7, "label_smoothing": 0.2}, {"beta": 0.1, "nll_coef": 0.7}),
        ("simpo", {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5}, {"beta": 2.0, "gamma": 0.5}),
        (
            "simpo",
            {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5, "label_smoothing": 0.2},
            {"beta": 2.0, "gamma": 0.5},
        ),
    ],
)
def test_cpo_and_simpo(
    name: str,
    theirs: dict[str, Any],
    coefficients: dict[str, float],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    """No difference in the preference term; the likelihood TRL averages over the tokens of a micro-batch, we by pair.

    TRL's CPO trainer adds that term to SimPO as well unless `cpo_alpha` is 0, which is not its default.
    """
    trainer = CPOTrainer(
        language_model(tokenizer, 0),
        args=CPOConfig(**options(tmp_path), beta=coefficients["beta"], **theirs),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )
    expected, padded = trl_loss(trainer)
    model = LanguageModel(language_model(tokenizer, 0))
    pairs = pair_logps(pack(labelled_examples(padded)), model, model)
    loss_P = DPO_LOSSES[name](pairs, label_smoothing=theirs.get("label_smoothing", 0.0), **coefficients)
    share_P = pairs.better_tokens_P / pairs.better_tokens_P.sum() * len(pairs.better_P)
    by_token_P = loss_P + coefficients.get("nll_coef", 0.0) * (share_P - 1.0) * nll_loss(pairs)
    check(by_token_P.mean(), expected, model, trainer.model)


def test_orpo(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """No difference in the odds ratio; TRL's likelihood is that of prompt *and* answer, over all tokens of a batch.

    Ours is that of the answer, as in the paper's equation 2, and by pair. TRL's term is put in place of ours here.
    """
    trainer = ORPOTrainer(
        language_model(tokenizer, 0),
        args=ORPOConfig(**options(tmp_path), beta=0.5),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )
    expected, padded = trl_loss(trainer)
    examples = labelled_examples(padded)
    model = LanguageModel(language_model(tokenizer, 0))
    pairs = pair_logps(pack(examples), model, model)
    whole = []
    for trunk, (better, _) in examples:
        ids = [*trunk.tokens, *better.tokens]
        whole.append(Example(Segment(ids, [False] + [True] * (len(ids) - 1))))
    total, count = sft_loss(model(pack(whole)).logps_S)
    loss = (orpo_loss(pairs, beta=0.5) - nll_loss(pairs)).mean() + total / count
    check(loss, expected, model, trainer.model)


def test_kto(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """No difference in the loss given the reference point, nor in the reference point of the paper's definition.

    TRL estimates it from each micro-batch, whose prompts it gives each other's answers at two more passes of both
    models; `DPOModule` takes the answers' own log-ratios of the step before, over all micro-batches and ranks. TRL
    takes the mean over answers, the module the mean over prompts of the mean over a prompt's answers.
    """
    labels = [True, True, False]
    rows = [
        {"prompt": pair["prompt"], "completion": pair["chosen" if label else "rejected"], "label": label}
        for pair, label in zip(PAIRS, labels, strict=True)
    ]
    weights = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7}
    # The other way round the reference point would be clamped at 0.
    trainer = KTOTrainer(
        reference_model(tokenizer),
        ref_model=language_model(tokenizer, 0),
        args=KTOConfig(**options(tmp_path), **weights),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    expected, padded = trl_loss(trainer)
    model, reference = LanguageModel(reference_model(tokenizer)), LanguageModel(language_model(tokenizer, 0))

    def log_ratios(prefix: str) -> Tensor:
        names = (f"{prefix}input_ids", f"{prefix}attention_mask", f"{prefix}completion_mask")
        examples = []
        for ids, attention, completion in zip(*(padded[name] for name in names), strict=True):
            n = int(attention.sum())
            examples.append(Example(Segment(ids[:n].tolist(), completion[:n].bool().tolist())))
        batch = pack(examples)
        with torch.no_grad():
            reference_Q = reference(batch).sums(batch)
        return model(batch).sums(batch) - reference_Q

    point = log_ratios("KL_").mean().clamp(min=0).detach()
    assert point > 0.01
    verdict_Q = torch.where(padded["label"].bool(), 1.0, -1.0)
    check(kto_loss(log_ratios(""), verdict_Q, point, **weights).mean(), expected, model, trainer.model)


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
