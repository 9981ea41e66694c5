"""What would spoil a long run, found in seconds: `lit-align doctor FILE`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningDataModule, LightningModule, Trainer

from lit_align.data.data_module import TextDataModule
from lit_align.data.prompt import PromptDataModule
from lit_align.data.watched import unused
from lit_align.doctor.exported import reloaded
from lit_align.doctor.finding import Finding
from lit_align.doctor.settings import settings
from lit_align.doctor.template import template
from lit_align.functional.logprobs import sum_by_sequence
from lit_align.models.seal import broken_seal, read_seal
from lit_align.modules.base import AlignModule
from lit_align.modules.dpo import DPOModule
from lit_align.modules.fits import check_data
from lit_align.modules.memory import MIB, memory_budget
from lit_align.modules.ppo import PPOModule
from lit_align.types import Completion, Example, PreferenceBatch, Rollout

# Examples that are looked at one by one.
SAMPLE = 512


def examine(
    trainer: Trainer, module: LightningModule, data: LightningDataModule, reload: bool | None = None
) -> list[Finding]:
    """Run every check that applies.

    Args:
        trainer: for its device and its precision; nothing is trained.
        module: one of the four methods, or a user's own `AlignModule`.
        data: one of the three data modules, or a user's own `TextDataModule`.
        reload: compare the model with its own export; null for models that are small (`exported.LARGE`).

    Raises:
        ValueError: module or data are of another kind.
    """
    if not isinstance(module, AlignModule) or not isinstance(data, TextDataModule):
        kinds = f"{type(module).__name__} and {type(data).__name__}"
        raise ValueError(f"doctor knows the modules and data modules of lit_align, not {kinds}")
    data.module = module
    data.new_tokens = getattr(getattr(module, "network", None), "new_tokens", ())
    data.prepare_data()
    data.setup("fit")
    findings = [*rows(data), *columns(data), *held_out(data)]
    examples = [item.example for item in data.training_items(SAMPLE)]
    if not isinstance(data, PromptDataModule):
        findings += [*answers(data, examples), *template(data, examples)]
    findings += beginnings(data, examples)
    module.configure_model()
    module.to(trainer.strategy.root_device)
    findings += [*settings(trainer, module, data), *memory(module)]
    findings += fits(module, data)
    if findings[-1].check == "fit" and findings[-1].level == "wrong":
        return findings  # no forward of it would end well
    return [*findings, *reloaded(module, reload), *forwards(trainer, module, data)]


def forwards(trainer: Trainer, module: AlignModule, data: TextDataModule) -> list[Finding]:
    """The checks that compute; what torch refuses is a finding as well."""
    findings: list[Finding] = []
    try:
        with trainer.precision_plugin.forward_context():
            if isinstance(module, PPOModule):
                findings += rollout(module, data)
                return findings
            if isinstance(module, DPOModule):
                findings += reference(module, data)
            findings += longest(module, data)
    except (RuntimeError, IndexError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        findings.append(Finding("wrong", "forward", f"fails with {type(error).__name__}: {reason}"))
    return findings


def checksums(folders: Iterable[str]) -> Iterator[Finding]:
    """Whether exported folders are as they were exported, to the last bit."""
    sealed = [Path(folder) for folder in folders if read_seal(Path(folder)) is not None]
    broken = [says for says in map(broken_seal, sealed) if says is not None]
    yield from (Finding("wrong", "checksum", says) for says in broken)
    if sealed and not broken:
        yield Finding("ok", "checksum", f"as it was exported: {', '.join(map(str, sealed))}")


def rows(data: TextDataModule) -> Iterator[Finding]:
    """What happened to the rows: skipped, truncated."""
    for entry in data.manifest():
        counts, name = entry["counts"], f"{entry['part']} data {entry['name']}"
        examples = max(counts.get("examples", 0), 1)
        if skipped := counts.get("skipped", 0):
            share = skipped / max(counts.get("rows", 0), 1)
            level: Literal["look", "wrong"] = "wrong" if share > 0.5 else "look"
            yield Finding(level, "rows", f"{name}: {skipped:,} rows are skipped ({share:.0%}); the first one is above")
        cut = counts.get("truncated", 0)
        says = f"{name}: {cut:,} of {examples:,} examples are cut to {data.max_length:,} tokens ({cut / examples:.0%})"
        if cut / examples > 0.75:
            yield Finding("wrong", "truncation", f"{says}: raise data.max_length, or leave long rows out")
        elif cut / examples > 0.05:
            yield Finding("look", "truncation", f"{says}: raise data.max_length")
        else:
            yield Finding("ok", "truncation", says)


def columns(data: TextDataModule) -> Iterator[Finding]:
    """Columns that no reader has asked for, and turns that became examples of their own."""
    for part in ("train", "val"):
        for source, store in zip(
            data.sources[part] or (), data.stores(part) if data.sources[part] else (), strict=True
        ):
            if left := unused(store.tally):
                yield Finding("look", "columns", f"{part} data {source.name}: not used: {', '.join(left)}")
            if alone := store.tally["turns_as_examples_of_their_own"]:
                says = f"{alone:,} turns are examples of their own: the chat template renders a turn differently later"
                yield Finding("look", "template", f"{says}; data.chat_template: qwen3 or another by name appends only")


def fits(module: AlignModule, data: TextDataModule) -> Iterator[Finding]:
    """Whether sequences fit the model's positions and tokens its embedding, and whose tokenizer it is."""
    try:
        unusual = check_data(module, data)
    except ValueError as error:
        yield Finding("wrong", "fit", str(error))
        return
    yield from (Finding("look", "fit", line) for line in unusual)
    if not unusual:
        yield Finding("ok", "fit", "positions, tokens and tokenizer of the data are the model's")


