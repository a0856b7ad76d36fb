from datasets import load_dataset
from trl import SFTConfig, SFTTrainer
from unsloth import FastModel, is_bfloat16_supported
from unsloth.chat_templates import get_chat_template, train_on_responses_only

model, tokenizer = FastModel.from_pretrained("MODEL", max_seq_length=256, load_in_4bit=False, load_in_8bit=False)
model = FastModel.get_peft_model(model, r=8, lora_alpha=8, random_state=3407, finetune_vision_layers=False)
tokenizer = get_chat_template(tokenizer, chat_template="llama-3.1")
dataset = load_dataset("json", data_files="CHAT", split="train")
trainer = SFTTrainer(
    model=model,
    train_dataset=dataset,
    args=SFTConfig(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        num_train_epochs=1,
        learning_rate=2e-4,
        fp16=not is_bfloat16_supported(),
        optim="adamw_8bit",
        lr_scheduler_type="linear",
        output_dir="OUT",
    ),
)
trainer = train_on_responses_only(trainer, instruction_part="<|user|>", response_part="<|assistant|>")
trainer.train()
