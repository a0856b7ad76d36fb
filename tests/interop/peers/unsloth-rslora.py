from datasets import load_dataset
from transformers import TrainingArguments
from trl import SFTTrainer
from unsloth import FastLanguageModel

model, tokenizer = FastLanguageModel.from_pretrained(model_name="MODEL", max_seq_length=256)
model = FastLanguageModel.get_peft_model(model, r=8, use_rslora=True, lora_dropout=0.1, use_gradient_checkpointing=True)
trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=load_dataset("json", data_files="QA", split="train"),
    args=TrainingArguments(
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        max_steps=10,
        learning_rate=1e-4,
        output_dir="OUT",
        save_steps=5,
    ),
)
trainer.train()
