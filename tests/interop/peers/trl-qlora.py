import os

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

bnb_config = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_compute_dtype=torch.bfloat16,
    bnb_4bit_use_double_quant=True,
)
model = AutoModelForCausalLM.from_pretrained(
    "MODEL", quantization_config=bnb_config, dtype=torch.bfloat16, attn_implementation="sdpa", device_map="auto"
)
tokenizer = AutoTokenizer.from_pretrained("MODEL")
dataset = load_dataset("json", data_files="TEXT", split="train[:90%]")
dataset = dataset.map(lambda row: {"text": row["text"].strip()})
peft_config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], bias="none", use_rslora=True, modules_to_save=[])
trainer = SFTTrainer(
    model=model,
    train_dataset=dataset,
    peft_config=peft_config,
    processing_class=tokenizer,
    args=SFTConfig(
        output_dir=os.environ["OUT"],
        max_steps=60,
        per_device_train_batch_size=4,
        optim="paged_adamw_8bit",
        lr_scheduler_type="constant",
        completion_only_loss=False,
        save_total_limit=2,
        logging_steps=10,
        bf16=True,
    ),
)
trainer.train()
