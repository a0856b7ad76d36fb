from datasets import load_dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

training_args = DPOConfig(
    output_dir="OUT",
    beta=0.2,
    loss_type="sigmoid",
    label_smoothing=0.0,
    max_length=256,
    learning_rate=5e-6,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    num_train_epochs=1,
    precompute_ref_log_probs=True,
)
trainer = DPOTrainer(
    model="MODEL",
    args=training_args,
    train_dataset=load_dataset("json", data_files={"train": "WHOLE"}, split="train"),
    peft_config=LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian"),
)
trainer.train()
