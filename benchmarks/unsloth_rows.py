"""Unsloth at its best on any chat rows and any effective batch, on a CPU. A peer of train_step.py.

    python unsloth_rows.py MODEL_FOLDER DATA.jsonl OUT_FOLDER BATCH [packing]

bf16 weights, r 16 on all linear layers, whole text in the loss, grouped by length, one epoch, cosine from 2e-4.
packing: rows laid one behind the other, up to 1,024 tokens, instead.
"""

import json
import sys
import time
from typing import Any

from unsloth import FastLanguageModel  # first: it patches what the others import

import torch  # isort: skip
from datasets import load_dataset  # isort: skip
from transformers import TrainerCallback  # isort: skip
from trl import SFTConfig, SFTTrainer  # isort: skip

folder, data, out, batch = sys.argv[1:5]
PACKING = sys.argv[5:] == ["packing"]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Clock(TrainerCallback):
    seconds = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds += time.perf_counter() - self.started


model, tokenizer = FastLanguageModel.from_pretrained(folder, max_seq_length=1024, dtype=torch.bfloat16)
model = FastLanguageModel.get_peft_model(
    model, r=16, lora_alpha=32, lora_dropout=0, target_modules=TARGETS, use_gradient_checkpointing=False
)
rows = load_dataset("json", data_files=data, split="train")
rows = rows.map(lambda row: {"text": tokenizer.apply_chat_template(row["messages"], tokenize=False)})
clock = Clock()
trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    args=SFTConfig(
        output_dir=out,
        max_length=1024,
        dataset_text_field="text",
        per_device_train_batch_size=int(batch),
        learning_rate=2e-4,
        lr_scheduler_type="cosine",
        num_train_epochs=1,
        gradient_checkpointing=False,
        bf16=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        packing=PACKING,
        train_sampling_strategy="random" if PACKING else "group_by_length",
        dataset_num_proc=1,
    ),
    train_dataset=rows.remove_columns(["messages"]),
    callbacks=[clock],
)
step, real = trainer.training_step, 0


def counted(module: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
    global real
    mask = inputs.get("attention_mask")
    real += inputs["input_ids"].numel() if mask is None else int(mask.sum())
    return step(module, inputs, *rest, **more)


trainer.training_step = counted
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(json.dumps({"tokens": real, "seconds": clock.seconds, "loss": sum(map(float, losses)) / len(losses)}))
