"""The commands that get labels and look at them: annotate, judge, revise, agreement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lit_align.cli.one_line_parser import OneLineParser
from lit_align.config.errors import ConfigError
from lit_align.utils.display import say


def agreement(args: list[str]) -> dict[str, Any]:
    """Whether labels can be trusted: agreement, biases and reliability of annotators, with intervals, and a page."""
    parser = OneLineParser(prog="lit-align agreement", description=agreement.__doc__, allow_abbrev=False)
    parser.add_argument("labels", nargs="+", metavar="LABELS", help="files of labels: .jsonl, .parquet, ...")
    parser.add_argument("--out", type=Path, help="page to write; without it NAME.agreement.html beside the first file")
    parser.add_argument("--figures", type=Path, metavar="FILE", help="write all figures as JSON, too")
    parser.add_argument("--soft", type=Path, metavar="FILE", help="write soft labels, a row for each task, to train on")
    parser.add_argument(
        "--method",
        choices=("dawid-skene", "weighted", "majority"),
        default="dawid-skene",
        help="of soft labels: posterior of Dawid and Skene's model, vote by the annotators' accuracies, or share",
    )
    parser.add_argument("--resamples", type=int, default=1000, help="of tasks, for the intervals; default 1000")
    told = parser.parse_args(args)
    if told.resamples < 1:
        raise ConfigError(f"--resamples must be at least 1, got {told.resamples}")
    from lit_align.feedback.agreement import agreement as measure  # numpy, and matplotlib for the page
    from lit_align.feedback.agreement import plain
    from lit_align.feedback.consensus import soft_rows
    from lit_align.feedback.labels import read_labels, write_rows
    from lit_align.feedback.page import NAMES, write_agreement
    from lit_align.feedback.units import one_per_annotator

    labels = read_labels(*told.labels)
    figures = measure(labels, told.resamples)
    first = Path(told.labels[0])
    page = write_agreement(figures, told.out or first.with_name(f"{first.stem}.agreement.html"), first.name)
    for name, value in figures["overall"].items():
        say(f"{NAMES[name]}: {value}")
    for name, of in figures["annotators"].items():
        say(
            f"{name}: {of['labels']:,} labels, agreement with others {of['agreement_with_others']}, "
            f"weight {of['weight']:.2f}"
        )
    if told.figures:
        told.figures.write_text(json.dumps(plain(figures), indent=1) + "\n")
    if told.soft:
        count = write_rows(told.soft, soft_rows(one_per_annotator(labels)[0], told.method))
        say(f"{count:,} soft labels ({told.method}) in {told.soft}")
    say(f"page in {page}")
    return figures


def annotate(args: list[str]) -> None:
    """Serve a page where people compare completions; or export the labels that it has collected."""
    parser = OneLineParser(prog="lit-align annotate", description=annotate.__doc__, allow_abbrev=False)
    parser.add_argument(
        "files", nargs="*", metavar="FILE", help="prompts with completions, as lit-align predict writes them"
    )
    parser.add_argument("--out", type=Path, help="folder of the annotation; without it FILE.annotation")
    parser.add_argument("--annotators", default="1", help="names, separated by commas, or a number; default 1")
    parser.add_argument("--per-task", type=int, help="annotators that label each task; default 2, or 1 of one")
    parser.add_argument("--guideline", help="Markdown file; its header may ask for criteria")
    parser.add_argument("--controls", help="pairs or rankings whose answer is known: hidden among the tasks")
    parser.add_argument("--control-every", type=int, default=10, help="one task in so many is a control; default 10")
    parser.add_argument("--pass-mark", type=float, default=0.7, help="least share of controls right; default 0.7")
    parser.add_argument("--seed", type=int, default=0, help="of the order of completions and of controls")
    parser.add_argument("--database", metavar="URL", help="of SQLAlchemy, for a team; without it SQLite in the folder")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; default 127.0.0.1, this machine alone"
    )
    parser.add_argument("--port", type=int, default=8899, help="0 for a free one; default 8899")
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="another name of the page")
    parser.add_argument("--rate", type=float, default=10.0, help="requests a second of one annotator; default 10")
    parser.add_argument("--export", type=Path, metavar="FILE", help="write labels to .jsonl or .parquet, and stop")
    parser.add_argument("--pairs", action="store_true", help="export prompt, chosen and rejected, as TRL loads them")
    parser.add_argument("--screened", action="store_true", help="export labels of annotators below the pass mark, too")
    told = parser.parse_args(args)
    if not told.files and told.out is None:
        raise ConfigError(
            "name a FILE of completions, or the --out folder of an annotation (see lit-align annotate --help)"
        )
    if told.rate <= 0:
        raise ConfigError(f"--rate must be above 0, got {told.rate}")
    out = told.out or Path(told.files[0]).with_name(f"{Path(told.files[0]).stem}.annotation")
    try:
        from lit_align.feedback.annotate import serve
        from lit_align.feedback.annotate.desk import Rules
    except ModuleNotFoundError as error:
        raise ConfigError(f"lit-align annotate needs {error.name}: pip install 'lit_align[annotate]'") from error
    names = _names(told.annotators)
    per_task = min(2, len(names)) if told.per_task is None else told.per_task
    rules = Rules(names, per_task, told.control_every, told.pass_mark, told.seed)
    place = serve.Place(told.files, out, told.database, told.host, told.port, told.allow_host)
    if told.export:
        desk = serve.open_desk(place, rules, told.guideline, told.controls)
        done = serve.export(desk, told.export, told.pairs, told.screened)
        left = f"; left out, below the pass mark: {', '.join(done['left_out'])}" if done["left_out"] else ""
        say(f"{done['rows']:,} rows in {told.export}{left}")
        return
    out.mkdir(parents=True, exist_ok=True)
    with serve.alone(out):
        serve.serve(place, serve.open_desk(place, rules, told.guideline, told.controls), told.rate)


def _names(text: str) -> tuple[str, ...]:
    """Names of annotators."""
    if text.isdecimal():
        return tuple(f"annotator-{n}" for n in range(1, int(text) + 1))
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if not name or len(name) > 100 or not name.isprintable():
            raise ConfigError(f"--annotators: {name!r:.60} is no name of 1 to 100 printable characters")
    return names


def judge(args: list[str]) -> dict[str, Any]:
    """Labels from a model: a chat server or a language model's folder as a judge, or a reward model's folder."""
    parser = OneLineParser(prog="lit-align judge", description=judge.__doc__, allow_abbrev=False)
    parser.add_argument("files", nargs="+", metavar="FILE", help="prompts with completions; as of lit-align annotate")
    parser.add_argument("--out", type=Path, required=True, help="folder: labels.jsonl, figures.json, answers.jsonl")
    parser.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible server, as http://127.0.0.1:8000/v1")
    parser.add_argument("--model", help="name of the model at the endpoint, or folder of a language model")
    parser.add_argument("--reward", metavar="FOLDER", help="folder of a reward model: its scores rank completions")
    parser.add_argument("--key-variable", metavar="NAME", help="environment variable that holds the endpoint's key")
    parser.add_argument("--mode", choices=("pairwise", "scored"), default="pairwise", help="default pairwise")
    parser.add_argument("--criteria", help="of scored, separated by commas; UltraFeedback's four without it")
    parser.add_argument("--principle", help="of pairwise: the one principle to judge by")
    parser.add_argument("--max-tokens", type=int, default=512, help="of an answer; default 512")
    parser.add_argument("--prices", metavar="IN,OUT", help="of a million tokens asked and said, for the estimate")
    parser.add_argument("--people", metavar="LABELS", help="labels of people: agreement with them where both judged")
    parser.add_argument("--estimate", action="store_true", help="say what it would take, and stop")
    told = parser.parse_args(args)
    if (told.reward is None) == (told.model is None):
        raise ConfigError("name one judge: --model (with --endpoint, or a folder), or --reward FOLDER")
    prices = _prices(told.prices)
    from lit_align.feedback.judge import agreement_with
    from lit_align.feedback.labels import read_labels
    from lit_align.feedback.tasks import build_tasks

    tasks, counts = build_tasks(told.files)
    say(", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in counts.items()))
    told.out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any]
    if told.reward:
        from lit_align.feedback.reward_labels import reward_labels

        labels, figures = read_labels(reward_labels(tasks, told.reward, told.out)), dict(counts)
    else:
        judged = _judged(told, tasks, prices)
        if judged is None:
            return {}
        labels, figures = judged
    if told.people:
        share, overlap = agreement_with(labels, [x for x in read_labels(told.people) if not x.control])
        say(f"agreement with people on {overlap:,} tasks: {share}")
        figures |= {"people_agreement": list(share), "people_tasks": overlap}
    (told.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    say(f"{len(labels):,} labels in {told.out / 'labels.jsonl'}")
    return figures


def _judged(told: Any, tasks: list[Any], prices: tuple[float, float] | None) -> tuple[list[Any], dict[str, Any]] | None:
    """Labels of a language model, and figures; None where only an estimate was asked for."""
    from lit_align.feedback.answerers import Endpoint, Folder
    from lit_align.feedback.judge import ULTRAFEEDBACK, Cache, estimate, questions
    from lit_align.feedback.judge import judge as run
    from lit_align.feedback.labels import write_labels

    criteria = [name.strip() for name in told.criteria.split(",")] if told.criteria else list(ULTRAFEEDBACK)
    cache = Cache(told.out / "answers.jsonl")
    asked = [question for task in tasks for question in questions(task, told.mode, criteria, told.principle)]
    ahead = estimate(asked, told.model, cache)
    at_most = ahead["calls"] * told.max_tokens
    cost = ""
    if prices is not None:
        price = (ahead["tokens"] * prices[0] + at_most * prices[1]) / 1e6
        cost = f", at most {price:,.2f} at these prices"
    calls = f"{ahead['calls']:,} calls ({ahead['cached']:,} more are cached)"
    say(f"{calls}, about {ahead['tokens']:,} tokens asked and at most {at_most:,} said{cost}")
    if told.estimate:
        return None
    answerer = (
        Endpoint(told.endpoint, told.model, told.key_variable, told.max_tokens)
        if told.endpoint
        else Folder(told.model, told.max_tokens)
    )
    judged = run(tasks, answerer, cache, told.mode, criteria, told.principle)
    say(", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in judged.counts.items()))
    if told.mode == "pairwise":
        say(f"flip rate {judged.flips}; share of verdicts for the answer shown first {judged.first}")
    if not judged.labels:
        raise ValueError(f"{told.model}: no task got an answer that parses; see {cache.path}")
    write_labels(told.out / "labels.jsonl", judged.labels)
    figures = {**judged.counts, "flip_rate": list(judged.flips), "first_share": list(judged.first)}
    return judged.labels, figures


def _prices(text: str | None) -> tuple[float, float] | None:
    """Prices of a million tokens asked and said."""
    if text is None:
        return None
    try:
        asked, said = map(float, text.split(","))
    except ValueError as error:
        raise ConfigError(f"--prices must be two numbers, as in 0.5,1.5, got {text!r:.40}") from error
    return asked, said


def revise(args: list[str]) -> dict[str, Any]:
    """Have a model criticise and revise answers by principles (Constitutional AI); the rows are demonstrations."""
    parser = OneLineParser(prog="lit-align revise", description=revise.__doc__, allow_abbrev=False)
    parser.add_argument("files", nargs="+", metavar="FILE", help="prompts, with or without an answer to revise")
    parser.add_argument("--principles", required=True, metavar="FILE", help="YAML: a list of principles")
    parser.add_argument("--out", type=Path, required=True, help="folder: revised.jsonl, answers.jsonl")
    parser.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible server, as http://127.0.0.1:8000/v1")
    parser.add_argument(
        "--model", required=True, help="name of the model at the endpoint, or folder of a language model"
    )
    parser.add_argument("--key-variable", metavar="NAME", help="environment variable that holds the endpoint's key")
    parser.add_argument("--rounds", type=int, default=1, help="of critique and revision; default 1")
    parser.add_argument("--seed", type=int, default=0, help="of the principles that are drawn")
    parser.add_argument("--max-tokens", type=int, default=512, help="of a text; default 512")
    told = parser.parse_args(args)
    if told.rounds < 1:
        raise ConfigError(f"--rounds must be at least 1, got {told.rounds}")
    from collections import Counter

    from lit_align.feedback.answerers import Endpoint, Folder
    from lit_align.feedback.judge import Cache
    from lit_align.feedback.labels import write_rows
    from lit_align.feedback.revise import read_answers, read_principles
    from lit_align.feedback.revise import revise as run

    principles = read_principles(told.principles)
    given = list(read_answers(told.files))
    told.out.mkdir(parents=True, exist_ok=True)
    cache, counts = Cache(told.out / "answers.jsonl"), Counter[str]()
    answerer = (
        Endpoint(told.endpoint, told.model, told.key_variable, told.max_tokens)
        if told.endpoint
        else Folder(told.model, told.max_tokens)
    )
    rows = []
    for row, answer in given:
        revised = run(row["prompt"], answer, principles, answerer, cache, counts, told.rounds, told.seed)
        counts["revised" if revised else "left_out_with_an_empty_text"] += 1
        if revised:
            rows.append({**row, **revised})
    say(", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in counts.items()))
    if not rows:
        raise ValueError(f"{told.model}: every prompt got an empty text; see {cache.path}")
    write_rows(told.out / "revised.jsonl", rows)
    say(f"{len(rows):,} demonstrations in {told.out / 'revised.jsonl'}")
    return dict(counts)
