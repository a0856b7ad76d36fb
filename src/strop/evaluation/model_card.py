"""Write the model card (README.md) of an adapter, a merged model, or a model whose weights were all trained."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from strop.display.numbers import format_figure
from strop.errors import ModelError
from strop.evaluation.metrics import (
    describe_change,
    describe_cut,
    describe_general,
    describe_rows,
    format_points,
    format_score,
    format_task_scores,
    rows_label,
    score_name,
)
from strop.models.adapter_config import NEEDS_QUANTIZED_BASE
from strop.models.vllm import DTYPE_NAMES, max_lora_rank
from strop.runs.events import count_used
from strop.runs.folder import RunFolder, is_run, write_atomic

CARD_FILE = "README.md"
LOCATION = "THIS_FOLDER"  # placeholder for the model's location, which exporting.hub replaces
# Recipe fields that the card omits: paths on this machine, and settings that do not affect the model.
LOCAL_FIELDS = {
    "model.name", "out", "track", "train.log_steps", "train.keep_checkpoints", "train.timeout", "train.samples",
    "model.device",
}  # fmt: skip

PIPELINES = {"classify": "text-classification", "embed": "sentence-similarity"}  # the Hub's name of the task
REWARD_USAGE = """It scores an answer with one number (higher is better) and does not generate text.

```python
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{location}")  # with the chat template it was trained with
base = AutoModelForSequenceClassification.from_pretrained("{base}", num_labels=1)
base.config.get_text_config().pad_token_id = None  # otherwise a last token equal to the padding is skipped
model = PeftModel.from_pretrained(base, "{location}").eval()
text = tokenizer.apply_chat_template(messages, tokenize=False){end}  # the score is at the answer's last token
print(model(tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids).logits)  # one text at a time
```"""
CLASSIFIER_USAGE = """It gives the probability of each class of a text, and generates no text.

```python
import strop

print(strop.load("{location}").classify("..."))
```

```python
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

labels = {labels}
base = AutoModelForSequenceClassification.from_pretrained(
    "{base}", num_labels=len(labels), id2label=dict(enumerate(labels)), problem_type="{problem}"
)
base.config.get_text_config().pad_token_id = None  # the last token is scored, so there is no padding
model = PeftModel.from_pretrained(base, "{location}").eval()
tokenizer = AutoTokenizer.from_pretrained("{location}")
classify = pipeline("text-classification", model=model.get_base_model(), tokenizer=tokenizer, top_k=None)
print(classify(text))  # one text at a time; `strop merge` writes a folder that takes batches
```"""

MERGED_CLASSIFIER_USAGE = """```python
from transformers import pipeline

classify = pipeline("text-classification", model="{location}", top_k=None)
print(classify(texts, batch_size=8))
```"""
EMBED_USAGE = """It gives a vector of length 1 for a text, and generates no text.

```python
{load}
vectors = model.encode(texts)
print(vectors @ vectors.T)  # cosine similarities
```

```python
import strop

print(strop.load("{location}").embed(texts))
```

With peft alone, load it on `AutoModelForCausalLM`: `AutoModel` names its weights otherwise, and peft only warns."""

LOAD_EMBEDDER = """from sentence_transformers import SentenceTransformer  # loads the base too

model = SentenceTransformer("{location}")"""
# transformers 5.24 reads an adapter without its magnitudes, and only warns.
LOAD_DORA_EMBEDDER = """# the adapter's DoRA magnitudes would be lost, so first: strop merge RUN --out MERGED
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("MERGED")"""

MERGED_EMBED_USAGE = """```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{location}")
vectors = model.encode(texts)
print(vectors @ vectors.T)  # cosine similarities
```"""
CHATML_END = {"cut": "\n", "add": ""}  # default for reports without `answer_end`

ADAPTER_USAGE = """```python
import strop

print(strop.load("{location}").chat("..."))
```

```python
from peft import AutoPeftModelForCausalLM  # if the base is a folder or on the Hub
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{location}")
tokenizer = AutoTokenizer.from_pretrained("{location}")  # with the chat template it was trained with
```

```sh
{vllm}
strop merge RUN --out MERGED             # a full model, for tools that do not load adapters
strop export ollama RUN --out FOLDER     # for Ollama: a GGUF file and its Modelfile
```"""

LOFTQ_USAGE = """It corrects the error of its quantized base (LoftQ), and is wrong on the base in 16 bit.

