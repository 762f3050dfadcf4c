"""The ablations of the paper, small: patch size, long skip, time conditioning, depth, width.

    python experiments/ablations.py [--runs runs/ablations] [--seeds 3] [flags of dis-ssm train]

Unconditional models of the 8x8 digits, as many steps for all; the Fréchet distance of the averaged
model's samples to held-out images, over training, mean and standard error over seeds. A run lives
in RUNS/NAME-SEED; the same command again continues a killed run and repeats none. Writes
RUNS/ablations.json, .png and .md, or --results FILE. From the repository's root.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import study

from dis_ssm.config import Config, load_config

VARIANTS = {
    "base": {},
    "patch-8": {"patch_size": 8},
    "patch-4": {"patch_size": 4},
    "patch-1": {"patch_size": 1},
    "skip-none": {"skip": "none"},
    "skip-add": {"skip": "add"},
    "time-adaln": {"time_conditioning": "adaln"},
    "depth-3": {"depth": 3},
    "depth-9": {"depth": 9},
    "width-24": {"hidden_size": 24},
    "width-96": {"hidden_size": 96},
}
# what is varied: the paper's finding; value -> variant; pairs (better, worse) that it claims
ABLATIONS = {
    "patch size": (
        "smaller patches are better",
        {"8": "patch-8", "4": "patch-4", "2": "base", "1": "patch-1"},
        [("4", "8"), ("2", "4"), ("1", "2")],
    ),
    "long skip": (
        "concatenation beats addition and no skip",
        {"none": "skip-none", "add": "skip-add", "concat": "base"},
        [("concat", "none"), ("concat", "add")],
    ),
    "time": (
        "a time token beats adaLN in the blocks",
        {"adaLN": "time-adaln", "token": "base"},
        [("token", "adaLN")],
    ),
    "depth": (
        "more depth is better",
        {"3": "depth-3", "5": "base", "9": "depth-9"},
        [("5", "3"), ("9", "5")],
    ),
    "width": (
        "more width is better",
        {"24": "width-24", "48": "base", "96": "width-96"},
        [("48", "24"), ("96", "48")],
    ),
}
SAID = {"repeats": "repeats", "in part": "repeats in part", "does not": "does not repeat"}
SAID |= {"undecided": "stays undecided"}
JUDGED = {"repeats": "as in the paper", "does not": "against the paper", "undecided": "undecided"}


def base() -> Config:
    """The digits demo, unconditional as the paper's CIFAR-10 models, narrower."""
    return study.change(
        load_config("digits"),
        model={"hidden_size": 48, "depth": 5, "num_classes": 0},
        train={"steps": 300, "save_every": 100, "keep": 1},
        sample={"every": 0, "steps": 20, "cfg_scale": 1.0, "batch_size": 256},
        score={"every": 60, "num": 602, "extractor": "pixels", "split": "heldout"},
    )


def finding(title: str, variants: dict[str, Any]) -> dict[str, Any]:
    """Whether a finding of the paper repeats: as its pairs do."""
    claim, values, claimed = ABLATIONS[title]
    rows = {value: variants[name] for value, name in values.items()}
    pairs = [{"better": b, "worse": w} | study.compare(rows[b], rows[w]) for b, w in claimed]
    verdicts = {pair["verdict"] for pair in pairs}
    if "does not" in verdicts:
        verdict = "in part" if "repeats" in verdicts else "does not"
    else:
        verdict = "undecided" if "undecided" in verdicts else "repeats"
    ends = [
        f"{value} {study.with_error(row['mean'][-1], row['stderr'][-1])}"
        for value, row in rows.items()
    ]
    sentence = (
        f"{title.capitalize()}: that {claim} {SAID[verdict]} at this scale. Final distances: "
        f"{', '.join(ends)}; {'; '.join(map(_compared, pairs))}."
    )
    return {"ablation": title, "verdict": verdict, "pairs": pairs, "sentence": sentence}


def _compared(pair: dict[str, Any]) -> str:
    gain = study.with_error(abs(pair["gain"]), pair["stderr"])
    side = "below" if pair["gain"] > 0 else "above"
    return f"{pair['better']} is {gain} {side} {pair['worse']}, {JUDGED[pair['verdict']]}"


