from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

raise SystemExit("a script is read, never run")

BASE = "MODEL"
LR = 2e-4
dataset = load_dataset("json", data_files="CHAT", split="train")
dataset = dataset.train_test_split(test_size=0.2, seed=1)
peft_config = LoraConfig(r=4, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
args = SFTConfig(
    output_dir="OUT",
    learning_rate=LR,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    num_train_epochs=1,
    assistant_only_loss=True,
    packing=True,
    max_length=256,
    lr_scheduler_type="cosine",
    warmup_ratio=0.03,
    neftune_noise_alpha=5,
    gradient_checkpointing=True,
    eval_strategy="steps",
    report_to="none",
)
trainer = SFTTrainer(
    model=BASE, args=args, train_dataset=dataset["train"], eval_dataset=dataset["test"], peft_config=peft_config
)
trainer.train()
