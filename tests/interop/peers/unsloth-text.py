from datasets import load_dataset
from unsloth import FastLanguageModel, UnslothTrainer, UnslothTrainingArguments

model, tokenizer = FastLanguageModel.from_pretrained(model_name="MODEL", max_seq_length=256, load_in_4bit=True)
model = FastLanguageModel.get_peft_model(
    model,
    r=8,
    lora_alpha=32,
    use_rslora=True,
    target_modules=["q_proj", "v_proj", "gate_proj"],
)
dataset = load_dataset("json", data_files="TEXT", split="train")
trainer = UnslothTrainer(
    model=model,
    train_dataset=dataset,
    args=UnslothTrainingArguments(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        learning_rate=5e-5,
        embedding_learning_rate=1e-5,
        completion_only_loss=False,
        lr_scheduler_type="cosine",
        output_dir="OUT",
    ),
)
trainer.train()
