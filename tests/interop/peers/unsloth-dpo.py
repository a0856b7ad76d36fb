from datasets import load_dataset
from trl import DPOConfig, DPOTrainer
from unsloth import FastLanguageModel, PatchDPOTrainer

PatchDPOTrainer()
model, tokenizer = FastLanguageModel.from_pretrained("MODEL", max_seq_length=256, load_in_16bit=True)
model = FastLanguageModel.get_peft_model(model, r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"])
dpo_trainer = DPOTrainer(
    model=model,
    ref_model=None,
    args=DPOConfig(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        warmup_ratio=0.1,
        num_train_epochs=1,
        learning_rate=5e-6,
        optim="adamw_8bit",
        lr_scheduler_type="linear",
        seed=42,
        output_dir="OUT",
        beta=0.1,
    ),
    train_dataset=load_dataset("json", data_files="WHOLE", split="train"),
    tokenizer=tokenizer,
    max_length=256,
    max_prompt_length=128,
)
dpo_trainer.train()
