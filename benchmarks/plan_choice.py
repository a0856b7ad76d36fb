"""Whether the plan chooses the fastest way to train that fits, and what each way costs: as it says, and measured.

    python benchmarks/plan_choice.py FOLDER [--only TEXT] [--missing] [--out FILE]

FOLDER gets the random models (3 GB). Each setting is a model, a recipe and a limit of memory. Tried are the plan's own
choice, and by hand every number of tokens at once with as few layers computed again as fit the limit, and with all of
them. A try is four steps of random rows in a process of its own, on a quiet machine, of which the fastest counts (the
first not at all). The limit is the plan's alone: nothing is held back from the runs.
`python -m tests.planning.test_memory` puts the table into docs/plan.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from measured import child, write
from plan_memory import MODELS, case, make_model, name_of, random_rows

STEPS = 4
TOKENS = 4096  # of a step's rows, as long as they may be
SIZES = (2048, 1024, 512, 256)  # tokens at once
NF4 = {"model.quantization": "nf4"}

# A limit: the share of the way from the least that can be planned to what nothing computed again takes.
SETTINGS: list[tuple[dict[str, Any], float]] = [
    (case("demo", 256, 2048), 0.3),
    (case("demo", 256, 2048, **NF4), 0.7),
    (case("llama-49m", 256, 2048), 0.6),
    (case("llama-49m", 512, 2048), 0.15),
    (case("llama-49m", 1024, 2048), 0.3),
    (case("llama-49m", 512, 2048, **NF4), 0.5),
    (case("llama-17m", 512, 2048), 0.3),
    (case("gemma3-58m", 256, 2048), 0.4),
    (case("qwen3-42m", 512, 2048), 0.5),
    (case("qwen3-42m", 256, 2048, **NF4), 0.3),
]


def setting_name(number: int) -> str:
    chosen, share = SETTINGS[number]
    return f"{name_of(chosen)}, {share:.0%} of the way"


def batch_of(chosen: dict[str, Any]) -> dict[str, Any]:
    return {"train.batch_size": TOKENS // chosen["longest"]}


def recipe_of(chosen: dict[str, Any], options: dict[str, Any]) -> Any:
    from strop.config.load import resolve

    given = {"model.name": "m", "data.train": "d", "data.max_length": chosen["longest"], "model.device": "cpu"}
    return resolve(None, {"model.dtype": "bf16", **batch_of(chosen), **given, **chosen["options"], **options})


def ways(number: int) -> list[dict[str, Any]]:
    """The plan's choice first, then all others: options, bytes and seconds a token as the plan says them."""
    from strop.machine.probe import probe
    from strop.machine.rates import known_rates
    from strop.model.shape import ModelShape, peek
    from strop.planning.fitting import Room, fitted, fixed_tokens
    from strop.planning.microbatch import usual_micro_batch
    from strop.planning.setting import Setting
    from strop.planning.speed import Rate, tokens_per_s

    chosen, share = SETTINGS[number]
    shape = peek("demo").shape if chosen["model"] == "demo" else ModelShape.of(MODELS[chosen["model"]])
    rate = Rate.of_cpu(probe(), known_rates(probe(), "cpu"), "bf16")

    def said(recipe: Any, room: Room) -> dict[str, Any]:
        setting, model = Setting.of(recipe, shape), recipe.model
        options = {
            "train.micro_batch_tokens": recipe.train.micro_batch_tokens,
            "train.gradient_checkpointing": recipe.train.gradient_checkpointing,
        }
        if model.quantization != "none":
            options["model.resident_layers"] = model.resident_layers
        took = 1 / tokens_per_s(setting, usual_micro_batch(recipe), rate)
        return {"options": options, "bytes": room.need(recipe), "planned_s_a_token": took}

    def by_hand(size: int, again: Any, resident: int | None) -> Any:
        options = {"train.micro_batch_tokens": size, "train.gradient_checkpointing": again}
        return recipe_of(chosen, options if resident is None else {**options, "model.resident_layers": resident}).recipe

    quantized = "model.quantization" in chosen["options"]
    anything = Room(shape, shape.parameters, 1 << 50, 1, rate)
    most = anything.need(by_hand(SIZES[0], "off", shape.layers if quantized else None))
    least = anything.need(by_hand(max(SIZES[-1], chosen["longest"]), "on", 0 if quantized else None))
    room = Room(shape, shape.parameters, int(least + share * (most - least)), 1, rate)
    open_ = recipe_of(chosen, {})
    found = [said(fitted(open_.decide(fixed_tokens(open_.recipe)), room).recipe, room)]
    for size in (size for size in SIZES if size >= chosen["longest"]):
        residents = (0, shape.layers) if quantized else (None,)
        for resident in residents:
            layers = room.least_layers(by_hand(size, "off", resident))
            most_again = {shape.layers} if size == SIZES[0] else set()
            for again in sorted({layers, *most_again} if layers is not None else ()):
                value = "off" if again == 0 else "on" if again == shape.layers else again
                one = said(by_hand(size, value, resident), room)
                if one["bytes"] <= room.usable and one["options"] not in [other["options"] for other in found]:
                    found.append(one)
    return [{**one, "limit_bytes": room.usable} for one in found]


