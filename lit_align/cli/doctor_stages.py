"""`lit-align doctor PIPELINE`: examine each stage that can be examined, in order."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from lit_align.config.errors import ConfigError
from lit_align.utils import limits
from lit_align.utils.display import printable, say


def is_pipeline(file: str) -> bool:
    """True if a YAML file is a pipeline (it has the key `stages`)."""
    return Path(file).is_file() and "stages" in (limits.load_yaml(limits.read_text(Path(file)), file) or {})


def examine_stages(file: str, examine: Callable[[Path], Any]) -> None:
    """Examine the stages of a pipeline whose models exist: on the hub, in a folder, or from a finished stage.

    Args:
        file: the pipeline file.
        examine: examines the configuration of a stage; raises if something would spoil its run.

    Raises:
        ConfigError: names the stages with such findings.
    """
    from lit_align.pipeline.stages import DONE, Pipeline  # imports torch

    pipeline = Pipeline(file)
    spoilt: list[str] = []
    for number, stage in enumerate(pipeline.stages, start=1):
        heading = f"[{number}/{len(pipeline.stages)}] {stage.name}"
        missing = [parent for parent in stage.parents if not (pipeline.out / parent / DONE).exists()]
        if stage.kind != "fit":
            say(f"{heading}: a {stage.kind} stage, which is not examined")
            continue
        if missing:
            say(f"{heading}: not examined, for it starts from {', '.join(missing)}: run the pipeline up to there")
            continue
        say(heading)
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / stage.file.name
            path.write_text(yaml.safe_dump(pipeline.moved(stage.config), sort_keys=False))
            try:
                examine(path)
            except (ConfigError, ValueError, OSError) as error:
                say(f"wrong  {printable(error)}")
                spoilt.append(stage.name)
    if spoilt:
        raise ConfigError(f"{file}: stages that would be spoilt: {', '.join(spoilt)}; see above")
