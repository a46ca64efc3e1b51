"""What a training step costs by what is measured in it: processor time of the passes before the
updates and of the updates, the share of padding, and how far the metrics of a sample stray.

    python -P benches/trainer.py [RUN] [--steps 4] [--groups 24] [--set PATH=VALUE …]

The windows are those of the last steps of a recorded run, rebuilt from its rollouts: the same
groups, rewards, lengths and texts, so the passes have the shapes that they had. Without a run they
are made: groups of 8, all right or all wrong in two cases of three. The settings of a step take
turns, window by window, and each trains a student of its own.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from itertools import groupby
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from msgspec.structs import replace

from zppo.config.load import load, override
from zppo.config.options import at_least, positive
from zppo.config.topology import Topology
from zppo.errors import Parser, run_command
from zppo.prompting.tokenization import load_tokenizer
from zppo.records import rollouts as store
from zppo.records import run_directory
from zppo.training.measuring import Measuring
from zppo.training.state import build_trainer
from zppo.training.step import train_step
from zppo_protocol.messages import TrainWindow
from zppo_protocol.samples import GroupSamples, TrainGroup

EXAMPLE = Path(__file__).parents[1] / "examples" / "quickstart.yaml"
SETTINGS: tuple[Measuring, ...] = get_args(Measuring)
COLUMNS = ("group_id", "kind", "trained", "prompt", "response", "reward", "length", "prompt_length")


def recorded(run: Path, steps: int, tokenizer: Any) -> list[TrainWindow]:
    """The windows of the last steps of a run, renumbered; their tokens are of version 0."""
    files = list(store.step_files(run / "rollouts"))[-steps:]
    windows = []
    for step, file in enumerate(files):
        rows = [row for row in store.read_step(file, COLUMNS) if row["trained"]]
        groups = groupby(rows, key=lambda row: row["group_id"])
        windows.append(
            TrainWindow(
                step=step, groups=[group_of(name, list(part), tokenizer) for name, part in groups]
            )
        )
    return windows


def group_of(name: str, rows: list[dict[str, Any]], tokenizer: Any) -> TrainGroup:
    def ids(text: str, length: int) -> np.ndarray:
        found = tokenizer.encode(text, add_special_tokens=False) or [0]
        return np.resize(np.array(found, np.int32), length)

    return a_group(
        name,
        rows[0]["kind"],
        ids(rows[0]["prompt"], rows[0]["prompt_length"]),
        [ids(row["response"], row["length"]) for row in rows],
        [row["reward"] for row in rows],
    )


def made(steps: int, groups: int, vocabulary: int) -> list[TrainWindow]:
    rng = np.random.default_rng(0)

    def ids(length: int) -> np.ndarray:
        return rng.integers(0, vocabulary, length).astype(np.int32)

    return [
        TrainWindow(
            step=step,
            groups=[
                a_group(
                    f"{step}/{group}",
                    "plain",
                    ids(15),
                    [ids(int(length)) for length in rng.integers(4, 24, 8)],
                    [float(group % 3 == 0 and index < 4) for index in range(8)],
                )
                for group in range(groups)
            ],
        )
        for step in range(steps)
    ]


def a_group(
    name: str, kind: str, prompt: np.ndarray, responses: list[np.ndarray], rewards: list[float]
) -> TrainGroup:
    lengths = [len(response) for response in responses]
    return TrainGroup(
        group_id=name,
        question_id=name,
        kind=kind,
        samples=GroupSamples(
            prompt_ids=prompt,
            token_ids=np.concatenate(responses),
            log_probs=np.full(sum(lengths), -1.0, np.float32),
            offsets=np.array([0, *np.cumsum(lengths)], np.int32),
            version_spans=np.array([[sum(lengths), 0]], np.int32),
            texts=[],
            finish_reasons=["stop"] * len(responses),
        ),
        rewards=np.array(rewards, np.float32),
    )


class Watched:
    """A trainer that counts the positions of its passes, and how many of them are padding."""

    def __init__(self, topology: Topology, setting: Measuring) -> None:
        trainer = replace(topology.actors.trainer, measured_rollouts=setting)
        topology = replace(topology, actors=replace(topology.actors, trainer=trainer))
        self.trainer = build_trainer(topology, time.process_time)
        self.positions = self.padding = 0
        outputs = self.trainer.policy.outputs

        def counted(batch: Any) -> torch.Tensor:
            self.positions += batch.input_ids_BL.numel()
            self.padding += batch.input_ids_BL.numel() - self._real(batch)
            return outputs(batch)

        self.trainer.policy.outputs = counted  # type: ignore[method-assign]
        self.prompts_S = np.zeros(0, np.int64)

    def step(self, window: TrainWindow) -> dict[str, float]:
        sizes = [len(group.rewards) for group in window.groups]
        self.prompts_S = np.repeat([len(g.samples.prompt_ids) for g in window.groups], sizes)
        self.positions = self.padding = 0
        begin = time.process_time()
        found = train_step(self.trainer, window)
        return found | {
            "seconds_step": time.process_time() - begin,
            "padding": self.padding / max(1, self.positions),
        }

    def _real(self, batch: Any) -> int:
        """Positions that hold a token: all of a row see its first."""
        if batch.ends_BL is not None:
            return int(batch.ends_BL[:, 0].sum())
        prompts = int(self.prompts_S[batch.sequences_S.numpy()].sum())
        return prompts + len(batch.rows_R) - len(batch.sequences_S)


def measure(topology: Topology, windows: list[TrainWindow]) -> None:
    # Tokens of version 0 are fresh enough for all windows.
    scheduler = replace(topology.scheduler, max_staleness=len(windows))
    topology = replace(topology, scheduler=scheduler)
    watched = {setting: Watched(topology, setting) for setting in SETTINGS}
    found: dict[Measuring, dict[str, list[float]]] = {
        setting: defaultdict(list) for setting in SETTINGS
    }
    for number, window in enumerate(windows):
        turn = number % len(SETTINGS)
        for setting in (*SETTINGS[turn:], *SETTINGS[:turn]):
            for name, value in watched[setting].step(window).items():
                found[setting][name].append(value)
    show(found)


def show(found: dict[Measuring, dict[str, list[float]]]) -> None:
    # The first window pays for what is compiled or loaded once.
    whole = {setting: parts["seconds_step"][1:] for setting, parts in found.items()}
    print(
        f"{'measured':9}{'step s':>9}{'before':>9}{'updates':>9}{'of all':>8}{'padding':>9}  stray"
    )
    for setting, parts in found.items():
        ratio = statistics.median(
            own / all_of for own, all_of in zip(whole[setting], whole["all"], strict=True)
        )
        entropy = [
            abs(own - truth) / truth
            for own, truth in zip(parts["entropy"], found["all"]["entropy"], strict=False)
        ]
        numbers = [
            statistics.fmean(parts[name][1:])
            for name in ("seconds_step", "seconds_proximal", "seconds_update")
        ]
        print(
            f"{setting:9}{numbers[0]:9.3f}{numbers[1]:9.3f}{numbers[2]:9.3f}{ratio:8.2f}"
            f"{statistics.fmean(parts['padding']):9.1%}  entropy {statistics.fmean(entropy):.1%}"
        )
    live = statistics.fmean(found["all"]["live_rollout_share"])
    print(f"{len(whole['all'])} windows; rollouts with an advantage: {live:.1%}")


def main() -> None:
    made_parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    made_parser.add_argument("run", type=Path, nargs="?")
    made_parser.add_argument(
        "--steps", type=at_least(2), default=4, help="windows; the first is a warm-up"
    )
    made_parser.add_argument("--groups", type=positive, default=24, help="of a made window")
    made_parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    options = made_parser.parse_args()
    base = run_directory.read(options.run).topology if options.run else load(EXAMPLE)
    topology = override(base, options.set)
    tokenizer = load_tokenizer(topology.student.model, "student.model")
    windows = (
        recorded(options.run, options.steps, tokenizer)
        if options.run
        else made(options.steps, options.groups, len(tokenizer))
    )
    measure(topology, windows)


if __name__ == "__main__":
    sys.exit(run_command(main))