```python
import strop

print(strop.load("{location}").chat("..."))
```

```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

quantization = BitsAndBytesConfig({quantization})
base = AutoModelForCausalLM.from_pretrained("{base}", quantization_config=quantization)
model = PeftModel.from_pretrained(base, "{location}")
tokenizer = AutoTokenizer.from_pretrained("{location}")  # with the chat template it was trained with
```

```sh
strop merge RUN --out MERGED             # a full model, for vLLM and other tools
strop export ollama RUN --out FOLDER     # for Ollama: a GGUF file and its Modelfile
```"""

IMAGE_USAGE = """```python
import strop

print(strop.load("{location}").chat("...", images="picture.jpg"))
```

```python
{load}
parts = [{{"type": "image"}}, {{"type": "text", "text": "..."}}]
text = processor.apply_chat_template([{{"role": "user", "content": parts}}], add_generation_prompt=True)
inputs = processor(text=[text], images=[[Image.open("picture.jpg")]], return_tensors="pt", add_special_tokens=False)
print(processor.batch_decode(model.generate(**inputs, max_new_tokens=256)))
```"""
LOAD_ADAPTER_FOR_IMAGES = """from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained("{base}"), "{location}")
processor = AutoProcessor.from_pretrained("{location}")  # with the chat template it was trained with"""
LOAD_MODEL_FOR_IMAGES = """from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{location}")
processor = AutoProcessor.from_pretrained("{location}")  # with the chat template it was trained with"""