def held_out(data: TextDataModule) -> Iterator[Finding]:
    """Whether validation sees prompts that training has seen."""
    if data.sources["val"] is None:
        share = data.val_fraction
        if share:
            yield Finding("ok", "validation", f"{share:.0%} of the prompts are held out, none is on both sides")
        else:
            yield Finding("look", "validation", "nothing is held out: set data.val_fraction, or give data.val")
    elif shared := data.shared_prompts():
        yield Finding(
            "wrong", "validation", f"{shared:,} prompts of data.val are trained on, too: take them out of one"
        )
    else:
        yield Finding("ok", "validation", "no prompt of data.val is trained on")


def answers(data: TextDataModule, examples: Sequence[Example]) -> Iterator[Finding]:
    """Whether scored answers end with a token that stops generation."""
    sequences = [sequence for example in examples for sequence in (example.branches or [example.trunk])]
    if not any(example.branches for example in examples[:1]) and all(all(s.scored[1:]) for s in sequences):
        yield Finding("ok", "stop token", "plain text: every token is scored, and none needs to stop")
        return
    stops = set(data.stop_ids)
    ending = sum(bool(s.tokens) and s.scored[-1] and s.tokens[-1] in stops for s in sequences)
    says = f"{ending:,} of {len(sequences):,} answers end with a scored stop token"
    if ending == len(sequences):
        yield Finding("ok", "stop token", says)
    elif ending:
        yield Finding("look", "stop token", f"{says}: the others are cut, or their rows say that they are unfinished")
    else:
        yield Finding("wrong", "stop token", f"{says}: the model would not learn to stop; see data.chat_template")


def beginnings(data: TextDataModule, examples: Sequence[Example]) -> Iterator[Finding]:
    """Two tokens of beginning, as a template and a tokenizer that both write one make them; and the padding token."""
    tokenizer: Any = data.tokenizer
    bos = tokenizer.bos_token_id
    if bos is not None:
        double = sum(list(example.trunk.tokens[:2]) == [bos, bos] for example in examples)
        if double:
            says = f"{double:,} of {len(examples):,} examples begin with two beginning-of-text tokens"
            yield Finding("wrong", "beginning", f"{says}: take it out of data.chat_template")
        else:
            yield Finding("ok", "beginning", "no example begins with two beginning-of-text tokens")
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        yield Finding("look", "padding", "the padding token is the stop token: harmless here, not in every other tool")


def memory(module: AlignModule) -> Iterator[Finding]:
    """Weights, gradients and optimizer state against what there is."""
    roles = memory_budget(module, [module.optimizer(module.parameter_groups())])
    need = sum(role.weights + role.training for role in roles)
    here = sum(role.weights for role in roles)
    if module.device.type == "cuda":
        room = torch.cuda.mem_get_info(module.device)[0] + here
    elif hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        room = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + here
    else:
        return
    says = f"{need / MIB:,.0f} MiB before activations, of {room / MIB:,.0f} MiB: {'; '.join(map(str, roles))}"
    if need > room:
        yield Finding("wrong", "memory", f"{says}: train adapters (network.lora), or a smaller model")
    else:
        yield Finding("look" if need > 0.8 * room else "ok", "memory", says)


