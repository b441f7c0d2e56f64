"""The tables and the picture of docs/scale.md, from the simulations."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path

import numpy as np

from scale import inputs as given
from scale import training
from scale import workloads as w
from scale.fleet import Outcome
from scale.inputs import Inputs

GPUS = (1, 8, 64, 256, 1000)
TRAINING_GPUS = (1, 8, 64, 128, 256, 512, 1000)
ADVISED = w.Choices()
PLAIN = w.Choices(
    folder=False, checkpoint_every=100, spread=False, beats_apart=False, named_events=False, small_parts=False,
    listed=False, sharing="fsdp2", sharded=False,
)  # fmt: skip
BATCH_STEPS = (
    ("one released file read by every GPU, a checkpoint every 100 steps", {}),
    ("who was too late for a prompt tries any other, not the next", {"spread": True}),
    ("a converted folder (`convert`), read once a node", {"folder": True}),
    ("`--checkpoint-every 2000`", {"checkpoint_every": 2000}),
    ("names say what happened", {"named_events": True}),
    ("heartbeats are read when nothing else is free", {"beats_apart": True}),
)
RENDER_STEPS = (
    ("one part for each node; every part asks for every file's kind", {}),
    ("the folder is only listed", {"listed": True}),
    ("four parts for each node", {"small_parts": True}),
)
TRAIN_STEPS = (
    ("FSDP2 over all, the first node writes checkpoints", {}),
    ("HSDP: sharded in a node, copied between nodes", {"sharing": "hsdp"}),
    ("every node writes its part", {"sharded": True}),
    ("*not built:* CUDA graphs in several processes", {"graphs": True}),
)
BATCH_RANGES = {
    "unet_ms": (4.0, 38.9), "sample_ns": (3.65, 14.6), "node_hours": (100.0, 10000.0),
    "store_gb_s": (1.25, 100.0), "store_ops": (1000.0, 25000.0),
}  # fmt: skip
RENDER_RANGES = {
    "mesh_core_s": (2.3, 20.0), "mesh_sigma": (0.5, 2.0), "mesh_mb": (1.0, 25.0), "store_gb_s": (1.25, 100.0),
    "start_s": (10.0, 120.0), "node_hours": (100.0, 10000.0),
}  # fmt: skip
TRAIN_RANGES = {
    "guided_ms": (3.6, 28.8), "launch_ms": (8.0, 77.8), "encode_ms": (0.0, 1.5), "node_net_gb_s": (12.5, 800.0),
    "network_share": (0.4, 1.0), "hop_us": (1.0, 25.0), "slowness": (0.0, 0.1), "node_hours": (100.0, 10000.0),
    "restart_min": (1.0, 30.0), "store_gb_s": (1.25, 100.0),
}  # fmt: skip

Rows = Sequence[Sequence[str]]


def table(head: Sequence[str], rows: Rows) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def number(x: float) -> str:
    """Three digits, and no more than the simulation deserves."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def duration(hours: float) -> str:
    """In days, hours or minutes."""
    if hours >= 48:
        return f"{number(hours / 24)} days"
    return f"{number(hours)} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"


def percent(x: float) -> str:
    return f"{100 * x:.0f} %" if x >= 0.0995 else f"{100 * x:.1f} %"


def largest(spent: dict[str, float], total: float) -> str:
    """What takes most, beside useful computation."""
    name, seconds = max(((k, v) for k, v in spent.items() if k != "computing"), key=lambda item: item[1])
    return f"{name} {percent(seconds / total)}" if seconds > 0.001 * total else "none over 0.1 %"