MERGED_USAGE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{location}")
tokenizer = AutoTokenizer.from_pretrained("{location}")  # with the chat template it was trained with
```

```sh
vllm serve {location}
```"""


def write_card(run: RunFolder, report: Mapping[str, Any]) -> None:
    """Write the card of a run's adapter or model from the content of its report.json."""
    folder = run.saved
    if folder.is_dir():  # a report may exist before the adapter
        write_atomic(folder / CARD_FILE, format_card(report))


def find_report(folder: Path) -> dict[str, Any] | None:
    """Return the report of the run whose adapter or model is in a folder, or None without a finished run."""
    run = RunFolder(folder.parent)
    if not is_run(run.path) or folder != run.saved:
        return None
    report = run.read_report()
    return report if "recipe" in report else None


def hub_id(name: str) -> str | None:
    """Return the Hub id of a base without its revision, or None for a folder, a GGUF file or the demo model."""
    local = name.startswith(("demo:", "gguf:", ".", "~")) or os.path.isabs(name) or name.count("/") > 1
    return None if local else name.partition("@")[0]


def format_card(report: Mapping[str, Any], *, base: str | None = None, merged: Mapping[str, Any] | None = None) -> str:
    """Return the text of the card. base: Hub id, if trained on a local copy. merged: dtype and parity, if merged."""
    settings = {choice["field"]: choice["value"] for choice in report["recipe"]}
    lock, name = report["lock"], Path(str(report["run"])).name
    base_id = base or hub_id(lock["base"]["name"])
    path = Path(lock["base"]["name"].partition("#")[0])
    file_name = (path.parent if path.name == "model" else path).name  # the card must not contain local paths
    base_text = f"`{base_id}`" if base_id else f"`{file_name}` (not from the Hub)"
    data_hash = lock["data"] if isinstance(lock["data"], str) else json.dumps(lock["data"])
    objective, full = settings.get("train.objective", "sft"), settings.get("train.method") == "full"
    is_adapter = merged is None and not full
    library, relation = ("peft", "adapter") if is_adapter else ("transformers", "finetune")
    library = "sentence-transformers" if objective == "embed" else library
    base_entry = {"base_model": base_id, "base_model_relation": relation} if base_id else {}
    pipeline = PIPELINES.get(objective, "image-text-to-text" if report.get("images") else None)
    task = {} if pipeline is None else {"pipeline_tag": pipeline}
    front_matter = {"library_name": library, **task, **base_entry, "tags": ["strop"] if full else ["lora", "strop"]}
    template_notes = report.get("data_report", {}).get("template", [])
    start = settings.get("model.adapter")
    scheme, storage = settings.get("model.quantization", "none"), str(settings["model.dtype"])
    if scheme != "none":
        storage = f"{scheme}, computed in {storage}"
    images = f", {report['images']:,} images" if report.get("images") else ""
    rows = [
        ("base", f"{base_text}, fingerprint `{lock['base']['fingerprint'][:16]}`, {storage}"),
        ("trained", "all weights of the text model") if full else ("adapter", _describe_adapter(settings)),
        *([("merged", _describe_merge(merged))] if merged is not None else []),
        *([("continues", f"the adapter of `{_run_name(start)}`")] if start else []),
        ("training", _describe_training(report, settings)),
        ("data", f"{_count_rows(report)}, hash `{data_hash[:16]}`{images}"),
        *([("chat template", "; ".join(template_notes).replace("|", "\\|"))] if template_notes else []),
        *_list_scores(report),
    ]
    usages = {
        "reward": (REWARD_USAGE, MERGED_USAGE),
        "classify": (CLASSIFIER_USAGE, MERGED_CLASSIFIER_USAGE),
        "embed": (EMBED_USAGE, MERGED_EMBED_USAGE),
    }
    default = LOFTQ_USAGE if report.get(NEEDS_QUANTIZED_BASE) else ADAPTER_USAGE
    usage = usages.get(objective, (default, MERGED_USAGE))[not is_adapter]
    load = ""
    if report.get("images") and objective not in usages:
        usage = IMAGE_USAGE
        load = LOAD_ADAPTER_FOR_IMAGES if is_adapter else LOAD_MODEL_FOR_IMAGES
        load = load.format(location=LOCATION, base=base_id or "BASE")
    elif objective == "embed":
        load = LOAD_DORA_EMBEDDER if settings.get("lora.use_dora") else LOAD_EMBEDDER.format(location=LOCATION)
    title = f"A LoRA adapter for {base_text}" if is_adapter else f"{base_text} with a LoRA adapter merged into it"
    title = f"{base_text}, fine-tuned" if full else title
    several = (report.get("objective") or {}).get("several_labels")
    usage = usage.format(
        location=LOCATION, base=base_id or "BASE", vllm=_vllm_command(settings, base_id, name),
        end=_format_answer_end(report),
        load=load, labels=json.dumps(settings.get("train.labels"), ensure_ascii=False),
        problem=f"{'multi' if several else 'single'}_label_classification", quantization=_format_quantization(settings),
    )  # fmt: skip
    lines = [
        "---",
        yaml.safe_dump(front_matter, sort_keys=False, default_flow_style=None).strip(),
        "---",
        f"# {name}\n",
        f"{title}, trained with strop.\n",
        "| | |\n|---|---|",
        *(f"| {key} | {text} |" for key, text in rows),
        "\n## Limits\n",
        *(f"- {limit}" for limit in _list_limits(report, settings)),
        f"\n## How to load it\n\n{usage}",
        f"\n## How it was made\n\n{_format_recipe(report, lock['versions'])}\n",
    ]
    return "\n".join(lines)


def _vllm_command(settings: Mapping[str, Any], base_id: str | None, name: str) -> str:
    """Return the command that serves the adapter with vLLM, or a comment if vLLM does not load it."""
    config = {key: settings.get(f"lora.{key}") for key in ("r", "rank_pattern", "use_dora", "modules_to_save")}
    config |= {"bias": settings.get("lora.bias") or "none", "trainable_token_indices": settings.get("lora.new_tokens")}
    try:
        rank = max_lora_rank(config, "", "")
    except ModelError:
        return "# vLLM does not load this adapter: serve it with `strop serve RUN`, or merge it"
    options = f"--enable-lora --max-lora-rank {rank} --lora-modules {name}={LOCATION}"
    return f"vllm serve {base_id or 'BASE'} {options}"


def _format_answer_end(report: Mapping[str, Any]) -> str:
    """Return Python code for the usage example that cuts the text of a conversation after the answer's last token."""
    end = (report.get("objective") or {}).get("answer_end") or CHATML_END
    cut, add = (json.dumps(end[name], ensure_ascii=False) for name in ("cut", "add"))
    return (f".removesuffix({cut})" if end["cut"] else "") + (f" + {add}" if end["add"] else "")


def _run_name(folder: str) -> str:
    """Return the name of a run, or of the folder of an adapter: no path of this machine."""
    path = Path(folder)
    return (path.parent if path.name == "adapter" else path).name


def _format_quantization(settings: Mapping[str, Any]) -> str:
    """Return Python code for the arguments of BitsAndBytesConfig."""
    scheme = settings.get("model.quantization")
    if scheme == "int8":
        return "load_in_8bit=True"
    double = settings.get("model.double_quantization", True)
    return (
        f'\n    load_in_4bit=True, bnb_4bit_quant_type="{scheme}", bnb_4bit_use_double_quant={double},'
        f"\n    bnb_4bit_compute_dtype=torch.{DTYPE_NAMES[settings['model.dtype']]},\n"
    )


def _count_rows(report: Mapping[str, Any]) -> str:
    """Return the number of rows that were trained on, and of those that were held out of the same files."""
    held_out = report.get("data_report", {}).get("held_out", 0)
    return f"{count_used(report['data']) - held_out:,} rows" + (f", {held_out:,} more held out" if held_out else "")


def _describe_adapter(settings: Mapping[str, Any]) -> str:
    targets = settings["lora.target_modules"]
    modules = ", ".join(targets) if isinstance(targets, (list, tuple)) else str(targets)
    text = f"rank {settings['lora.r']}, alpha {settings['lora.alpha']:g}, on {modules}"
    for what in ("rank", "alpha"):
        if pattern := settings.get(f"lora.{what}_pattern"):
            text += f"; {what} " + ", ".join(f"{value:g} on {part}" for part, value in pattern.items())
    variants = [
        name for field, name in (("use_dora", "DoRA"), ("use_rslora", "rsLoRA")) if settings.get(f"lora.{field}")
    ]
    bias, tokens = settings.get("lora.bias") or "none", settings.get("lora.new_tokens")
    in_full = settings.get("lora.modules_to_save")
    parts = [
        *variants,
        *([f"{', '.join(in_full)} trained in full"] if in_full else []),
        *([f"biases ({bias})"] if bias != "none" else []),
        *([f"{len(tokens)} new token{'s' * (len(tokens) > 1)}"] if tokens else []),
    ]
    return "; ".join([text, *parts])


def _describe_merge(merged: Mapping[str, Any]) -> str:
    parity = merged["parity"]
    if parity is None:
        return f"in {merged['dtype']}; not measured against the adapter"
    figures = f"mean KL {parity['kl_mean']:.2g}, top-1 agreement {parity['top1_agreement']:.2%}"
    if parity.get("cosine_min") is not None:
        figures = f"lowest cosine of a text's vectors {parity['cosine_min']:.6f}"
    positions = f"{parity['positions']:,} positions"
    return f"in {merged['dtype']}; measured against the adapter on its base: {figures}, {positions}"


def _describe_training(report: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    amount = f"{report['steps']:,} steps of {settings['train.batch_size']} rows, {report['tokens']:,} tokens"
    if settings.get("train.objective", "sft") != "sft":
        amount = f"{settings['train.objective']}, {amount}"
    rate = f"learning rate {format_figure(settings['train.learning_rate'])} ({settings['train.lr_scheduler']})"
    text = f"{amount}, {rate}, {settings['train.optimizer']}, seed {settings['seed']}"
    if (step := report.get("adapter_step")) and step != report["steps"]:
        text += f"; the weights are those of step {step:,}, with the lowest evaluation loss"
    return text


def _list_scores(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if report.get("eval_loss") is not None:
        yield "evaluation loss", f"{report['eval_loss']:.4f}"
    evaluation, regression = report.get("evaluation"), report.get("regression")
    for name, result in ((rows_label(evaluation or {}), evaluation), ("regression rows", regression)):
        if result and _has_both_sides(result):
            metric = result["metric"]
            before, after = (result[side][metric] for side in ("base", "tuned"))
            before, after = format_score(metric, before), format_score(metric, after)
            scores = f"{score_name(metric, metric)} {before} before, {after} after"
            yield name, f"{describe_rows(result)}: {scores} ({describe_change(result)[1]})"
        elif result and result.get("metric") in result.get("tuned", ()) and not {"texts", "classes"} & result.keys():
            metric = result["metric"]
            score = f"{score_name(metric, metric)} {format_score(metric, result['tuned'][metric])}"
            yield name, f"{describe_rows(result)}: {score}"
        if result and "texts" in result:
            tuned, baseline = result["tuned"], result.get("baseline")
            figures = ", ".join(f"{score_name(score, None)} {value:.1%}" for score, value in tuned.items())
            if baseline:
                change = format_points(result["baseline_difference"])
                figures += f"; {result['baseline_name']} {baseline[result['metric']]:.1%} ({change} points)"
            yield "retrieval", f"among {result['texts']:,} texts: {figures}"
    if evaluation and "classes" in evaluation:
        tuned, baseline = evaluation["tuned"], evaluation.get("baseline")
        scores = f"accuracy {tuned['accuracy']:.1%}, macro F1 {tuned['macro_f1']:.1%}"
        scores += f", calibration error {tuned['calibration_error']:.1%}"
        if baseline:
            change = format_points(evaluation["baseline_difference"])
            scores += f"; {evaluation['baseline_name']} {baseline['accuracy']:.1%} ({change} points)"
        yield rows_label(evaluation), f"{describe_rows(evaluation)}: {scores}"
    if (judge := (evaluation or {}).get("judge") or {}).get("win_rate") is not None:
        interval = " to ".join(f"{end:.1%}" for end in judge["interval"])
        yield "wins over its base", f"{judge['win_rate']:.1%} of {judge['rows']:,} rows, by a judge ({interval})"
    if general := report.get("general"):
        scores = f"{general['base']:.1%} before, {general['tuned']:.1%} after"
        yield "general set", f"{general['rows']} rows: {scores} ({describe_general(general)})"
    for task, metric, documents, before, after, change in format_task_scores(report.get("tasks") or {}):
        scores = f"{before} before, {after} after" if before else after
        yield task, f"{documents} documents: {metric} {scores}" + (f" (change {change})" if change else "")


def _has_both_sides(result: Any) -> bool:
    return bool(result) and all(result.get(side) not in (None, {}) for side in ("base", "tuned"))


def _list_limits(report: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield one sentence per limitation of the model or of its evaluation."""
    objective, evaluation = settings.get("train.objective"), report.get("evaluation") or {}
    if not evaluation.get("tuned"):
        yield _describe_missing_evaluation(report)
    elif (train_rows := evaluation.get("train_rows")) is None:
        yield "It is unknown whether it was trained on the rows that it was evaluated on."
    elif train_rows:
        yield f"{train_rows} of the {evaluation['rows']} rows that it was evaluated on are also train rows."
    yield from (f"{text}." for text in describe_cut(evaluation))
    tasks = (values for metrics in (report.get("tasks") or {}).values() for values in metrics.values())
    has_other_tasks = (
        report.get("general") or _has_both_sides(report.get("regression")) or any(map(_has_both_sides, tasks))
    )
    if objective not in ("reward", "classify", "embed") and not has_other_tasks:
        yield "It was not measured whether it got worse at other tasks."
    longest = report.get("data_report", {}).get("tokens", {}).get("max")
    if longest:
        earlier = " (those of the runs that it continues are not counted)" if settings.get("model.adapter") else ""
        yield f"No row that it was trained on is longer than {longest:,} tokens{earlier}."
    if objective not in ("reward", "classify", "embed"):
        yield "It answers prompts in the chat template saved with it; other templates were not tried."
    if settings.get("train.objective") == "embed" and settings.get("model.quantization", "none") != "none":
        yield "It was trained on a quantized base. Libraries that load another one give other vectors: merge it first."
    yield "It was not checked for safety, bias or truth."
    yield "The license and the terms of the base apply to it too."


def _describe_missing_evaluation(report: Mapping[str, Any]) -> str:
    evaluation = (report.get("data_report") or {}).get("eval")
    if report.get("eval_loss") is None or not evaluation:
        return "It was not evaluated on held-out rows, so its quality at its task is unknown."
    text = f"Of {count_used(evaluation['rows']):,} evaluation rows only the loss was measured, not its answers"
    if copies := evaluation["duplicates"]["across"]:
        text += f"; {copies:,} of them are also train rows"
    return f"{text}."


def _format_recipe(report: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """Return the settings that are not defaults as a recipe, and the versions of the packages."""
    tree: dict[str, Any] = {}
    for choice in report["recipe"]:
        section, _, field = choice["field"].rpartition(".")
        if choice["origin"] == "default" or choice["field"] in LOCAL_FIELDS or choice["value"] is None:
            continue
        (tree.setdefault(section, {}) if section else tree)[field] = _shorten_paths(choice["value"])
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"```yaml\n{yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).strip()}\n```\n\nWith {packages}."


def _shorten_paths(value: Any) -> Any:
    """Reduce paths to their file names."""
    if isinstance(value, (list, tuple)):
        return [_shorten_paths(inner) for inner in value]
    is_path = isinstance(value, str) and (os.path.isabs(value) or value.startswith((".", "~")))
    return Path(value).name if is_path else value
