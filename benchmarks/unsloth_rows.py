"""Run Unsloth with its fastest settings on a CPU, for comparison in train_step.py.

    python unsloth_rows.py MODEL_FOLDER DATA.jsonl OUT_FOLDER BATCH [packing]

bf16 weights, r 16 on all linear layers, whole text in the loss, grouped by length, one epoch, cosine from 2e-4.
packing: packs rows into sequences of up to 1,024 tokens instead of grouping them by length.
"""

import sys

from unsloth import FastLanguageModel  # first, because it patches the other libraries

import torch  # isort: skip
from datasets import load_dataset  # isort: skip
from measured import train_clocked  # isort: skip
from trl import SFTConfig, SFTTrainer  # isort: skip

folder, data, out, batch = sys.argv[1:5]
PACKING = sys.argv[5:] == ["packing"]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


model, tokenizer = FastLanguageModel.from_pretrained(folder, max_seq_length=1024, dtype=torch.bfloat16)
model = FastLanguageModel.get_peft_model(
    model, r=16, lora_alpha=32, lora_dropout=0, target_modules=TARGETS, use_gradient_checkpointing=False
)
rows = load_dataset("json", data_files=data, split="train")
rows = rows.map(lambda row: {"text": tokenizer.apply_chat_template(row["messages"], tokenize=False)})
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
)
train_clocked(trainer)
