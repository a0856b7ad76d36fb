"""Run TRL's SFTTrainer with its defaults on a CPU, for comparison in train_step.py.

python trl_defaults.py MODEL_FOLDER DATA.jsonl OUT_FOLDER          defaults, except `use_cpu`
python trl_defaults.py MODEL_FOLDER DATA.jsonl OUT_FOLDER 4bit     the usual QLoRA example, in bf16
"""

import sys

from datasets import load_dataset
from measured import train_clocked
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

model, data, out, *quantized = sys.argv[1:]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


if quantized:
    import torch
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(model, quantization_config=config, dtype=torch.bfloat16)
    model = prepare_model_for_kbit_training(model)
more = {"optim": "paged_adamw_8bit", "learning_rate": 2e-4, "bf16": True} if quantized else {}
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=out,
        use_cpu=True,
        per_device_train_batch_size=4,
        num_train_epochs=1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        **more,
    ),
    train_dataset=load_dataset("json", data_files=data, split="train"),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS),
)
train_clocked(trainer)
