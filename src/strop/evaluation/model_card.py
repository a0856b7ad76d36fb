"""README.md of an adapter or of a merged model: what it is, how good it is, its limits, how it was made and loads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from strop.evaluation.metrics import Difference, judged_by_kind, rows_asked, rows_counted, verdict
from strop.runs.folder import RunFolder, is_run, write_atomic

CARD_FILE = "README.md"
PLACE = "THIS_FOLDER"  # where what the card is about will be, as long as that is not known
# A recipe's fields that say where things are on this machine, or how it is watched: no part of how a model was made.
PLACES = {"model.name", "out", "track", "train.log_steps", "train.keep_checkpoints", "train.timeout", "model.device"}

REWARD = """It scores an answer by one number, the larger, the better; it writes none.

```python
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{place}")  # with the chat template it was trained with
base = AutoModelForSequenceClassification.from_pretrained("{base}", num_labels=1)
base.config.get_text_config().pad_token_id = None  # else a last token that is also the padding is passed over
model = PeftModel.from_pretrained(base, "{place}").eval()
text = tokenizer.apply_chat_template(messages, tokenize=False){end}  # the score is at the answer's last token
print(model(tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids).logits)  # one text at a time
```"""
CHATML_END = {"cut": "\n", "add": ""}  # of a report that does not tell how an answer ends

ADAPTER = """```python
import strop

print(strop.load("{place}").chat("..."))
```

```python
from peft import AutoPeftModelForCausalLM  # where the base is a folder or on the Hub
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")  # with the chat template it was trained with
```

```sh
vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}={place}
strop merge RUN --out MERGED             # one model of its own, for everything that takes no adapters
strop export ollama RUN --out FOLDER     # for Ollama: a GGUF file and its Modelfile
```"""

MERGED = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")  # with the chat template it was trained with
```

```sh
vllm serve {place}
```"""


def write_card(adapter: Path, report: Mapping[str, Any]) -> None:
    """Writes the card of a run's adapter from what report.json holds; again after each evaluation."""
    if adapter.is_dir():  # a report may be there before the adapter is
        write_atomic(adapter / CARD_FILE, card(report))


def report_of(adapter: Path) -> dict[str, Any] | None:
    """The report of the run that an adapter folder is part of; None where there is no such run, or it did not end."""
    run = RunFolder(adapter.parent)
    if not is_run(run.path) or run.adapter != adapter:
        return None
    report = run.read_report()
    return report if "recipe" in report else None


def hub_id(name: str) -> str | None:
    """The Hub id in the name of a base, without its revision; None for a folder, a GGUF file and the demo's model."""
    elsewhere = name.startswith(("demo:", "gguf:", ".", "~")) or os.path.isabs(name) or name.count("/") > 1
    return None if elsewhere else name.partition("@")[0]


def card(report: Mapping[str, Any], *, base: str | None = None, merged: Mapping[str, Any] | None = None) -> str:
    """The card of a run's adapter, or of a model that it was merged into.

    report: as in report.json. base: a Hub id that holds the base of an adapter that was
    trained on a folder or a GGUF file. merged: dtype, and parity as `strop merge --json` gives it (None: not measured).
    """
    chosen = {choice["field"]: choice["value"] for choice in report["recipe"]}
    lock, name = report["lock"], Path(str(report["run"])).name
    known = base or hub_id(lock["base"]["name"])
    shown = f"`{known}`" if known else f"`{_file(lock['base']['name'])}` (not from the Hub)"
    prints = lock["data"] if isinstance(lock["data"], str) else json.dumps(lock["data"])
    library, relation = ("peft", "adapter") if merged is None else ("transformers", "finetune")
    related = {"base_model": known, "base_model_relation": relation} if known else {}
    head = {"library_name": library, **related, "tags": ["lora", "strop"]}
    rows = [
        ("base", f"{shown}, fingerprint `{lock['base']['fingerprint'][:16]}`, {_stored(chosen)}"),
        ("adapter", _adapter(chosen)),
        *([("merged", _merged(merged))] if merged is not None else []),
        ("training", _training(report, chosen)),
        ("data", f"{report['data']['used']:,} rows, hash `{prints[:16]}`"),
        *_template(report),
        *_scores(report),
    ]
    what = f"{shown} with a LoRA adapter merged into it" if merged is not None else f"A LoRA adapter for {shown}"
    loading = MERGED if merged is not None else REWARD if chosen.get("train.objective") == "reward" else ADAPTER
    return "\n".join(
        [
            "---",
            yaml.safe_dump(head, sort_keys=False, default_flow_style=None).strip(),
            "---",
            f"# {name}\n",
            f"{what}, trained with strop.\n",
            "| | |\n|---|---|",
            *(f"| {key} | {said} |" for key, said in rows),
            "\n## Limits\n",
            *(f"- {limit}" for limit in _limits(report, chosen)),
            "\n## How to load it\n",
            loading.format(place=PLACE, base=known or "BASE", rank=chosen["lora.r"], name=name, end=_end(report)),
            "\n## How it was made\n",
            _made(report, lock["versions"]),
            "",
        ]
    )