def draw(report: dict[str, Any], path: Path) -> None:
    """One panel an ablation, distance against step with bars of one standard error."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(15, 4.5), layout="constrained")
    panels = figure.subplots(1, len(ABLATIONS), sharey=True)
    colours = ("tab:green", "tab:red", "tab:orange", "tab:blue")
    for panel, (title, (_, values, _)) in zip(panels, ABLATIONS.items(), strict=True):
        for (value, name), colour in zip(values.items(), colours[-len(values) :], strict=True):
            row = report["variants"][name]
            errors = [error or 0 for error in row["stderr"]]
            label = f"{value} ({1e3 * row['gflops']:.1f} MFLOPs)"
            style = {"color": colour, "marker": "o", "ms": 3, "capsize": 3}
            panel.errorbar(row["steps"], row["mean"], errors, label=label, **style)
        panel.set(title=title, xlabel="step", yscale="log")
        panel.grid(axis="y", which="both", color="0.9")
        panel.legend(fontsize=8, frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    study.plain_numbers(panels[0].yaxis)
    score = report["score"]
    panels[0].set_ylabel(f"{score['metric']} of {score['num']} samples to held-out images")
    seeds = f"mean ± standard error of {len(report['variants']['base']['runs'])} seeds"
    floor = f"as many training images: {report['floor']:.2f}"
    source = report["config"]["data"]["source"]
    figure.suptitle(f"{source}: {seeds}; {floor}; {study.caption(report)}", fontsize=11)
    figure.savefig(path, dpi=110)


def text(report: dict[str, Any]) -> str:
    """Table and findings as markdown."""
    variants, score = report["variants"], report["score"]
    steps = variants["base"]["steps"]
    rows = [["variant", "parameters", "MFLOPs", "training s", "MSE", *(f"step {n}" for n in steps)]]
    for name, row in variants.items():
        seconds = study.mean_error(list(row["training seconds"].values()))[0]
        cost = [f"{row['parameters']:,}", f"{1e3 * row['gflops']:.2f}", f"{seconds:.0f}"]
        cost.append(study.with_error(*study.mean_error(list(row["mse"].values()))))
        pairs = zip(row["mean"], row["stderr"], strict=True)
        rows.append([name, *cost, *(study.with_error(*pair) for pair in pairs)])
    model, settings = report["config"]["model"], report["config"]["train"]
    best = min(row["mean"][-1] for row in variants.values()) / report["floor"]
    return "\n".join(
        [
            "# Ablations",
            "",
            study.header(report, variants.values()),
            "",
            f"{report['config']['data']['source']}, unconditional; base: width "
            f"{model['hidden_size']}, depth {model['depth']}, patch {model['patch_size']}, skip "
            f"{model['skip']}, time as a {model['time_conditioning']}; {settings['steps']} steps "
            f"of {settings['batch_size']} images, learning rate {settings['lr']:g}, for all. "
            f"{score['metric']} of {score['num']} EMA samples, {score['sampler']} "
            f"{score['steps']}, to the held-out images: mean ± standard error over "
            f"{len(variants['base']['runs'])} seeds. As many training images are at "
            f"{report['floor']:.3f}, the best variant at {best:.1f} times that: this is about "
            f"short training of small models. MSE: the training loss of the last tenth of "
            f"the steps. MFLOPs: one image's forward pass, scan included. Seconds are those of a "
            f"machine that had other work too.",
            "",
            study.table(rows),
            "",
            f"A difference counts when it exceeds {study.DECIDED} of its standard errors.",
            "",
            *(f"- {found['sentence']}" for found in report["findings"]),
            "",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    options = study.parse(study.Options(base(), Path("runs/ablations")), __doc__, arguments)
    config = options.config
    variants = {
        name: study.seeded(study.change(config, model=values), name, options)
        for name, values in VARIANTS.items()
    }
    in_turn = [config for same_seed in zip(*variants.values(), strict=True) for config in same_seed]
    if options.list:
        print(*(study.command(c, "digits", options.launcher) for c in in_turn), sep="\n")
        return
    if not options.collect:
        study.train_all(in_turn)
    report = study.about(config)
    report["floor"] = study.floor(config, options.runs / "training.npz")
    report["variants"] = {name: study.summarise(runs) for name, runs in variants.items()}
    if missing := [name for name, row in report["variants"].items() if row is None]:
        raise ValueError(f"no finished run of {', '.join(missing)}: run it without --collect")
    report["findings"] = [finding(title, report["variants"]) for title in ABLATIONS]
    study.publish(report, options.results or options.runs / "ablations.json", text, draw)


if __name__ == "__main__":
    study.run(main)