@torch.no_grad()
def reference(module: DPOModule, data: TextDataModule) -> Iterator[Finding]:
    """Whether policy and reference agree before the first step: the loss of DPO is then log 2, and KL is 0."""
    if not module.needs_reference:
        return
    batch: PreferenceBatch = module.transfer_batch_to_device(data.collate(data.training_items(2)), module.device, 0)
    module.eval()
    gap = module.policy(batch.packed).sums(batch.packed) - module.reference_sums(batch)
    module.train()
    yield agreement(gap.abs().max().item())


def agreement(gap: float) -> Finding:
    """Whether policy and reference are one model, by their largest difference on an answer, in nats."""
    if gap < 1e-2:
        return Finding("ok", "reference", f"equals the policy before training, to {gap:.1e} nats an answer")
    says = f"differs from the policy before training, by up to {gap:.2f} nats an answer"
    return Finding("look", "reference", f"{says}: leave model.reference out, unless that is meant")


def longest(module: AlignModule, data: TextDataModule) -> Iterator[Finding]:
    """Forward and backward of the longest example."""
    item = data.longest_item()
    module.train()
    batch = module.transfer_batch_to_device(data.collate([item]), module.device, 0)
    module.micro_step(batch).backward()
    yield from gradients(f"the longest example, {item.example.num_tokens:,} tokens", module)
    module.zero_grad()


def rollout(module: PPOModule, data: TextDataModule) -> Iterator[Finding]:
    """Two prompts answered and scored; policy and reference on the answers; the longest prompt with long answers."""
    batch = data.collate(data.training_items(2))
    sampling = replace(module.sampling, max_new_tokens=min(module.sampling.max_new_tokens, 32))
    answered = module.answer(batch, sampling, seed=0)
    scores = module.reward(answered)
    lengths = [len(completion.tokens) for completion in answered.completions]
    says = f"{len(lengths)} answers of up to {max(lengths)} tokens, rewards {scores.min():.2f} to {scores.max():.2f}"
    yield Finding("ok", "rollout", says)
    packed = module.packed(answered)
    module.eval()
    with torch.no_grad():
        gap_S = module.policy(packed).logps_S - module.reference_logps(packed)
    yield agreement(sum_by_sequence(gap_S, packed.sequence_S, packed.num_sequences).abs().max().item())
    prompt = data.collate([data.longest_item()])
    packed = module.packed(stretched(module.answer(prompt, sampling, seed=0), module.sampling.max_new_tokens))
    module.train()
    scored, values_S = module(packed)
    # Both, as training does: a value of its own is no parameter without a gradient.
    (scored.logps_S.sum() + (0.0 if values_S is None else values_S.sum())).backward()
    answers = f"{packed.num_sequences} answers of {module.sampling.max_new_tokens:,} tokens"
    yield from gradients(f"the longest prompt, {len(prompt.prompts[0]):,} tokens, with {answers}", module)
    module.zero_grad()


def stretched(answered: Rollout, tokens: int) -> Rollout:
    """The same with answers as long as they may be: what they say is said again."""
    completions = [Completion((c.tokens * tokens)[:tokens], finished=False) for c in answered.completions]
    return answered._replace(completions=completions)


def gradients(what: str, module: torch.nn.Module) -> Iterator[Finding]:
    """Whether every trained parameter has a gradient by now, and a finite one."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    without = [name for name, parameter in trained.items() if parameter.grad is None]
    if not all(bool(p.grad.isfinite().all()) for p in trained.values() if p.grad is not None):
        yield Finding(
            "wrong", "gradient", f"not finite after {what}: look at the weights; fp16 overflows, bf16 does not"
        )
    elif without:
        says = f"{len(without)} trained parameters have none after {what}, the first being {without[0]}"
        yield Finding("look", "gradient", f"{says}: under DDP set strategy: ddp_find_unused_parameters_true")
    else:
        yield Finding("ok", "gradient", f"forward and backward of {what}: finite")
