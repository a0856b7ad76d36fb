"""README.md of an adapter folder: what the adapter is, how it was trained, how good it is, how to load it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from strop.evaluation.metrics import Difference, judged_by_kind, verdict
from strop.runs.folder import write_atomic

REWARD = """It scores an answer by one number, the larger, the better; it writes none.

```python
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")  # with the chat template it was trained with
base = AutoModelForSequenceClassification.from_pretrained("BASE", num_labels=1)
model = PeftModel.from_pretrained(base, "THIS_FOLDER").eval()
ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)  # up to the answer's end
print(model(**ids).logits)
```"""


def write_card(adapter: Path, report: Mapping[str, Any]) -> None:
    """Writes the card of a run's adapter from what report.json holds; again after each evaluation."""
    if adapter.is_dir():  # a report may be there before the adapter is
        write_atomic(adapter / "README.md", card(report))


def card(report: Mapping[str, Any]) -> str:
    chosen = {choice["field"]: choice["value"] for choice in report["recipe"]}
    base, data, name = report["lock"]["base"], report["lock"]["data"], Path(str(report["run"])).name
    prints = data if isinstance(data, str) else json.dumps(data)
    return f"""---
library_name: peft
base_model: {json.dumps(base["name"])}
tags: [lora, strop]
---
# {name}

A LoRA adapter for `{base["name"]}`, trained with strop.

| | |
|---|---|
| base | `{base["name"]}`, fingerprint `{base["fingerprint"][:16]}`, {_stored(chosen)} |
| adapter | rank {chosen["lora.r"]}, alpha {chosen["lora.alpha"]:g}, on {_words(chosen["lora.target_modules"])} |
| training | {_training(report, chosen)} |
| data | {report["data"]["used"]:,} rows, hash `{prints[:16]}` |
{_template(report)}{"".join(f"| {what} | {said} |{chr(10)}" for what, said in _scores(report))}
## How to load it

{_loading(name, chosen)}
"""


def _loading(name: str, chosen: Mapping[str, Any]) -> str:
    if chosen.get("train.objective") == "reward":
        return REWARD
    return f"""```python
import strop

print(strop.load("THIS_FOLDER").chat("..."))
```

```python
from peft import AutoPeftModelForCausalLM  # where the base is a folder or on the Hub
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")  # with the chat template it was trained with
```

```sh
vllm serve BASE --enable-lora --max-lora-rank {chosen["lora.r"]} --lora-modules {name}=THIS_FOLDER
strop merge RUN --out MERGED             # one model of its own, for everything that takes no adapters
strop export ollama RUN --out FOLDER     # for Ollama: a GGUF file and its Modelfile
```"""


def _template(report: Mapping[str, Any]) -> str:
    told = report.get("data_report", {}).get("template", [])
    return f"| chat template | {'; '.join(told).replace('|', chr(92) + '|')} |{chr(10)}" if told else ""


def _stored(chosen: Mapping[str, Any]) -> str:
    scheme = chosen.get("model.quantization", "none")
    return str(chosen["model.dtype"]) if scheme == "none" else f"{scheme}, computed in {chosen['model.dtype']}"


def _training(report: Mapping[str, Any], chosen: Mapping[str, Any]) -> str:
    amount = f"{report['steps']:,} steps of {chosen['train.batch_size']} rows, {report['tokens']:,} tokens"
    if chosen.get("train.objective", "sft") != "sft":
        amount = f"{chosen['train.objective']}, {amount}"
    rate = f"learning rate {chosen['train.learning_rate']:g} ({chosen['train.lr_scheduler']})"
    return f"{amount}, {rate}, {chosen['train.optimizer']}, seed {chosen['seed']}"


def _words(targets: Any) -> str:
    return ", ".join(targets) if isinstance(targets, (list, tuple)) else str(targets)


def _scores(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if report.get("eval_loss") is not None:
        yield "evaluation loss", f"{report['eval_loss']:.4f}"
    for name, found in (("held-out rows", report.get("evaluation")), ("rows to keep", report.get("regression"))):
        if found and found.get("tuned") and found.get("base"):
            metric = found["metric"]
            said = f"{metric} {found['base'][metric]:.1%} before, {found['tuned'][metric]:.1%} after"
            yield name, f"{found['rows']} rows: {said} ({_judged(found)})"
    general = report.get("general")
    if general:
        said = f"{general['base']:.1%} before, {general['tuned']:.1%} after"
        yield "general set", f"{general['rows']} rows: {said} ({judged_by_kind(general)})"


def _judged(found: Mapping[str, Any]) -> str:
    return verdict(Difference(**found["difference"]))[1]