def _end(report: Mapping[str, Any]) -> str:
    """What makes a rendered conversation end with its answer's last token, as Python."""
    end = (report.get("objective") or {}).get("answer_end") or CHATML_END
    cut, add = (json.dumps(end[name], ensure_ascii=False) for name in ("cut", "add"))
    return (f".removesuffix({cut})" if end["cut"] else "") + (f" + {add}" if end["add"] else "")


def _file(name: str) -> str:
    """The last part of a base's name: a card tells nobody where things are on a machine."""
    return Path(name.partition("#")[0]).name


def _adapter(chosen: Mapping[str, Any]) -> str:
    targets = chosen["lora.target_modules"]
    on = ", ".join(targets) if isinstance(targets, (list, tuple)) else str(targets)
    return f"rank {chosen['lora.r']}, alpha {chosen['lora.alpha']:g}, on {on}"


def _merged(merged: Mapping[str, Any]) -> str:
    parity = merged["parity"]
    if parity is None:
        return f"in {merged['dtype']}; not measured against the adapter"
    figures = (
        f"mean KL {parity['kl_mean']:.2g}, top-1 agreement {parity['top1_agreement']:.2%}, {parity['positions']:,}"
    )
    return f"in {merged['dtype']}; measured against the adapter on its base: {figures} positions"


def _template(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    told = report.get("data_report", {}).get("template", [])
    return [("chat template", "; ".join(told).replace("|", "\\|"))] if told else []


def _stored(chosen: Mapping[str, Any]) -> str:
    scheme = chosen.get("model.quantization", "none")
    return str(chosen["model.dtype"]) if scheme == "none" else f"{scheme}, computed in {chosen['model.dtype']}"


def _training(report: Mapping[str, Any], chosen: Mapping[str, Any]) -> str:
    amount = f"{report['steps']:,} steps of {chosen['train.batch_size']} rows, {report['tokens']:,} tokens"
    if chosen.get("train.objective", "sft") != "sft":
        amount = f"{chosen['train.objective']}, {amount}"
    rate = f"learning rate {chosen['train.learning_rate']:g} ({chosen['train.lr_scheduler']})"
    return f"{amount}, {rate}, {chosen['train.optimizer']}, seed {chosen['seed']}"


def _scores(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if report.get("eval_loss") is not None:
        yield "evaluation loss", f"{report['eval_loss']:.4f}"
    asked, kept = report.get("evaluation"), report.get("regression")
    for name, found in ((rows_asked(asked or {}), asked), ("rows to keep", kept)):
        if found and _both(found):
            metric = found["metric"]
            said = f"{metric} {found['base'][metric]:.1%} before, {found['tuned'][metric]:.1%} after"
            yield name, f"{rows_counted(found)}: {said} ({_judged(found)})"
    general = report.get("general")
    if general:
        said = f"{general['base']:.1%} before, {general['tuned']:.1%} after"
        yield "general set", f"{general['rows']} rows: {said} ({judged_by_kind(general)})"


def _both(found: Any) -> bool:
    return bool(found and found.get("tuned") and found.get("base"))


def _judged(found: Mapping[str, Any]) -> str:
    return verdict(Difference(**found["difference"]))[1]


def _limits(report: Mapping[str, Any], chosen: Mapping[str, Any]) -> Iterator[str]:
    """What is not known of a model, from what was not measured; and what no run of strop measures."""
    if not _both(report.get("evaluation")):
        yield "It was asked no held-out rows: how good it is at its task is not known."
    elif (known := report["evaluation"].get("train_rows")) is None:
        yield "Whether it was trained on the rows that it was asked is not known."
    elif known:
        yield f"{known} of the {report['evaluation']['rows']} rows that it was asked are also train rows."
    if not report.get("general") and not _both(report.get("regression")):
        yield "Whether it got worse at other things than its rows are about was not measured."
    longest = report.get("data_report", {}).get("tokens", {}).get("max")
    if longest:
        yield f"No row that it was trained on is longer than {longest:,} tokens."
    if chosen.get("train.objective") != "reward":
        yield "It answers prompts in the chat template that is saved with it; in another it was not tried."
    yield "Nothing here was checked for safety, bias or truth."
    yield "The licence and the terms of the base hold for it too."


def _made(report: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """The settings that were chosen, as a recipe, and the versions; of a path, the file's name alone."""
    tree: dict[str, Any] = {}
    for choice in report["recipe"]:
        section, _, field = choice["field"].rpartition(".")
        if choice["origin"] == "default" or choice["field"] in PLACES or choice["value"] is None:
            continue
        (tree.setdefault(section, {}) if section else tree)[field] = _named(choice["value"])
    lines = ", ".join(f"{name} {number}" for name, number in versions.items())
    return f"```yaml\n{yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).strip()}\n```\n\nWith {lines}."


def _named(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_named(one) for one in value]
    path = isinstance(value, str) and (os.path.isabs(value) or value.startswith((".", "~")))
    return Path(value).name if path else value