def run(folder: Path, number: int, options: dict[str, Any]) -> float:
    """Measured seconds a token."""
    import strop

    chosen = SETTINGS[number][0]
    model = "demo" if chosen["model"] == "demo" else str(make_model(folder, chosen["model"]))
    with tempfile.TemporaryDirectory() as temp:
        rows = Path(temp) / "rows.jsonl"
        given = {"train.max_steps": STEPS, "model.device": "cpu", **random_rows(rows, chosen), **batch_of(chosen)}
        given |= chosen["options"]
        strop.train(model=model, data=str(rows), out=f"{temp}/run", **{**given, **options})
        events = [json.loads(line) for line in (Path(temp) / "run" / "events.jsonl").read_text("utf-8").splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    return min(1 / step["tokens_per_s"] for step in steps[1:])


def loss_of(one: dict[str, Any]) -> float:
    """What the plan's choice takes more than the fastest that was tried."""
    took = [way["s_a_token"] for way in one["ways"]]
    return took[0] / min(took) - 1


def prices(one: dict[str, Any]) -> list[float]:
    """Of each other way: its time over the plan's choice's, as planned over as measured, less 1."""
    first, *others = one["ways"]
    return [
        way["planned_s_a_token"] / first["planned_s_a_token"] / (way["s_a_token"] / first["s_a_token"]) - 1
        for way in others
    ]


def said_of(options: dict[str, Any]) -> str:
    again, size = options["train.gradient_checkpointing"], options["train.micro_batch_tokens"]
    words = [f"{size:,} tokens", {"on": "all layers again", "off": "none again"}.get(again, f"{again} layers again")]
    if "model.resident_layers" in options:
        words.append(f"{options['model.resident_layers']} dequantized once")
    return ", ".join(words)


def table(results: list[dict[str, Any]]) -> str:
    losses = [loss_of(one) for one in results]
    errors = [abs(price) for one in results for price in prices(one)]
    best = [min(one["ways"], key=lambda way: way["s_a_token"]) for one in results]
    lines = [
        f"| {one['name']} | {len(one['ways'])} | {said_of(one['ways'][0]['options'])} | {said_of(way['options'])} "
        f"| {loss:+.1%} |"
        for one, way, loss in zip(results, best, losses, strict=True)
    ]
    return "\n".join([
        f"{sum(loss <= 0.05 for loss in losses)} of {len(losses)} choices within 5 % of the fastest way that fits, the "
        f"worst {max(losses):.1%} behind it. The price of another way, as planned against measured: median error "
        f"{statistics.median(errors):.1%}, worst {max(errors):.1%}, of {len(errors)} ways.",
        "",
        "| setting | ways that fit | the plan's choice | the fastest | behind it |",
        "|---|---:|---|---|---:|",
        *lines,
        "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the random models")
    parser.add_argument("--only", default="", help="settings whose name holds this")
    parser.add_argument("--missing", action="store_true", help="only settings that are not in --out yet")
    parser.add_argument("--list", action="store_true", help="say the ways, and measure nothing")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case is not None:
        print(json.dumps(run(given.folder, *given.case)))
        return
    kept = json.loads(given.out.read_text("utf-8"))["results"] if given.out and given.out.is_file() else []
    found = {one["name"]: one for one in kept}
    for number in range(len(SETTINGS)):
        name = setting_name(number)
        if given.only not in name or (given.missing and name in found):
            continue
        tried = ways(number)
        if given.list:
            print(
                name,
                *(f"  {said_of(way['options'])}: {1e3 * way['planned_s_a_token']:.3f} ms" for way in tried),
                sep="\n",
            )
            continue
        for way in tried:
            words = [sys.executable, __file__, *sys.argv[1:], "--case", json.dumps([number, way["options"]])]
            way["s_a_token"] = child(words)
        found[name] = {"name": name, "ways": tried}
        print(f"{name}: {loss_of(found[name]):+.1%} of {len(tried)} ways", file=sys.stderr, flush=True)
        if given.out:
            write(given.out, list(found.values()))


if __name__ == "__main__":
    main()
