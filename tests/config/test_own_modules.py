"""A user's modules beside a configuration file: rewards, sources, callbacks and steps that the file names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.configs import config
from support.runs import write_rows
from support.tiny import tiny_folder

from lit_align.cli.entry import main
from lit_align.config.own_modules import importable

REWARD = """
from lit_align.rewards import TextReward

class Reward(TextReward):
    def score(self, row, text, completion):
        return {value}

def reward(rows, completions):
    return [{value}] * len(completions)
"""
ROWS = """
from lit_align.data.rows import Rows

class Mine(Rows):
    fingerprint = None

    def __iter__(self):
        for n in range(8):
            yield {"prompt": f"say {n}", "completion": f"a {n}"}
"""
CALLBACK = """
from lightning.pytorch import Callback

class Note(Callback):
    def on_fit_end(self, trainer, pl_module):
        print("noted by mine")
"""
STEP = """
from pathlib import Path

class Own:
    def run(self, out: Path) -> dict[str, float]:
        return {"x": 1.0}
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A model and rows."""
    folder = tmp_path_factory.mktemp("parts")
    write_rows(folder)
    return tiny_folder(folder / "model"), folder


def written(folder: Path, content: Any, name: str = "run.yaml", **modules: str) -> Path:
    """A configuration with modules beside it."""
    folder.mkdir(exist_ok=True)
    for module, text in modules.items():
        (folder / f"{module}.py").write_text(text)
    (folder / name).write_text(yaml.safe_dump(content))
    return folder / name


def ppo(parts: tuple[str, Path], out: Path, reward: Any) -> dict[str, Any]:
    content = config("ppo", *parts, out, max_steps=4, enable_progress_bar=False, limit_val_batches=0)
    content["model"]["init_args"]["reward"] = reward
    return content


def scores(run: Path) -> float:
    """The mean reward of the last iteration."""
    rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    return [float(row[rows[0].index("ppo/reward")]) for row in rows[1:] if row[rows[0].index("ppo/reward")]][-1]


REWARDS = [
    {"class_path": "own_reward.Reward"},
    {"class_path": "lit_align.FunctionReward", "init_args": {"function": "own_reward.reward"}},
    "own_reward.reward",
    "own_reward.Reward",
]


@pytest.mark.parametrize("reward", REWARDS, ids=str)
def test_a_reward(parts: tuple[str, Path], tmp_path: Path, reward: Any) -> None:
    for value in (3.0, 4.0):  # two folders with a module of one name
        run = tmp_path / f"run{value}"
        file = written(
            tmp_path / f"mine{value}", ppo(parts, run, reward), own_reward=REWARD.replace("{value}", f"{value}")
        )
        main(["fit", "-c", str(file)])
        assert scores(run) == value
    assert not [folder for folder in sys.path if folder.startswith(str(tmp_path))]


def test_rows_a_callback_and_worker_processes(
    parts: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    content = config("sft", *parts, tmp_path / "run", max_steps=2, enable_progress_bar=False)
    content["data"]["init_args"] |= {"train": [{"rows": {"class_path": "own_rows.Mine"}}], "num_workers": 1}
    content["trainer"]["callbacks"] = [{"class_path": "own_callback.Note"}]
    main(["fit", "-c", str(written(tmp_path / "mine", content, own_rows=ROWS, own_callback=CALLBACK))])
    assert "noted by mine" in capsys.readouterr().out


def test_from_the_working_folder_as_a_command(parts: tuple[str, Path], tmp_path: Path) -> None:
    content = ppo(parts, tmp_path / "run", "own_function.reward")
    written(tmp_path / "here", {}, own_function=REWARD.replace("{value}", "5.0"))
    file = written(tmp_path / "there", content)
    code = "import sys; sys.path = [p for p in sys.path if p]; from lit_align.__main__ import entry; sys.exit(entry())"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", code, "fit", "-c", str(file)]
    ended = subprocess.run(command, env=environment, cwd=tmp_path / "here", capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    assert scores(tmp_path / "run") == 5.0


def test_in_a_pipeline(parts: tuple[str, Path], tmp_path: Path) -> None:
    written(tmp_path / "mine", {"class_path": "own_step.Own"}, "call.yaml", own_step=STEP)
    content = ppo(parts, tmp_path / "out" / "run", "own_staged.reward")
    written(tmp_path / "mine", content, "fit.yaml", own_staged=REWARD.replace("{value}", "6.0"))
    pipeline = {"root": str(tmp_path / "out"), "stages": {"one": {"call": "call.yaml"}, "two": {"fit": "fit.yaml"}}}
    summary = main(["pipeline", str(written(tmp_path / "mine", pipeline, "pipeline.yaml"))])
    assert summary["one/x"] == 1.0
    assert scores(tmp_path / "out" / "two") == 6.0


def test_in_a_sweep(parts: tuple[str, Path], tmp_path: Path) -> None:
    file = written(tmp_path / "mine", ppo(parts, tmp_path / "run", "own_swept.reward"))
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "own_swept.py").write_text(REWARD.replace("{value}", "7.0"))
    sweep = {
        "method": "grid",
        "metric": {"name": "ppo/reward", "goal": "maximize"},
        "parameters": {"model.init_args.kl_coef": {"values": [0.1]}},
        "command": ["lit-align", "fit", "-c", str(file), "${args}"],
    }
    (tmp_path / "sweeps" / "s.yaml").write_text(json.dumps(sweep))
    result = main(["sweep", str(tmp_path / "sweeps" / "s.yaml"), "--out", str(tmp_path / "out")])
    assert result["points"][0]["metric"] == 7.0


def test_a_file_of_the_user_does_not_hide_an_installed_module(parts: tuple[str, Path], tmp_path: Path) -> None:
    content = config("sft", *parts, tmp_path / "run", max_steps=1, enable_progress_bar=False)
    main(["fit", "-c", str(written(tmp_path / "mine", content, fractions="raise RuntimeError('hidden')"))])


def test_a_module_that_nobody_names_is_not_run(parts: tuple[str, Path], tmp_path: Path) -> None:
    """Libraries try to import what may be installed; a file of that name beside a configuration is not it."""
    content = ppo(parts, tmp_path / "run", "own_named.reward")
    mark = tmp_path / "ran"
    evil = f"open({str(mark)!r}, 'a').write(__name__ + ' ')\nraise ImportError"
    absent = dict.fromkeys(("torch_xla", "s3fs", "gcsfs", "not_installed_anywhere"), evil)
    tried = "import importlib.util\nassert importlib.util.find_spec('torch_xla') is None\n"
    helped = "import own_helper\n" + REWARD.replace("{value}", "own_helper.VALUE")
    file = written(tmp_path / "mine", content, own_named=helped, own_helper="VALUE = 8.0", **absent)
    code = f"import sys; from lit_align.__main__ import entry; code = entry()\n{tried}sys.exit(code)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", code, "fit", "-c", str(file)]
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    assert scores(tmp_path / "run") == 8.0
    assert not mark.exists(), mark.read_text()


def test_libraries_find_none_of_the_users_modules(tmp_path: Path) -> None:
    file = written(tmp_path, {"reward": "own_first.reward"}, own_first="import own_second", own_second="", own_third="")
    library = compile("import importlib\nimportlib.import_module(name)", "/usr/lib/some/library.py", "exec")
    with importable([file]):
        for name in ("own_second", "own_third"):
            with pytest.raises(ModuleNotFoundError):
                exec(library, {"name": name})
        exec(library, {"name": "own_first"})
        assert "own_second" in sys.modules


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_processes_that_are_started_anew(method: str, tmp_path: Path) -> None:
    """As a data loader's workers may be: they find the modules, and no file of the user's hides another."""
    file = written(
        tmp_path, {"rows": "own_spawned.Thing"}, own_spawned="class Thing: pass", random="raise SystemExit(3)"
    )
    (tmp_path / "main.py").write_text(
        f"""
import multiprocessing, sys
from pathlib import Path
import lit_align.__main__
from lit_align.config.own_modules import importable

if __name__ == "__main__":
    with importable([Path({str(file)!r})]):
        import own_spawned
        with multiprocessing.get_context({method!r}).Pool(1) as pool:
            print(pool.apply(repr, [own_spawned.Thing()]))
"""
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONSAFEPATH": "1"}
    ended = subprocess.run(
        [sys.executable, str(tmp_path / "main.py")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
    )
    assert "own_spawned.Thing" in ended.stdout, ended.stderr