class Report:
    """All tables for some inputs; what is simulated twice is kept."""

    def __init__(self, inputs: Inputs, seed: int = 0):
        self.inputs, self.seed = inputs, seed
        self._kept: dict = {}

    def batch(self, gpus: int, choices: w.Choices, inputs: Inputs | None = None) -> Outcome:
        return self._once(w.batch, gpus, choices, inputs)

    def render(self, gpus: int, choices: w.Choices, inputs: Inputs | None = None) -> Outcome:
        return self._once(w.render, gpus, choices, inputs)

    def train(self, gpus: int, choices: w.Choices, inputs: Inputs | None = None) -> w.Trained:
        return self._once(w.train, gpus, choices, inputs)

    def _once(self, simulate, gpus, choices, inputs):
        key = simulate, gpus, choices, inputs or self.inputs
        if key not in self._kept:
            self._kept[key] = simulate(inputs or self.inputs, gpus, choices, self.seed)
        return self._kept[key]

    def tables(self) -> Iterator[tuple[str, str]]:
        """Name and Markdown of each."""
        yield "summary", self.of_summary()
        yield "batch", self.of_batch()
        yield "render", self.of_render()
        yield "training", self.of_training()
        yield "sharing", self.of_sharing()
        yield "intervals", self.of_intervals()
        yield "breaks", self.of_breaks()
        yield "sensitivity", self.of_sensitivity()
        yield "inputs", table(("flag", "value", "kind", "where it comes from"), given.rows(self.inputs))

    def of_summary(self) -> str:
        rows = []
        for gpus in (1, 8, 64, 1000):
            hours = [
                self._hours(found)
                for found in (self.batch(gpus, ADVISED), self.render(gpus, ADVISED), self.train(gpus, ADVISED))
            ]
            rows.append([f"{gpus:,}", *(f"{duration(h)}, ${self._dollars(gpus, h)}" for h in hours)])
        jobs = f"{self.inputs.prompts:,} assets", f"{self.inputs.meshes:,} meshes", f"{self.inputs.train_steps:,} steps"
        return table(("GPUs", *jobs), rows)

    def of_batch(self) -> str:
        rows = []
        for gpus in GPUS:
            now = self.batch(gpus, ADVISED)
            hours = now.seconds / w.HOUR
            rows.append([
                f"{gpus:,}", number(hours), number(self.inputs.prompts / hours), self._dollars(gpus, hours),
                percent(now.efficiency), largest(now.spent, gpus * now.seconds),
                percent(self.batch(gpus, PLAIN).efficiency), number(now.moved / now.seconds / 1e9),
            ])  # fmt: skip
        head = ("GPUs", "hours", "assets an hour", "$", "efficiency", "largest loss", "plainly", "GB/s of the store")
        return table(head, rows)

    def of_render(self) -> str:
        rows = []
        for gpus in GPUS:
            now = self.render(gpus, ADVISED)
            hours, nodes = now.seconds / w.HOUR, ceil(gpus / self.inputs.gpus_per_node)
            rows.append([
                f"{gpus:,}", number(hours), number(self.inputs.meshes / hours), self._dollars(gpus, hours),
                percent(now.efficiency), largest(now.spent, nodes * now.seconds),
                percent(self.render(gpus, PLAIN).efficiency), number(now.moved / now.seconds / 1e9),
            ])  # fmt: skip
        head = ("GPUs", "hours", "meshes an hour", "$", "efficiency", "largest loss", "plainly", "GB/s of the store")
        return table(head, rows)

    def of_training(self) -> str:
        rows = []
        for gpus in TRAINING_GPUS:
            found = self.train(gpus, ADVISED)
            step, hours = found.step, found.run.seconds / w.HOUR
            images = 4 * self.inputs.scenes / step.seconds
            rows.append([
                f"{gpus:,}", f"{found.ranks:,}", number(self.inputs.scenes / found.ranks), number(1e3 * step.computing),
                f"{number(1e3 * step.communicating)} ({number(1e3 * step.waiting)})", duration(hours),
                self._dollars(gpus, hours), percent(self.useful(gpus, found)), self._training_loss(gpus, found),
                number(images * self.inputs.view_kb / 1e3), number(found.run.seconds / found.mtbf),
            ])  # fmt: skip
        head = ("GPUs", "used", "scenes each", "computing, ms", "communication (not hidden), ms", "time", "$")
        return table((*head, "efficiency", "largest loss", "MB/s of images", "failures to expect"), rows)

    def useful(self, gpus: int, found: w.Trained) -> float:
        """Share of the GPUs' time in which kernels ran that a single GPU would have run, too."""
        alone = w.plan(1, "ddp", self.inputs.gpus_per_node)
        busy = training.step(self.inputs, alone, graphs=True).computing
        return busy * self.inputs.train_steps / (gpus * found.run.seconds)

    def _training_loss(self, gpus: int, found: w.Trained) -> str:
        time = found.run.seconds
        graphs = training.step(self.inputs, found.plan, graphs=True)
        launches = self.inputs.train_steps * (found.step.computing - graphs.computing)
        used = found.ranks / gpus
        lost = {name: used * seconds for name, seconds in found.losses.items()}
        lost |= {"waiting for launches": used * launches, "without work": (1 - used) * time}
        return largest(lost, time)

    def of_sharing(self) -> str:
        rows = []
        for gpus in (8, 64, 512):
            for name in ("ddp", "hsdp", "fsdp2"):
                if (gpus, name) == (8, "hsdp"):
                    continue  # one node: the same as FSDP2
                plan = w.plan(gpus, name, self.inputs.gpus_per_node)
                step = training.step(self.inputs, plan)
                rows.append([
                    str(gpus), name.upper(), number(plan.resident / 1e9), number(step.memory / 1e9),
                    number(plan.all_gather / 1e9), number(plan.reduce_scatter / 1e9), number(plan.all_reduce / 1e9),
                    number(1e3 * step.communicating), number(1e3 * step.waiting), number(1e3 * step.seconds),
                ])  # fmt: skip
        head = ("GPUs", "sharing", "GB that stay", "GB in a step", "all-gather, GB", "reduce-scatter, GB")
        return table((*head, "all-reduce, GB", "communication, ms", "not hidden, ms", "step, ms"), rows)

    def of_intervals(self, gpus: int = 512, longer: int = 100, times: int = 10) -> str:
        """Of a training so many times as long, for many failures; its steps are drawn ten at a time."""
        found = self.train(gpus, ADVISED)
        i, mtbf = self.inputs, found.mtbf
        restart = i.restart_min * 60 + i.start_s + found.checkpoint
        durations = np.full(i.train_steps * longer // 10, 10 * found.step.seconds)
        work, rows = float(durations.sum()), []
        for factor in (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16):
            interval = factor * found.interval
            found_s = []
            for seed in range(times):
                random = np.random.default_rng(seed)
                found_s.append(training.train(durations, interval, found.checkpoint, restart, mtbf, random).seconds)
            error = np.std(found_s, ddof=1) / np.sqrt(times)
            expected = training.daly(work, interval, found.checkpoint, restart, mtbf)
            name = f"{interval:,.0f} s" + (" (Young)" if factor == 1 else "")
            simulated = f"{100 * (np.mean(found_s) / work - 1):.2f} ± {100 * error / work:.2f} %"
            rows.append([name, simulated, f"{100 * (expected / work - 1):.2f} %"])
        return table(("work between checkpoints", "time lost, simulated", "by Daly's formula"), rows)

    def of_breaks(self) -> str:
        rows = []
        for job, steps, simulate in (
            ("batch", BATCH_STEPS, self.batch),
            ("render", RENDER_STEPS, self.render),
            ("train", TRAIN_STEPS, self.train),
        ):
            choices = PLAIN
            for text, change in steps:
                choices = replace(choices, **change)
                hours = [self._hours(simulate(gpus, choices)) for gpus in (64, 1000)]
                rows.append([job, text, *map(number, hours), f"{hours[0] / hours[1]:.1f}x"])
        return table(("job", "one change after the other", "hours on 64", "on 1,000", "faster, of 15.6x"), rows)

    def of_sensitivity(self) -> str:
        rows = []
        for job, gpus, ranges, simulate, choices in (
            ("batch", 1000, BATCH_RANGES, self.batch, ADVISED),
            ("render", 1000, RENDER_RANGES, self.render, ADVISED),
            ("train", 64, TRAIN_RANGES, self.train, ADVISED),
        ):
            base = self._hours(simulate(gpus, choices))
            for name, values in ranges.items():
                hours = [
                    self._hours(simulate(gpus, choices, replace(self.inputs, **{name: value}))) for value in values
                ]
                flag = f"`--{name.replace('_', '-')}`"
                at = [f"{value:,g}" for value in (values[0], getattr(self.inputs, name), values[1])]
                rows.append([f"{job}, {gpus:,}", flag, *at, *map(number, (hours[0], base, hours[1]))])
        return table(("job, GPUs", "input", "low", "as assumed", "high", "hours, low", "as assumed", "high"), rows)

    def _hours(self, found: Outcome | w.Trained) -> float:
        return (found.seconds if isinstance(found, Outcome) else found.run.seconds) / w.HOUR

    def _dollars(self, gpus: int, hours: float) -> str:
        return f"{gpus * hours * self.inputs.dollars:,.0f}"

    def draw(self, path: Path) -> None:
        """Efficiency over GPUs, of the three jobs, and of the plain ways."""
        import matplotlib

        matplotlib.use("agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(6.4, 3.6), dpi=120)
        lines = (
            ("text to 3D", "#1f5fa8", GPUS, [self.batch(n, ADVISED).efficiency for n in GPUS],
             [self.batch(n, PLAIN).efficiency for n in GPUS]),
            ("rendering", "#2e8b57", GPUS, [self.render(n, ADVISED).efficiency for n in GPUS],
             [self.render(n, PLAIN).efficiency for n in GPUS]),
            ("training", "#c03a2b", TRAINING_GPUS, [self.useful(n, self.train(n, ADVISED)) for n in TRAINING_GPUS],
             [self.useful(n, self.train(n, PLAIN)) for n in TRAINING_GPUS]),
        )  # fmt: skip
        for name, color, gpus, now, plain in lines:
            axes.plot(gpus, now, "o-", color=color, markersize=3.5, label=name)
            axes.plot(gpus, plain, "--", color=color, linewidth=1)
        axes.plot([], [], "--", color="#888888", linewidth=1, label="done plainly")
        axes.set(xscale="log", xlabel="GPUs", ylabel="useful share of their time", ylim=(0, 1.02))
        axes.set_xticks(TRAINING_GPUS, [f"{n:,}" for n in TRAINING_GPUS])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc="lower left")
        figure.tight_layout()
        figure.savefig(path, pil_kwargs={"lossless": True})
        plt.close(figure)
